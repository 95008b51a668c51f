"""Controls of an engine, joined in one set of tables, and the states of rows with known tokens."""

import dataclasses
import json
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Int

from jaxrl_llm.control.automaton import REFUSED, TokenAutomaton
from jaxrl_llm.control.config import UNLIMITED, Control, NoControl, without_budget
from jaxrl_llm.distribution.control_tables import ControlTables, encode, join_automata, state_of
from jaxrl_llm.rollout.built_control import limit_problem
from jaxrl_llm.rollout.output import OutputBuffer
from jaxrl_llm.rollout.sample import Controls, Vocabulary
from jaxrl_llm.types import Finish, Rollouts


class ControlSet:
    """Tables that grow with each new control; earlier controls keep their states. There are none until a row needs them."""

    def __init__(self, vocab: Vocabulary, vocab_size: int, build: Callable[[Control], TokenAutomaton]):
        """
        Args:
            vocab: the tokenizer's.
            vocab_size: V of the model.
            build: makes the automaton of a control.
        """
        self.vocab, self.vocab_size, self.build = vocab, vocab_size, build
        self.automata: dict[str, TokenAutomaton] = {}
        self.starts: dict[str, int] = {}
        self.tables: ControlTables | None = None
        """NumPy; None: no row had a control or a minimum length so far."""

    def start(self, control: Control) -> int:
        """Return the state in which rows under the control start. Raises UserError if it cannot be built."""
        if isinstance(control, NoControl):
            return 0
        control = without_budget(control)
        name = json.dumps([control.kind, dataclasses.asdict(control)], sort_keys=True)
        if name not in self.starts:
            self.automata[name] = self.build(control)
            self._join()
        return self.starts[name]

    def need(self) -> None:
        """Make tables if there are none."""
        if self.tables is None:
            self._join()

    def _join(self) -> None:
        automata = list(self.automata.values())
        self.tables, starts = join_automata(automata, self.vocab.size, self.vocab.eos, self.vocab_size)
        self.starts = dict(zip(self.automata, starts, strict=True))

    def _check(self, controls: Controls, limit: Int[np.ndarray, " B"]) -> None:
        """Check that every row can end within its limit.

        Raises:
            ValueError: a state is no start of a control, or a limit is too small.
        """
        state, budget = controls.control, controls.budget
        if state.any() or controls.min_new_tokens.any():
            self.need()
        if (unknown := np.setdiff1d(state, [0, *self.starts.values()])).size:
            raise ValueError(f"controls.control: got {unknown[0]}, want that of engine.controls(prompts, control=...)")
        for name, start in self.starts.items():
            own = state == start
            for most, slots in np.unique(np.stack([limit, budget], axis=1)[own], axis=0).tolist():
                if wrong := limit_problem(most, self.automata[name], slots):
                    raise ValueError(f"limit: {wrong} ({_short(name)})")

    def _states(self, state: int, slot: int, tokens: Sequence[int], budget: int) -> Int[np.ndarray, " n+1"]:
        """Return the states in which known tokens are filled in, and the one behind them; from a refused token on, REFUSED.

        Args:
            state: before the first of them.
            slot: of the first of them.
            tokens: token ids.
            budget: slot from which states expire.
        """
        found, tables = np.full(len(tokens) + 1, REFUSED, np.int32), self.tables
        for i, token in enumerate(tokens):
            found[i] = state = tables.expires[state] if slot + i >= budget else state
            state = tables.after(state, token)
            if state == REFUSED:
                return found
        found[-1] = state
        return found

    def codes(
        self, tokens: Sequence[int], limit: int, start: int, budget: int, minimum: int
    ) -> tuple[Int[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """Return the entries of `control_state` of a whole response, and where its control forces a token. A token that it does not
        allow has probability 0 under its entry.

        Args:
            tokens: token ids of the response.
            limit: maximum completion tokens.
            start: state in which rows start.
            budget: slot from which states expire.
            minimum: minimum length.
        """
        states, slot = self._states(start, 0, tokens, budget)[:-1], np.arange(len(tokens), dtype=np.int32)
        states = np.maximum(states, 0)
        return encode(states, limit - slot, slot < minimum), self.tables.forced[states] >= 0

    def allows(self, tokens: Sequence[int], start: int, budget: int) -> bool:
        """Return True if the control allows a whole response; arguments as in `codes`."""
        return start == 0 or self._states(start, 0, tokens, budget)[-1] != REFUSED

    def _follow(self, state: int, slot: int, tokens: Sequence[int], budget: int, name: str) -> Int[np.ndarray, " n+1"]:
        """Return `_states` of tokens that the control allows; `name`: in the error message.

        Raises:
            ValueError: it does not allow them.
        """
        if state == 0:
            return np.zeros(len(tokens) + 1, np.int32)
        states = self._states(state, slot, tokens, budget)
        if states[-1] == REFUSED:
            at = int(np.flatnonzero(states != REFUSED)[-1])
            raise ValueError(
                f"{name}: got token {tokens[at]} after {list(tokens[:at])}, want one that the control allows there"
            )
        return states

    def start_states(
        self, controls: Controls, limit: Int[np.ndarray, " B"], known: Rollouts | Sequence[Sequence[int]] | None
    ) -> list[Int[np.ndarray, " n+1"]]:
        """Return for each row the states of the tokens with which it begins, and last the one in which it begins to decode; of rows
        that continue rollouts, that one alone. Makes tables if a row needs them.

        Raises:
            ValueError: the control does not allow the known tokens, or the row could not end within its limit.
        """
        self._check(controls, limit)
        start, budget = controls.control.tolist(), controls.budget.tolist()
        if known is None:
            return [np.array([one], np.int32) for one in start]
        if isinstance(known, Rollouts):
            states, length = self._continued(known, start), known.length
        else:
            length = np.array([len(tokens) for tokens in known])
            states = [
                self._follow(one, 0, tokens, slots, f"known[{b}]")
                for b, (one, tokens, slots) in enumerate(zip(start, known, budget, strict=True))
            ]
        self.check_room(states, limit - length, "known")
        return states

    def _continued(self, known: Rollouts, start: list[int]) -> list[Int[np.ndarray, " 1"]]:
        """Return the state behind each row, as it was sampled: tokens alone do not say which ones took the place of others."""
        codes = known.control_state
        if codes is None:
            rows = zip(known.tokens, known.length.tolist(), start, strict=True)
            return [
                self._follow(one, 0, row[:n], UNLIMITED, f"known[{b}]")[-1:] for b, (row, n, one) in enumerate(rows)
            ]
        self.need()
        if (unknown := state_of(codes)[state_of(codes) >= len(self.tables.next)]).size:
            raise ValueError(
                f"known.control_state: got state {unknown[0]}, want states of this engine's controls: another one sampled these"
            )
        last = np.maximum(known.length - 1, 0)[:, None]
        before, token = (np.take_along_axis(x, last, axis=1)[:, 0] for x in (state_of(codes), known.tokens))
        # Behind tokens of another's turn, which are in no state, the control starts again.
        behind = np.where((known.length > 0) & (before > 0), self.tables.after(before, token), start)
        return list(np.where(np.array(start) == 0, 0, behind).astype(np.int32)[:, None])

    def resumed(
        self, output: OutputBuffer, rows: Int[np.ndarray, " n"], tokens: Sequence[Sequence[int]],
        start: Int[np.ndarray, " n"], budget: Int[np.ndarray, " n"],
    ) -> list[Int[np.ndarray, " n+1"]]:  # fmt: skip
        """Return for each row the states of further tokens, and last the one behind them. After the row had ended, they are those
        of another's turn: in no state, and the control starts again behind them.

        Args:
            output: has the rows.
            rows: of the buffer.
            tokens: of each row.
            start: state in which each row's control starts.
            budget: slot, of the row's own turn, from which states expire.

        Raises:
            ValueError: the control does not allow the tokens.
        """
        found = []
        for i, row in enumerate(rows.tolist()):
            if len(tokens[i]) and output.finish[row] in (Finish.EOS, Finish.STOP):
                found.append(np.array([*(0 for _ in tokens[i]), start[i]], np.int32))
            else:
                slot = int(output.length[row] - output.turn[row])
                found.append(self._follow(int(output.state[row]), slot, tokens[i], int(budget[i]), f"tokens[{i}]"))
        return found

    def check_room(self, states: list[Int[np.ndarray, " n+1"]], room: Int[np.ndarray, " B"], name: str) -> None:
        """Check that rows can end.

        Args:
            states: the last of each row is that behind its known tokens.
            room: tokens that the limit leaves.
            name: for the error message.

        Raises:
            ValueError: they cannot.
        """
        if self.tables is None:
            return
        need = self.tables.distance[[each[-1] for each in states]]
        for b in np.flatnonzero(need > np.maximum(room, 0))[:1]:
            raise ValueError(
                f"{name}[{b}]: got known tokens that leave room for {room[b]}, want room for the {need[b]} more that the control "
                "needs at least"
            )


def _short(name: str) -> str:
    return name if len(name) <= 120 else name[:117] + "..."

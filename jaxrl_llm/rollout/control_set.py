"""Controls of an engine, joined in one set of tables, and the states of rows with known tokens."""

import dataclasses
import json
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Int

from jaxrl_llm.control.automaton import REFUSED, TokenAutomaton
from jaxrl_llm.control.config import Control, NoControl
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

    def follow(self, state: int, slot: int, tokens: Sequence[int], budget: int, name: str) -> int:
        """Return the state behind known tokens; arguments as in `_states`, and a name for the error message.

        Raises:
            ValueError: the control does not allow them.
        """
        if state == 0:
            return 0
        states = self._states(state, slot, tokens, budget)
        if states[-1] == REFUSED:
            at = int(np.flatnonzero(states != REFUSED)[-1])
            raise ValueError(
                f"{name}: got token {tokens[at]} after {list(tokens[:at])}, want one that the control allows there"
            )
        return int(states[-1])

    def start_states(
        self, controls: Controls, limit: Int[np.ndarray, " B"], known: Rollouts | Sequence[Sequence[int]] | None
    ) -> Int[np.ndarray, " B"]:
        """Return the state in which each row begins to decode, behind its known tokens; makes tables if a row needs them.

        Raises:
            ValueError: the control does not allow the known tokens, or the row could not end within its limit.
        """
        self._check(controls, limit)
        state = self._behind(controls, known)
        if known is not None:
            length = known.length if isinstance(known, Rollouts) else np.array([len(tokens) for tokens in known])
            self.check_room(state, limit - length, "known")
        return state

    def _behind(self, controls: Controls, known: Rollouts | Sequence[Sequence[int]] | None) -> Int[np.ndarray, " B"]:
        """Return each row's state behind its known tokens.

        Raises:
            ValueError: the control does not allow them.
        """
        state = np.array(controls.control, np.int32)
        if known is None:
            return state
        codes = known.control_state if isinstance(known, Rollouts) else None
        if codes is not None:
            self.need()
            if (unknown := state_of(codes)[state_of(codes) >= len(self.tables.next)]).size:
                raise ValueError(
                    f"known.control_state: got state {unknown[0]}, want states of this engine's controls: another one "
                    "sampled these"
                )
        rows = (
            [row[:n] for row, n in zip(known.tokens, known.length, strict=True)]
            if isinstance(known, Rollouts)
            else known
        )
        for b, tokens in enumerate(rows):
            if state[b] == 0:
                continue
            if codes is not None and len(tokens):
                # As it was sampled: tokens alone do not say which ones were put in the place of others.
                state[b] = self.tables.after(state_of(codes[b, len(tokens) - 1]), tokens[-1])
            else:
                state[b] = self.follow(int(state[b]), 0, tokens, int(controls.budget[b]), f"known[{b}]")
        return state

    def resumed(
        self, output: OutputBuffer, rows: Int[np.ndarray, " n"], tokens: Sequence[Sequence[int]],
        start: Int[np.ndarray, " n"], budget: Int[np.ndarray, " n"],
    ) -> Int[np.ndarray, " n"]:  # fmt: skip
        """Return the state of rows behind further tokens; behind those of another's turn, after the row had ended, it is the start.

        Args:
            output: has the rows.
            rows: of the buffer.
            tokens: of each row.
            start: state in which each row's control starts.
            budget: slot, of the row's own turn, from which states expire.

        Raises:
            ValueError: the control does not allow the tokens.
        """
        state = output.state[rows]
        for i, row in enumerate(rows.tolist()):
            if len(tokens[i]) and output.finish[row] in (Finish.EOS, Finish.STOP):
                state[i] = start[i]
            else:
                slot = int(output.length[row] - output.turn[row])
                state[i] = self.follow(int(state[i]), slot, tokens[i], int(budget[i]), f"tokens[{i}]")
        return state

    def check_room(self, state: Int[np.ndarray, " B"], room: Int[np.ndarray, " B"], name: str) -> None:
        """Check that rows can end.

        Args:
            state: behind the known tokens.
            room: tokens that the limit leaves.
            name: for the error message.

        Raises:
            ValueError: they cannot.
        """
        if self.tables is None:
            return
        need = self.tables.distance[state]
        for b in np.flatnonzero(need > np.maximum(room, 0))[:1]:
            raise ValueError(
                f"{name}[{b}]: got known tokens that leave room for {room[b]}, want room for the {need[b]} more that the control "
                "needs at least"
            )


def _short(name: str) -> str:
    return name if len(name) <= 120 else name[:117] + "..."

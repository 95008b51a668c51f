"""Controls of an engine, joined in one set of tables, and the states of rows with known tokens."""

import dataclasses
import json
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Int

from jaxrl_llm.control.automaton import REFUSED, TokenAutomaton, states_of
from jaxrl_llm.control.config import Control, NoControl, without_budget
from jaxrl_llm.distribution.control_tables import ControlTables, encode, join_automata, state_of
from jaxrl_llm.parallel import hosts
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.rollout.built_control import limit_problem
from jaxrl_llm.rollout.output import COMPLETE, OutputBuffer, first_own_slot
from jaxrl_llm.rollout.sample import Controls, Vocabulary
from jaxrl_llm.types import Rollouts


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
        self._copy: tuple[ControlTables | None, ControlTables | None] = (None, None)
        """The tables when they were last put on the devices, and their copy there."""
        self.closing = np.zeros(0, np.int32)
        """`TokenAutomaton.closing` of each state of the tables."""

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

    def on_device(self, layout: Layout) -> ControlTables | None:
        """Return the tables on the devices of a layout, the same for all calls."""
        if self.tables is not self._copy[0]:
            self._copy = self.tables, hosts.put(self.tables, layout.replicated)
        return self._copy[1]

    def _join(self) -> None:
        automata = list(self.automata.values())
        self.tables, starts = join_automata(automata, self.vocab.size, self.vocab.eos, self.vocab_size)
        self.starts = dict(zip(self.automata, starts, strict=True))
        self.closing = np.zeros(len(self.tables.next), np.int32)
        joined = np.concatenate([[0], *(automaton.closing for automaton in automata)])
        self.closing[: len(joined)] = joined

    def _check(self, controls: Controls, limit: Int[np.ndarray, " B"] | None) -> None:
        """Check where rows start, and unless `limit` is None, that every one can end within it.

        Raises:
            ValueError: a state is no start of a control, or a limit is too small.
        """
        state, budget = controls.control, controls.budget
        if (unknown := np.setdiff1d(state, [0, *self.starts.values()])).size:
            raise ValueError(f"controls.control: got {unknown[0]}, want that of engine.controls(prompts, control=...)")
        if state.any() or controls.min_new_tokens.any():
            self.need()
        for name, start in self.starts.items() if limit is not None else ():
            own = state == start
            for most, slots in np.unique(np.stack([limit, budget], axis=1)[own], axis=0).tolist():
                if wrong := limit_problem(most, self.automata[name], slots):
                    raise ValueError(f"limit: {wrong} (control {json.loads(name)[0]})")

    def codes(
        self, tokens: Sequence[int], sampled: Sequence[bool], limit: int, start: int, budget: int, minimum: int
    ) -> tuple[Int[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """Return the entries of `control_state` of a whole response, and where a token is the control's own: forced, or in the
        place of another. A token that it does not allow has probability 0 under its entry.

        Args:
            tokens: token ids of the response.
            sampled: the policy drew the token; True where it is not known.
            limit: maximum completion tokens.
            start: state in which rows start.
            budget: slot from which states expire.
            minimum: minimum length.
        """
        slot = np.arange(len(tokens), dtype=np.int32)
        states = np.maximum(states_of(self.tables, start, 0, tokens, budget, sampled)[:-1], 0)
        return encode(states, np.maximum(limit - slot, 0), slot < minimum), self.tables.forced[states] >= 0

    def _follow(
        self, state: int, slot: int, tokens: Sequence[int], budget: int, name: str,
        sampled: Sequence[bool] | None = None,
    ) -> Int[np.ndarray, " n+1"]:  # fmt: skip
        """Return `states_of` tokens that the control allows; `name`: in the error message.

        Raises:
            ValueError: it does not allow them.
        """
        if state == 0:
            return np.zeros(len(tokens) + 1, np.int32)
        states = states_of(self.tables, state, slot, tokens, budget, sampled)
        if states[-1] == REFUSED:
            at = int(np.flatnonzero(states != REFUSED)[-1])
            raise ValueError(
                f"{name}: got token {tokens[at]} after {np.asarray(tokens[:at]).tolist()}, want one that the control allows there"
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
        self._check(controls, limit if known is None else None)
        start, budget = controls.control, controls.budget
        if known is None:
            return list(start.astype(np.int32)[:, None])
        turn, ended = np.zeros(len(start), int), False
        if isinstance(known, Rollouts):
            turn, ended, length = first_own_slot(known), np.isin(known.finish, COMPLETE), known.length
            states = self._continued(known, start, budget, turn)
        else:
            each = enumerate(zip(start.tolist(), known, budget.tolist(), strict=True))
            states = [self._follow(one, 0, tokens, slots, f"known[{b}]") for b, (one, tokens, slots) in each]
            length = np.array([len(tokens) for tokens in known])
        self._check_limits(np.where(ended, 0, _last(states)), length, turn, limit, budget)
        return states

    def _continued(
        self, known: Rollouts, start: Int[np.ndarray, " B"], budget: Int[np.ndarray, " B"], turn: Int[np.ndarray, " B"]
    ) -> list[Int[np.ndarray, " 1"]]:
        """Return the state behind each row. Tokens that were sampled without a control are followed as known tokens are; the others
        have the states in which they were sampled."""
        codes = known.control_state
        if codes is not None:
            self.need()
        states = np.zeros_like(known.tokens) if codes is None else state_of(codes)
        found = []
        for b, n in enumerate(known.length.tolist()):
            own = slice(int(turn[b]), n)
            if not start[b] or states[b, own].any():
                self._check_recorded(states[b, own], known.tokens[b, own], int(start[b]), b)
                found.append(self._behind(states[b, own], known.tokens[b, own], int(start[b])))
            else:
                tokens, sampled = known.tokens[b, own].tolist(), known.sampled[b, own]
                found.append(self._follow(int(start[b]), 0, tokens, int(budget[b]), f"known[{b}]", sampled)[-1])
        return list(np.array(found, np.int32)[:, None])

    def _behind(self, states: Int[np.ndarray, " n"], tokens: Int[np.ndarray, " n"], start: int) -> int:
        """Return the state behind the tokens of a row's own turn, which were sampled in these states."""
        return int(self.tables.after(states[-1], tokens[-1])) if start and len(states) else start

    def _check_recorded(self, states: Int[np.ndarray, " n"], tokens: Int[np.ndarray, " n"], start: int, b: int) -> None:
        """Check that the states of a row's own turn are those of its control.

        Raises:
            ValueError: another control sampled the row.
        """
        if not start or not len(states):
            return
        error = f"known.control_state[{b}]: got states of another control, want those of the row's own"
        if states.max() >= len(self.tables.next):
            raise ValueError(error)
        behind = np.append(start, self.tables.after(states, tokens))
        want = behind[:-1]
        follows = (states == want) | (states == self.tables.expires[want]) | self.tables.replaces[states]
        if not follows.all() or behind[-1] == REFUSED:
            raise ValueError(error)

    def resumed(
        self, output: OutputBuffer, rows: Int[np.ndarray, " n"], tokens: Sequence[Sequence[int]],
        limit: Int[np.ndarray, " n"], start: Int[np.ndarray, " n"], budget: Int[np.ndarray, " n"],
    ) -> list[Int[np.ndarray, " n+1"]]:  # fmt: skip
        """Return for each row the states of further tokens, and last the one behind them. After the row had ended, they are those
        of another's turn: in no state, and the control starts again behind them.

        Args:
            output: has the rows.
            rows: of the buffer.
            tokens: of each row.
            limit: new maximum completion tokens.
            start: state in which each row's control starts.
            budget: slot, of the row's own turn, from which states expire.

        Raises:
            ValueError: the control does not allow the tokens, or the row could not end within its limit.
        """
        found, turn = [], output.turn[rows]
        more, ended = np.array([len(ids) for ids in tokens]), np.isin(output.finish[rows], COMPLETE)
        length = output.length[rows] + more
        for i, row in enumerate(rows.tolist()):
            if more[i] and ended[i]:
                found.append(np.array([*(0 for _ in tokens[i]), start[i]], np.int32))
                turn[i] = length[i]
            else:
                slot = int(output.length[row] - turn[i])
                found.append(self._follow(int(output.state[row]), slot, tokens[i], int(budget[i]), f"tokens[{i}]"))
        self._check_limits(np.where(ended & (more == 0), 0, _last(found)), length, turn, limit, budget)
        return found

    def _check_limits(
        self, state: Int[np.ndarray, " B"], length: Int[np.ndarray, " B"], turn: Int[np.ndarray, " B"],
        limit: Int[np.ndarray, " B"], budget: Int[np.ndarray, " B"],
    ) -> None:  # fmt: skip
        """Check that rows with known tokens can end.

        Args:
            state: behind the known tokens.
            length: known tokens.
            turn: slot in which the row's own turn begins.
            limit: maximum completion tokens.
            budget: slot, of its own turn, from which states expire.

        Raises:
            ValueError: a row cannot.
        """
        if self.tables is None:
            return
        expiry = turn + budget.astype(np.int64)
        state = np.where(length >= expiry, self.tables.expires[state], state)
        closing = self.closing[state]
        least = np.maximum(length + self.tables.distance[state], np.where(closing > 0, expiry + closing, 0))
        for b in np.flatnonzero(least > np.maximum(limit, length))[:1]:
            raise ValueError(
                f"limit: got {limit[b]} for row {b}, of which {length[b]} tokens are known, want at least {least[b]}: the control "
                "needs so many"
            )


def _last(states: Sequence[Int[np.ndarray, " n+1"]]) -> Int[np.ndarray, " B"]:
    return np.array([each[-1] for each in states])

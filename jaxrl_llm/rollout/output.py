"""Output buffer of a session: NumPy arrays with one row per sample, filled chunk by chunk and reused once a row is taken."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jaxrl_llm.distribution.control_tables import state_of
from jaxrl_llm.rollout.decode import ChunkResult, recorded_columns
from jaxrl_llm.rollout.sample import Decoding
from jaxrl_llm.types import COLUMNS, Finish, Rollouts

TextDecoder = Callable[[list[int]], Sequence[str]]
"""Token ids to the texts searched for stop strings: with and without special tokens."""
# Replacement for bytes that are not, or not yet, a complete character.
BROKEN = "\ufffd"
# Maximum bytes per character.
CHARACTER = 4
# Maximum candidates for the first token to decode.
NEAR = 16
# Ends that a raised limit does not lift.
COMPLETE = (Finish.EOS, Finish.STOP)


class Position(NamedTuple):
    """Where rows stand."""

    length: Int[np.ndarray, " n"]
    finish: Int[np.ndarray, " n"]
    state: Int[np.ndarray, " n"]
    turn: Int[np.ndarray, " n"]


class OutputBuffer:
    """Rows being generated. Slots 0 to length - 1 of a row are filled: sampled by the policy, or forced."""

    def __init__(self, slots: int, decoding: Decoding):
        self.vocab = decoding.vocab
        recorded = recorded_columns(decoding)
        self.fill = {column.name: column.fill for column in recorded} | {
            "tokens": decoding.vocab.pad, "version": 0,
        }  # fmt: skip
        self.columns = {
            column.name: np.zeros((0, slots, *(decoding.max_kept_tokens for _ in column.dims)), column.dtype)
            for column in recorded
        }
        self.columns["version"] = np.zeros((0, slots), np.int32)
        self.length, self.limit, self.finish = (np.zeros(0, np.int32) for _ in range(3))
        self.state, self.turn = np.zeros(0, np.int32), np.zeros(0, np.int32)
        """State of the control behind the filled slots, and the slot in which it started."""
        self.free: list[int] = []

    @property
    def ended(self) -> Bool[np.ndarray, " rows"]:
        return self.finish != Finish.UNFINISHED

    def allocate(self, limit: Int[np.ndarray, " n"], state: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Return empty rows. `limit`: maximum completion tokens of each; `state`: of the control, in which it starts."""
        if (more := len(limit) - len(self.free)) > 0:
            self._enlarge(max(more, len(self.length)))
        rows = np.array([self.free.pop() for _ in limit], int)
        for name, column in self.columns.items():
            column[rows] = self.fill[name]
        self.length[rows], self.limit[rows], self.finish[rows] = 0, limit, int(Finish.UNFINISHED)
        self.state[rows], self.turn[rows] = state, 0
        return rows

    def _enlarge(self, more: int) -> None:
        old = len(self.length)
        longer = lambda x: np.concatenate([x, np.zeros((more, *x.shape[1:]), x.dtype)])  # noqa: E731
        self.columns = {name: longer(column) for name, column in self.columns.items()}
        for name in ("length", "limit", "finish", "state", "turn"):
            setattr(self, name, longer(getattr(self, name)))
        self.free += range(old + more - 1, old - 1, -1)

    def release(self, rows: Int[np.ndarray, " n"]) -> None:
        """Give rows back."""
        self.free += rows[::-1].tolist()

    def force(self, row: int, tokens: Sequence[int], states: Int[np.ndarray, " n+1"]) -> None:
        """Append tokens that the policy did not sample. The row continues behind them, whatever it ended with.

        Args:
            row: of the buffer.
            tokens: token ids.
            states: of the tokens, and last the one behind them.
        """
        start, end = self.length[row], self.length[row] + len(tokens)
        if self.finish[row] in COMPLETE:
            self.turn[row] = end
        self.columns["tokens"][row, start:end], self.columns["control_state"][row, start:end] = tokens, states[:-1]
        self.length[row], self.finish[row], self.state[row] = end, int(Finish.UNFINISHED), states[-1]
        self.end_at_limit(np.array([row]))

    def restore(self, rows: Int[np.ndarray, " n"], known: Rollouts, state: Int[np.ndarray, " n"]) -> None:
        """Fill empty rows with the tokens, log-probs and versions of earlier rollouts, one row each. `state`: behind them."""
        slots = known.length.max(initial=0)
        for name, column in self.columns.items():
            if (earlier := getattr(known, name)) is not None:
                column[rows, :slots] = earlier[:, :slots]
        self.length[rows], self.state[rows] = known.length, state
        self.turn[rows] = first_own_slot(known)
        self.finish[rows] = np.where(np.isin(known.finish, COMPLETE), known.finish, int(Finish.UNFINISHED))
        self.end_at_limit(rows)

    def end_at_limit(self, rows: Int[np.ndarray, " n"]) -> None:
        """End rows that are at their limit; rows that a lower limit ended continue."""
        finish, is_full = self.finish[rows], self.length[rows] >= self.limit[rows]
        open_ended = (finish == Finish.UNFINISHED) | (finish == Finish.LENGTH)
        self.finish[rows] = np.where(open_ended, np.where(is_full, Finish.LENGTH, Finish.UNFINISHED), finish)

    def end_in(self, rows: Int[np.ndarray, " n"], ended: Bool[np.ndarray, " n"]) -> None:
        """End rows whose known tokens are all that their control allows."""
        for row in rows[ended].tolist():
            at_end = self.columns["tokens"][row, self.length[row] - 1] in self.vocab.eos
            self.finish[row] = int(Finish.EOS if at_end else Finish.STOP)

    def position(self) -> Position:
        """Return where all rows stand, for `cut`."""
        return Position(self.length.copy(), self.finish.copy(), self.state.copy(), self.turn.copy())

    def cut(self, rows: Int[np.ndarray, " n"], before: Position) -> None:
        """Return rows to an earlier position."""
        self._clear(rows, before.length)
        self.length[rows], self.finish[rows], self.state[rows], self.turn[rows] = before

    def _clear(self, rows: Int[np.ndarray, " n"], length: Int[np.ndarray, " n"]) -> None:
        """Empty the slots from these lengths on."""
        for name, column in self.columns.items():
            for row, n in zip(rows.tolist(), length.tolist(), strict=True):
                column[row, n:] = self.fill[name]

    def add(
        self, rows: Int[np.ndarray, " B"], slot: Int[np.ndarray, " B"], result: ChunkResult, version: int,
        ended: Bool[np.ndarray, " B"],
    ) -> int:  # fmt: skip
        """Store what a chunk decoded, each row's tokens up to its limit. Returns the number of tokens stored.

        Args:
            rows: row of the buffer of each row of the chunk; negative: ignored.
            slot: completion slot of the chunk's first line.
            result: of the chunk.
            version: of the policy.
            ended: rows that their control ended.
        """
        chunk, steps = result.chunk, int(result.steps)
        room = np.where(rows >= 0, self.limit[rows] - slot, 0)
        line, b = np.nonzero(chunk.active[:steps] & (np.arange(steps)[:, None] < room))
        row, position = rows[b], slot[b] + line
        uncontrolled = {"sampled": True, "control_state": 0} if chunk.control_state is None else {}
        own = {"version": version} | uncontrolled
        for name, column in self.columns.items():
            column[row, position] = own[name] if name in own else getattr(chunk, name)[line, b]
        np.maximum.at(self.length, row, position + 1)
        self.state[row] = result.state.reshape(-1)[b]
        self.finish[row[ended[b]]] = int(Finish.STOP)
        at_end = np.isin(chunk.tokens[line, b], self.vocab.eos)
        self.finish[row[at_end]] = int(Finish.EOS)
        self.end_at_limit(rows[rows >= 0])
        return len(row)

    def stop(
        self, rows: Int[np.ndarray, " B"], seen: Int[np.ndarray, " B"], stop: tuple[str, ...], texts_of: TextDecoder
    ) -> None:
        """End each row at the token that completes a stop string. Tokens between two forced ones are a text of their own.

        Args:
            rows: rows of the buffer.
            seen: number of each row's leading tokens already searched without a match.
            stop: stop strings.
            texts_of: decodes token ids.
        """
        for row, seen in zip(rows.tolist(), seen.tolist(), strict=True):  # noqa: B020
            length = int(self.length[row])
            forced = np.flatnonzero(~self.columns["sampled"][row, :length]).tolist()
            for start, behind in zip([0, *(slot + 1 for slot in forced)], [*forced, length], strict=True):
                if behind <= seen:
                    continue
                tokens = self.columns["tokens"][row, start:behind].tolist()
                end = first_end(tokens, max(seen - start, 0), stop, texts_of)
                if end is not None:
                    self._clear(np.array([row]), np.array([start + end]))
                    self.length[row], self.finish[row] = start + end, int(Finish.STOP)
                    break


def recorded(rollouts: Rollouts) -> list[tuple[str, float, np.ndarray]]:
    """Return name, value in slots without a token, and array of each column of the rollouts."""
    columns = [(column.name, column.fill, getattr(rollouts, column.name)) for column in COLUMNS if column.rollouts]
    return [column for column in columns if column[2] is not None]


def where_slots(inside: Bool[np.ndarray, "B C"], column: np.ndarray, other: float) -> np.ndarray:
    """Return the column where `inside`, and the other value in all other slots."""
    return np.where(inside.reshape(*inside.shape, *(1,) * (column.ndim - 2)), column, np.asarray(other, column.dtype))


def cut_rows(rollouts: Rollouts, length: Int[np.ndarray, " B"], pad: int) -> Rollouts:
    """Return the rollouts with the first tokens of each row alone. Those that are shorter now have not ended.

    Args:
        rollouts: NumPy.
        length: tokens that are left.
        pad: padding token.
    """
    inside = np.arange(rollouts.tokens.shape[1]) < length[:, None]
    cut = {name: where_slots(inside, x, pad if name == "tokens" else fill) for name, fill, x in recorded(rollouts)}
    ended = (length == rollouts.length) & np.isin(rollouts.finish, COMPLETE)
    finish = np.where(ended, rollouts.finish, int(Finish.UNFINISHED)).astype(np.int32)
    return rollouts.replace(**cut, length=length.astype(np.int32), finish=finish)


def first_own_slot(known: Rollouts) -> Int[np.ndarray, " B"]:
    """Return the slot in which each row's control started last: behind the tokens of another's turn, which are forced and in no
    state."""
    if known.control_state is None:
        return np.zeros(len(known.length), np.int32)
    slots = np.arange(known.tokens.shape[1])
    is_others = (state_of(known.control_state) == 0) & ~known.sampled & (slots < known.length[:, None])
    return np.max((slots + 1) * is_others, axis=1, initial=0).astype(np.int32)


def first_end(tokens: list[int], seen: int, stop: tuple[str, ...], texts_of: TextDecoder) -> int | None:
    """Return the smallest n > `seen` such that the text of the first n tokens contains a stop string, or None.

    A token changes the text before it only where that text ends in an incomplete character. So if a text has neither incomplete
    characters nor a stop string, no shorter prefix of its tokens contains a stop string either, which permits bisection.

    Args:
        tokens: token ids of the completion.
        seen: number of leading tokens already searched.
        stop: stop strings.
        texts_of: decodes token ids.
    """
    complete = not any(BROKEN in s for s in stop)
    begin = _begin(tokens, seen, max(map(len, stop)), texts_of) if complete else 0

    def first(low: int, high: int) -> int | None:
        texts = texts_of(tokens[begin:high])
        found = any(s in text for text in texts for s in stop)
        if high - low == 1:
            return high if found else None
        if complete and not found and not any(BROKEN in text for text in texts):
            return None
        middle = (low + high) // 2
        return first(low, middle) or first(middle, high)

    return first(seen, len(tokens)) if len(tokens) > seen else None


def _begin(tokens: list[int], seen: int, longest: int, texts_of: TextDecoder) -> int:
    """Return the first token to decode: far enough before `seen` for any stop string completed after it, at a token of several
    characters, which decodes the same in any context. 0 if there is no such token nearby."""
    enough = CHARACTER * (longest + 1)
    back = longest
    while back < seen and min(map(len, texts_of(tokens[seen - back : seen]))) < enough:
        back *= 2
    for begin in range(seen - back, max(seen - back - NEAR, 0), -1):
        if all(len(text) > 1 and BROKEN not in text for text in texts_of(tokens[begin : begin + 1])):
            return begin
    return 0

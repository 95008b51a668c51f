"""Output buffer of a session: NumPy arrays with one row per sample, filled chunk by chunk and reused once a row is taken."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Int

from jaxrl_llm.rollout.decode import DecodedChunk, recorded_columns
from jaxrl_llm.rollout.sample import Decoding
from jaxrl_llm.types import Finish, Rollouts

TextDecoder = Callable[[list[int]], Sequence[str]]
"""Token ids to the texts searched for stop strings: with and without special tokens."""
# Replacement for bytes that are not, or not yet, a complete character.
BROKEN = "\ufffd"
# Maximum bytes per character.
CHARACTER = 4
# Maximum candidates for the first token to decode.
NEAR = 16


class OutputBuffer:
    """Rows being generated. Slots 0 to length - 1 of a row are filled: sampled by the policy, or forced."""

    def __init__(self, slots: int, decoding: Decoding):
        self.vocab = decoding.vocab
        recorded = recorded_columns(decoding)
        self.fill = {column.name: column.fill for column in recorded} | {
            "tokens": decoding.vocab.pad, "version": 0, "eos_masked": False,
        }  # fmt: skip
        self.columns = {
            column.name: np.zeros((0, slots, *(decoding.max_kept_tokens for _ in column.dims)), column.dtype)
            for column in recorded
        }
        self.columns |= {"version": np.zeros((0, slots), np.int32), "eos_masked": np.zeros((0, slots), bool)}
        self.length, self.limit, self.finish = (np.zeros(0, np.int32) for _ in range(3))
        self.free: list[int] = []

    @property
    def ended(self) -> Bool[np.ndarray, " rows"]:
        return self.finish != Finish.UNFINISHED

    def allocate(self, limit: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Return empty rows. `limit`: maximum completion tokens of each."""
        if (more := len(limit) - len(self.free)) > 0:
            self._enlarge(max(more, len(self.length)))
        rows = np.array([self.free.pop() for _ in limit], int)
        for name, column in self.columns.items():
            column[rows] = self.fill[name]
        self.length[rows], self.limit[rows], self.finish[rows] = 0, limit, int(Finish.UNFINISHED)
        return rows

    def _enlarge(self, more: int) -> None:
        old = len(self.length)
        longer = lambda x: np.concatenate([x, np.zeros((more, *x.shape[1:]), x.dtype)])  # noqa: E731
        self.columns = {name: longer(column) for name, column in self.columns.items()}
        self.length, self.limit, self.finish = map(longer, (self.length, self.limit, self.finish))
        self.free += range(old + more - 1, old - 1, -1)

    def release(self, rows: Int[np.ndarray, " n"]) -> None:
        """Give rows back."""
        self.free += rows[::-1].tolist()

    def force(self, row: int, tokens: Sequence[int]) -> None:
        """Append tokens that the policy did not sample. The row continues behind them, whatever it ended with."""
        start, end = self.length[row], self.length[row] + len(tokens)
        self.columns["tokens"][row, start:end] = tokens
        self.length[row], self.finish[row] = end, int(Finish.UNFINISHED)
        self.end_at_limit(np.array([row]))

    def restore(self, rows: Int[np.ndarray, " n"], known: Rollouts) -> None:
        """Fill empty rows with the tokens, log-probs and versions of earlier rollouts, one row each."""
        slots = known.length.max(initial=0)
        for name, column in self.columns.items():
            if (earlier := getattr(known, name)) is not None:
                column[rows, :slots] = earlier[:, :slots]
        self.length[rows] = known.length
        complete = np.isin(known.finish, (Finish.EOS, Finish.STOP))
        self.finish[rows] = np.where(complete, known.finish, int(Finish.UNFINISHED))
        self.end_at_limit(rows)

    def end_at_limit(self, rows: Int[np.ndarray, " n"]) -> None:
        """End rows that are at their limit; rows that a lower limit ended continue."""
        finish, is_full = self.finish[rows], self.length[rows] >= self.limit[rows]
        open_ended = (finish == Finish.UNFINISHED) | (finish == Finish.LENGTH)
        self.finish[rows] = np.where(open_ended, np.where(is_full, Finish.LENGTH, Finish.UNFINISHED), finish)

    def cut(self, rows: Int[np.ndarray, " n"], length: Int[np.ndarray, " n"], finish: Int[np.ndarray, " n"]) -> None:
        """Return rows to an earlier length and finish."""
        for name, column in self.columns.items():
            for row, n in zip(rows.tolist(), length.tolist(), strict=True):
                column[row, n:] = self.fill[name]
        self.length[rows], self.finish[rows] = length, finish

    def add(
        self, rows: Int[np.ndarray, " B"], slot: Int[np.ndarray, " B"], chunk: DecodedChunk, steps: int, version: int,
        min_new_tokens: Int[np.ndarray, " B"],
    ) -> int:  # fmt: skip
        """Store the first `steps` lines of a chunk, each row's up to its limit. Returns the number of tokens stored.

        Args:
            rows: row of the buffer of each row of the chunk; negative: ignored.
            slot: completion slot of the chunk's first line.
            chunk: recorded columns.
            steps: lines that ran.
            version: of the policy.
            min_new_tokens: slots in which end-of-sequence tokens are masked out.
        """
        room = np.where(rows >= 0, self.limit[rows] - slot, 0)
        line, b = np.nonzero(chunk.sampled[:steps] & (np.arange(steps)[:, None] < room))
        row, position = rows[b], slot[b] + line
        own = {"version": version, "eos_masked": position < min_new_tokens[b]}
        for name, column in self.columns.items():
            column[row, position] = own[name] if name in own else getattr(chunk, name)[line, b]
        np.maximum.at(self.length, row, position + 1)
        ends = np.isin(chunk.tokens[line, b], self.vocab.eos)
        self.finish[row[ends]] = int(Finish.EOS)
        self.end_at_limit(rows[rows >= 0])
        return len(row)

    def stop(self, rows: Int[np.ndarray, " B"], seen: int, stop: tuple[str, ...], texts_of: TextDecoder) -> None:
        """End each row at the token that completes a stop string, among the tokens after the last forced one.

        Args:
            rows: rows of the buffer.
            seen: number of leading tokens already searched without a match.
            stop: stop strings.
            texts_of: decodes token ids.
        """
        for row in rows.tolist():
            length = self.length[row]
            forced = np.flatnonzero(~self.columns["sampled"][row, :length])
            start = int(forced[-1]) + 1 if len(forced) else 0
            tokens = self.columns["tokens"][row, start:length].tolist()
            end = first_end(tokens, seen - start, stop, texts_of)
            if end is not None:
                self.cut(np.array([row]), np.array([start + end]), np.array([int(Finish.STOP)]))


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

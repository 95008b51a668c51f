"""Output buffers of a generation: NumPy arrays with one row per sample of each prompt, filled chunk by chunk."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Bool, Int

from jaxrl_llm.rollout.decode import ChunkRecord, recorded
from jaxrl_llm.rollout.sample import Controls, Decoding
from jaxrl_llm.types import Finish, Prompts, Rollouts

Detokenize = Callable[[list[int]], Sequence[str]]
"""Texts of some tokens, with special tokens and without, in which stop texts are searched."""
# Replacement character of bytes that are no complete character, or not yet.
BROKEN = "\ufffd"
# Maximum number of bytes per character.
CHARACTER = 4
# Number of tokens that are tried as the first one to read.
NEAR = 16


class OutputBuffer:
    """Buffers of the rollouts of one generation."""

    def __init__(self, prompts: Prompts, samples: int, slots: int, decoding: Decoding):
        rows = len(prompts.length) * samples
        self.prompts, self.samples, self.vocab = prompts, samples, decoding.vocab
        self.finish = np.full(rows, int(Finish.LENGTH), np.int32)
        self.fill = {column.name: column.fill for column in recorded(decoding)} | {"tokens": decoding.vocab.pad}
        self.columns = {
            column.name: np.full(
                (rows, slots, *(decoding.max_kept_tokens for _ in column.dims)), self.fill[column.name], column.dtype
            )
            for column in recorded(decoding)
        }
        """Recorded columns."""

    def add(self, rows: Int[np.ndarray, " B"], slot: Int[np.ndarray, " B"], record: ChunkRecord, steps: int) -> None:
        """Store `steps` lines of a record.

        Args:
            rows: row of the buffers that each row of the record belongs to; negative: none.
            slot: completion slot of each row's first token.
            record: of a chunk.
            steps: number of lines.
        """
        step, b = np.nonzero(record.sampled[:steps] & (rows >= 0))
        row, place = rows[b], slot[b] + step
        for name, column in self.columns.items():
            column[row, place] = getattr(record, name)[step, b]
        ends = np.isin(record.tokens[step, b], self.vocab.eos)
        self.finish[row[ends]] = int(Finish.EOS)

    def stop(
        self, rows: Int[np.ndarray, " B"], seen: Int[np.ndarray, " B"], stop: tuple[str, ...], detokenize: Detokenize
    ) -> Bool[np.ndarray, " B"]:
        """End each row at the token that completes one of the stop texts.

        Args:
            rows: rows of the buffers; negative: none.
            seen: number of tokens of each row that were searched before.
            stop: the texts.
            detokenize: see `Detokenize`.

        Returns:
            True for each row that was ended.
        """
        return np.array(
            [r >= 0 and self._stop(int(r), int(n), stop, detokenize) for r, n in zip(rows, seen, strict=True)]
        )

    def _stop(self, row: int, seen: int, stop: tuple[str, ...], detokenize: Detokenize) -> bool:
        tokens = self.columns["tokens"][row, : self.columns["sampled"][row].sum()].tolist()
        end = first_end(tokens, seen, stop, detokenize)
        if end is None:
            return False
        for name, column in self.columns.items():
            column[row, end:] = self.fill[name]
        self.finish[row] = int(Finish.STOP)
        return True

    def rollouts(self, index: Int[np.ndarray, " p"], controls: Controls, version: int) -> Rollouts:
        """Rollouts of the prompts `index`; `controls` are those of all prompts."""
        rows = (index[:, None] * self.samples + np.arange(self.samples)).reshape(-1)
        columns = {name: column[rows] for name, column in self.columns.items()}
        sampled, min_new_tokens = columns["sampled"], np.repeat(controls.min_new_tokens[index], self.samples)[:, None]
        return Rollouts(
            prompts=jax.tree.map(lambda x: x[index], self.prompts),
            length=sampled.sum(axis=1, dtype=np.int32),
            temperature=np.repeat(controls.temperature[index], self.samples).astype(np.float32),
            version=np.where(sampled, np.int32(version), np.int32(0)),
            finish=self.finish[rows],
            # Decided by all prompts, so that the columns of a batch do not depend on its rows.
            eos_masked=sampled & (np.arange(sampled.shape[1]) < min_new_tokens)
            if np.any(controls.min_new_tokens)
            else None,
            **columns,
        )


def first_end(tokens: list[int], seen: int, stop: tuple[str, ...], detokenize: Detokenize) -> int | None:
    """Smallest n > `seen` for which the text of the first n tokens contains a stop text; None if there is none.

    A further token changes the text before it only in bytes that are no complete character. So a text without such bytes and
    without a stop text had no stop text when it was shorter.

    Args:
        tokens: of a row.
        seen: number of tokens that were searched before.
        stop: the stop texts.
        detokenize: see `Detokenize`.
    """
    is_monotonic = not any(BROKEN in s for s in stop)
    begin = _begin(tokens, seen, max(map(len, stop)), detokenize) if is_monotonic else 0

    def first(low: int, high: int) -> int | None:
        texts = detokenize(tokens[begin:high])
        contains = any(s in text for text in texts for s in stop)
        if high - low == 1:
            return high if contains else None
        if is_monotonic and not contains and not any(BROKEN in text for text in texts):
            return None
        middle = (low + high) // 2
        return first(low, middle) or first(middle, high)

    return first(seen, len(tokens)) if len(tokens) > seen else None


def _begin(tokens: list[int], seen: int, longest: int, detokenize: Detokenize) -> int:
    """Token from which the text can be read: early enough for a stop text that ends after `seen`, and at a token of several
    characters, whose text does not depend on the tokens before it. 0 if there is none nearby."""
    enough = CHARACTER * (longest + 1)
    back = longest
    while back < seen and min(map(len, detokenize(tokens[seen - back : seen]))) < enough:
        back *= 2
    for begin in range(seen - back, max(seen - back - NEAR, 0), -1):
        if all(len(text) > 1 and BROKEN not in text for text in detokenize(tokens[begin : begin + 1])):
            return begin
    return 0

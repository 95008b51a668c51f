"""Output buffer of a generation: NumPy arrays with one row per sample of each prompt, filled chunk by chunk."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Bool, Int

from jaxrl_llm.rollout.decode import DecodedChunk, recorded_columns
from jaxrl_llm.rollout.sample import Controls, Decoding
from jaxrl_llm.types import Finish, Prompts, Rollouts

TextDecoder = Callable[[list[int]], Sequence[str]]
"""Token ids to the texts searched for stop strings: with and without special tokens."""
# Replacement for bytes that are not, or not yet, a complete character.
BROKEN = "\ufffd"
# Maximum bytes per character.
CHARACTER = 4
# Maximum candidates for the first token to decode.
NEAR = 16


class OutputBuffer:
    """Rollouts being generated."""

    def __init__(self, prompts: Prompts, samples: int, slots: int, decoding: Decoding):
        rows = len(prompts.length) * samples
        self.prompts, self.samples, self.vocab = prompts, samples, decoding.vocab
        self.finish = np.full(rows, int(Finish.LENGTH), np.int32)
        self.fill = {column.name: column.fill for column in recorded_columns(decoding)} | {"tokens": decoding.vocab.pad}
        self.columns = {
            column.name: np.full(
                (rows, slots, *(decoding.max_kept_tokens for _ in column.dims)), self.fill[column.name], column.dtype
            )
            for column in recorded_columns(decoding)
        }

    def add(self, rows: Int[np.ndarray, " B"], slot: Int[np.ndarray, " B"], chunk: DecodedChunk, steps: int) -> None:
        """Store the first `steps` lines of a chunk.

        Args:
            rows: row of the buffer of each row of the chunk; negative: ignored.
            slot: completion slot of the chunk's first line.
            chunk: recorded columns.
            steps: lines that ran.
        """
        line, b = np.nonzero(chunk.sampled[:steps] & (rows >= 0))
        row, position = rows[b], slot[b] + line
        for name, column in self.columns.items():
            column[row, position] = getattr(chunk, name)[line, b]
        ends = np.isin(chunk.tokens[line, b], self.vocab.eos)
        self.finish[row[ends]] = int(Finish.EOS)

    def stop(
        self, rows: Int[np.ndarray, " B"], seen: Int[np.ndarray, " B"], stop: tuple[str, ...], texts_of: TextDecoder
    ) -> Bool[np.ndarray, " B"]:
        """End each row at the token that completes a stop string.

        Args:
            rows: rows of the buffer; negative: ignored.
            seen: number of leading tokens per row already searched without a match.
            stop: stop strings.
            texts_of: decodes token ids.

        Returns:
            True for the rows that were ended.
        """
        return np.array(
            [r >= 0 and self._stop(int(r), int(n), stop, texts_of) for r, n in zip(rows, seen, strict=True)]
        )

    def _stop(self, row: int, seen: int, stop: tuple[str, ...], texts_of: TextDecoder) -> bool:
        tokens = self.columns["tokens"][row, : self.columns["sampled"][row].sum()].tolist()
        end = first_end(tokens, seen, stop, texts_of)
        if end is None:
            return False
        for name, column in self.columns.items():
            column[row, end:] = self.fill[name]
        self.finish[row] = int(Finish.STOP)
        return True

    def rollouts(self, index: Int[np.ndarray, " p"], controls: Controls, version: int) -> Rollouts:
        """Return the rollouts of the prompts `index`; `controls` are those of all prompts."""
        rows = (index[:, None] * self.samples + np.arange(self.samples)).reshape(-1)
        of = {name: column[rows] for name, column in self.columns.items()}
        sampled, min_new_tokens = of["sampled"], np.repeat(controls.min_new_tokens[index], self.samples)[:, None]
        return Rollouts(
            prompts=jax.tree.map(lambda x: x[index], self.prompts),
            length=sampled.sum(axis=1, dtype=np.int32),
            temperature=np.repeat(controls.temperature[index], self.samples).astype(np.float32),
            version=np.where(sampled, np.int32(version), np.int32(0)),
            finish=self.finish[rows],
            # Decided over all prompts, so that the columns of a batch do not depend on its rows.
            eos_masked=sampled & (np.arange(sampled.shape[1]) < min_new_tokens)
            if np.any(controls.min_new_tokens)
            else None,
            **of,
        )


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

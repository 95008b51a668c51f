"""What a generation has brought in so far: NumPy arrays, a row for each sample of each prompt, filled segment by segment."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Bool, Int

from jaxrl_llm.rollout.decode import Record, recorded
from jaxrl_llm.rollout.sample import Controls, Decoding
from jaxrl_llm.types import Finish, Prompts, Rollouts

Spell = Callable[[list[int]], Sequence[str]]
"""The texts of some tokens in which stop texts are looked for: with special tokens, and without."""
# What stands for bytes that are no whole character, or not yet.
BROKEN = "\ufffd"
# Bytes of a character at most.
CHARACTER = 4
# Tokens that are tried as the first one to read.
NEAR = 16


class Harvest:
    """Rollouts in the making."""

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
        """What was recorded of each token."""

    def add(self, rows: Int[np.ndarray, " B"], slot: Int[np.ndarray, " B"], record: Record, steps: int) -> None:
        """`steps` lines of a record: column b belongs to row rows[b] (below 0: to nobody), from slot[b] on."""
        line, b = np.nonzero(record.sampled[:steps] & (rows >= 0))
        row, place = rows[b], slot[b] + line
        for name, column in self.columns.items():
            column[row, place] = getattr(record, name)[line, b]
        ends = np.isin(record.tokens[line, b], self.vocab.eos)
        self.finish[row[ends]] = int(Finish.EOS)

    def stop(
        self, rows: Int[np.ndarray, " B"], seen: Int[np.ndarray, " B"], stop: tuple[str, ...], spell: Spell
    ) -> Bool[np.ndarray, " B"]:
        """End each row with the token that completes one of the texts; its first `seen` tokens complete none. Returns which rows
        that were."""
        return np.array([r >= 0 and self._stop(int(r), int(n), stop, spell) for r, n in zip(rows, seen, strict=True)])

    def _stop(self, row: int, seen: int, stop: tuple[str, ...], spell: Spell) -> bool:
        tokens = self.columns["tokens"][row, : self.columns["sampled"][row].sum()].tolist()
        end = first_end(tokens, seen, stop, spell)
        if end is None:
            return False
        for name, column in self.columns.items():
            column[row, end:] = self.fill[name]
        self.finish[row] = int(Finish.STOP)
        return True

    def rollouts(self, index: Int[np.ndarray, " p"], controls: Controls, version: int) -> Rollouts:
        """Those of the prompts `index`; `controls` of all prompts."""
        rows = (index[:, None] * self.samples + np.arange(self.samples)).reshape(-1)
        of = {name: column[rows] for name, column in self.columns.items()}
        sampled, bars = of["sampled"], np.repeat(controls.min_new_tokens[index], self.samples)[:, None]
        return Rollouts(
            prompts=jax.tree.map(lambda x: x[index], self.prompts),
            length=sampled.sum(axis=1, dtype=np.int32),
            temperature=np.repeat(controls.temperature[index], self.samples).astype(np.float32),
            version=np.where(sampled, np.int32(version), np.int32(0)),
            finish=self.finish[rows],
            # Of all prompts: what a batch holds does not change with its rows.
            eos_masked=sampled & (np.arange(sampled.shape[1]) < bars) if np.any(controls.min_new_tokens) else None,
            **of,
        )


def first_end(tokens: list[int], seen: int, stop: tuple[str, ...], spell: Spell) -> int | None:
    """The smallest n above `seen` for which the text of the first n tokens holds a stop text; None where there is none.

    A further token changes the text before it where that has bytes that are no whole character, and nowhere else: a text without
    such, and without a stop text, had none when it was shorter either.
    """
    known = not any(BROKEN in s for s in stop)
    begin = _begin(tokens, seen, max(map(len, stop)), spell) if known else 0

    def first(low: int, high: int) -> int | None:
        texts = spell(tokens[begin:high])
        holds = any(s in text for text in texts for s in stop)
        if high - low == 1:
            return high if holds else None
        if known and not holds and not any(BROKEN in text for text in texts):
            return None
        middle = (low + high) // 2
        return first(low, middle) or first(middle, high)

    return first(seen, len(tokens)) if len(tokens) > seen else None


def _begin(tokens: list[int], seen: int, longest: int, spell: Spell) -> int:
    """Where the text may be read from: enough characters before `seen` for a stop text that is completed behind it, at a token of
    several characters, which is no part of one whatever stands before it. The beginning where that is not near."""
    enough = CHARACTER * (longest + 1)
    back = longest
    while back < seen and min(map(len, spell(tokens[seen - back : seen]))) < enough:
        back *= 2
    for begin in range(seen - back, max(seen - back - NEAR, 0), -1):
        if all(len(text) > 1 and BROKEN not in text for text in spell(tokens[begin : begin + 1])):
            return begin
    return 0

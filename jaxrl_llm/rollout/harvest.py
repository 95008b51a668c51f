"""What a generation has brought in so far: NumPy arrays, a row for each sample of each prompt, filled segment by segment."""

from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Bool, Int

from jaxrl_llm.rollout.decode import Record
from jaxrl_llm.rollout.sample import Controls, Vocabulary
from jaxrl_llm.types import Finish, Prompts, Rollouts

Text = Callable[[list[int]], str]


class Harvest:
    """Rollouts in the making."""

    def __init__(self, prompts: Prompts, samples: int, slots: int, vocab: Vocabulary):
        rows = len(prompts.length) * samples
        self.prompts, self.samples, self.vocab = prompts, samples, vocab
        self.tokens = np.full((rows, slots), vocab.pad, np.int32)
        self.sampled = np.zeros((rows, slots), bool)
        self.finish = np.full(rows, int(Finish.LENGTH), np.int32)
        self.columns: dict[str, np.ndarray] = {}

    def add(self, rows: Int[np.ndarray, " B"], slot: Int[np.ndarray, " B"], record: Record, steps: int) -> None:
        """`steps` lines of a record: column b belongs to row rows[b] (below 0: to nobody), from slot[b] on."""
        line, b = np.nonzero(record.sampled[:steps] & (rows >= 0))
        row, place = rows[b], slot[b] + line
        self.tokens[row, place] = record.token[line, b]
        self.sampled[row, place] = True
        for name in ("logprob", "entropy", "raw_logprob", "support", "overflow"):
            drawn = getattr(record, name)
            if drawn is not None:
                self._column(name, drawn)[row, place] = drawn[line, b]
        ends = np.isin(record.token[line, b], self.vocab.eos)
        self.finish[row[ends]] = int(Finish.EOS)

    def _column(self, name: str, like: np.ndarray) -> np.ndarray:
        if name not in self.columns:
            fill = -1 if name == "support" else 0
            self.columns[name] = np.full((*self.tokens.shape, *like.shape[2:]), fill, like.dtype)
        return self.columns[name]

    def stop(self, rows: Int[np.ndarray, " B"], stop: tuple[str, ...], text: Text) -> Bool[np.ndarray, " B"]:
        """End each row with the token that completes one of the texts. Returns which rows that were."""
        return np.array([row >= 0 and self._stop(int(row), stop, text) for row in rows], bool)

    def _stop(self, row: int, stop: tuple[str, ...], text: Text) -> bool:
        tokens = self.tokens[row, : self.sampled[row].sum()].tolist()

        def holds(n: int) -> bool:
            so_far = text(tokens[:n])
            return any(s in so_far for s in stop)

        low, high = 0, len(tokens)
        if not holds(high):
            return False
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if holds(middle) else (middle, high)
        self.tokens[row, high:] = self.vocab.pad
        self.sampled[row, high:] = False
        for name, column in self.columns.items():
            column[row, high:] = -1 if name == "support" else 0
        self.finish[row] = int(Finish.CONTROL)
        return True

    def rollouts(self, index: Int[np.ndarray, " p"], controls: Controls, version: int) -> Rollouts:
        """Those of the prompts `index`; `controls` of all prompts."""
        rows = (index[:, None] * self.samples + np.arange(self.samples)).reshape(-1)
        sampled, of = self.sampled[rows], {name: column[rows] for name, column in self.columns.items()}
        bars = np.repeat(controls.min_new_tokens[index], self.samples)[:, None]
        return Rollouts(
            prompts=jax.tree.map(lambda x: x[index], self.prompts),
            tokens=self.tokens[rows],
            length=sampled.sum(axis=1, dtype=np.int32),
            sampled=sampled,
            behavior_logprobs=of["logprob"],
            entropy=of["entropy"],
            temperature=np.repeat(controls.temperature[index], self.samples).astype(np.float32),
            version=np.where(sampled, np.int32(version), np.int32(0)),
            finish=self.finish[rows],
            support=of.get("support"),
            raw_logprobs=of.get("raw_logprob"),
            # Of all prompts: what a batch holds does not change with its rows.
            barred=sampled & (np.arange(sampled.shape[1]) < bars) if np.any(controls.min_new_tokens) else None,
        )

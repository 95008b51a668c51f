"""The fixed sizes of the active batch, its KV cache and prompts, for which the engine's programs are compiled."""

from dataclasses import dataclass

import numpy as np

from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.rollout.config import NoTree, RolloutConfig

# Minimum rows after compaction: with fewer, matrix products round differently, and reading the weights dominates anyway.
MIN_ROWS = 8
# Maximum halvings of the active batch: each size needs another program per window.
HALVINGS = 2
# Bytes of a layer's KV cache that fit into a CPU's caches: attention over 4 times as many took 8 times as long.
CPU_CACHE = 2**22
# Shortest bucket of prompt lengths; the others are this times 4, 16, ...
MIN_PROMPT = 128
# Tokens of known rows that one pass reads, about.
KNOWN_TOKENS = 2**15


@dataclass(frozen=True)
class BatchSizes:
    """The fixed sizes for which programs are compiled, over all shards."""

    shards: int
    prompts: tuple[int, ...]
    """Possible numbers of prompts in the active batch or in one prefill, largest first."""
    rows_per_group: int
    """F, rows per sequence group."""
    groups_per_prompt: int
    windows: tuple[int, ...]
    prompt_slots: tuple[int, ...]
    """Possible lengths of prompts, and of trunks behind them."""
    row_slots: tuple[int, ...]
    """Possible lengths of prompt and known tokens of a row that is read again."""
    trunk_slots: int = 0
    """Slots of the prompt cache for completion tokens that several rows begin with."""

    def groups(self, prompts: int) -> int:
        """Return the number of sequence groups of `prompts` prompts."""
        return prompts * self.groups_per_prompt

    def known_rows(self, slots: int) -> int:
        """Return the number of known rows of `slots` tokens that one pass reads: at most those of the active batch, at least as
        many as a prefill has prompts."""
        most = self.groups(self.prompts[0]) * self.rows_per_group
        return min(most, max(self.prompts[0], KNOWN_TOKENS // slots // self.shards * self.shards))

    @property
    def group_counts(self) -> tuple[int, ...]:
        """Possible numbers of sequence groups in the active batch, largest first."""
        return tuple(map(self.groups, self.prompts))

    def for_branches(self, lanes: int, samples: int, slots: int) -> "BatchSizes":
        """Return the sizes for rows whose prompt caches hold trunks too.

        Args:
            lanes: rows per trunk that are decoded together.
            samples: G, rows per prompt.
            slots: C, completion slots.
        """
        trunks = -(-self.prompts[0] * samples // (self.shards * lanes))
        prompts = tuple(n * self.shards for n in halved(trunks, lanes))
        # A trunk is read for its rows alone, so its padding costs more than another program.
        trunk = doubled(self.row_slots[0], self.row_slots[-1], 2)
        return BatchSizes(self.shards, prompts, lanes, 1, self.windows, trunk, self.row_slots, trunk_slots=slots)

    @staticmethod
    def of(cfg: RolloutConfig, window: int, prompt_slots: int, max_window: int, shards: int) -> "BatchSizes":
        """Derive the sizes from the config.

        Args:
            cfg: the rollouts.
            window: initial slots of the completions' KV cache.
            prompt_slots: maximum prompt length.
            max_window: largest attention window of the model's layers.
            shards: row shards.
        """
        engine, samples = cfg.engine, cfg.samples if isinstance(cfg.tree, NoTree) else cfg.tree.roots
        rows_per_group = min(cfg.engine.rows_per_prompt_cache or samples, samples)
        halves = halved(-(-min(engine.max_concurrent_prompts or cfg.prompts, cfg.prompts) // shards), samples)
        most = min(cfg.max_new_tokens, max_window)
        windows = doubled(min(window, most), most, 2)
        prompts, rows = (doubled(min(MIN_PROMPT, n), n, 4) for n in (prompt_slots, prompt_slots + cfg.max_new_tokens))
        batches, per_prompt = tuple(n * shards for n in halves), -(-samples // rows_per_group)
        return BatchSizes(shards, batches, rows_per_group, per_prompt, windows, prompts, rows)


def halved(most: int, rows: int) -> list[int]:
    """Return most, most / 2, ..., as far as compaction goes; `rows`: of each."""
    found = [most]
    while len(found) <= HALVINGS and found[-1] > 1 and -(-found[-1] // 2) * rows >= MIN_ROWS:
        found.append(-(-found[-1] // 2))
    return found


def doubled(least: int, most: int, factor: int) -> tuple[int, ...]:
    """Return least, least * factor, ..., ending with `most`."""
    found = [least]
    while found[-1] < most:
        found.append(min(found[-1] * factor, most))
    return tuple(found)


def smallest(sizes: tuple[int, ...], want: int) -> int:
    """Return the smallest of `sizes` that is at least `want`."""
    return min(size for size in sizes if size >= want)


def first_window(cfg: RolloutConfig, model: ModelConfig, layout: Layout) -> int:
    """Return the initial window: 128 slots; on a CPU, what keeps a layer's KV cache within the CPU's caches, at least 64."""
    if not layout.on_cpu:
        return 128
    rows = min(cfg.engine.max_concurrent_prompts or cfg.prompts, cfg.prompts) * cfg.samples
    slot = 2 * rows * model.kv_heads * model.head_dim * np.dtype(np.float32).itemsize
    return 1 << max(CPU_CACHE // slot, 64).bit_length() - 1

"""The few sizes of batches and caches that an engine's programs are compiled for."""

from dataclasses import dataclass

import numpy as np

from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.rollout.config import RolloutConfig

# Least rows per device after compaction: with fewer, products round differently, and reading the weights takes all the time.
LEAST_ROWS = 8
# Maximum number of halvings of the active batch: each size adds one program per window.
HALVINGS = 2
# Bytes of a layer's keys and values that fit into a CPU's caches: attention over 4 times as many took 8 times as long.
CPU_CACHE = 2**22
# The shortest bucket of prompt lengths; the others are this times 4, 16, ...
LEAST_PROMPT = 128


@dataclass(frozen=True)
class Sizes:
    """Sizes that programs are compiled for, over all shards."""

    shards: int
    prompts: tuple[int, ...]
    """Prompts of an active batch or of an admission, largest first."""
    rows_per_group: int
    """F, rows per sequence group."""
    groups_per_prompt: int
    windows: tuple[int, ...]
    prompt_slots: tuple[int, ...]

    def groups(self, prompts: int) -> int:
        """Sequence groups of so many prompts."""
        return prompts * self.groups_per_prompt

    @staticmethod
    def of(cfg: RolloutConfig, window: int, prompt_slots: int, attention_window: int, shards: int) -> "Sizes":
        engine, rows = cfg.engine, cfg.engine.rows_per_prompt_cache or cfg.samples
        batch = -(-min(engine.max_concurrent_prompts or cfg.prompts, cfg.prompts) // shards)
        halves = [batch]
        while len(halves) <= HALVINGS and halves[-1] > 1 and -(-halves[-1] // 2) * cfg.samples >= LEAST_ROWS:
            halves.append(-(-halves[-1] // 2))
        most = min(cfg.max_new_tokens, attention_window)
        windows = doubled(min(window, most), most, 2)
        slots = doubled(min(LEAST_PROMPT, prompt_slots), prompt_slots, 4)
        return Sizes(shards, tuple(n * shards for n in halves), rows, cfg.samples // rows, windows, slots)


def doubled(least: int, most: int, factor: int) -> tuple[int, ...]:
    """least, least * factor, ... and `most` as the last one."""
    found = [least]
    while found[-1] < most:
        found.append(min(found[-1] * factor, most))
    return tuple(found)


def smallest(sizes: tuple[int, ...], want: int) -> int:
    return min(size for size in sizes if size >= want)


def first_window(cfg: RolloutConfig, model: ModelConfig, layout: Layout) -> int:
    """First window of the suffix cache: 128 slots; on a CPU as many, at least 32, as let a layer's keys and values fit into its
    caches."""
    if not layout.on_cpu:
        return 128
    rows = min(cfg.engine.max_concurrent_prompts or cfg.prompts, cfg.prompts) * cfg.samples
    slot = 2 * rows * model.kv_heads * model.head_dim * np.dtype(np.float32).itemsize
    return 1 << max(CPU_CACHE // slot, 32).bit_length() - 1

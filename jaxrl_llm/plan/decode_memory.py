"""Bytes per chip during decoding, from shapes and shardings alone: without compiling, on machines without the chips.

Policy, KV caches and recorded columns are exact. Working memory of the compiler is an estimate: the widest intermediate of a step,
plus matrices that a TPU transposes before the loop and then holds twice.
"""

from typing import NamedTuple

import jax

from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.perf.work import bytes_per_device
from jaxrl_llm.rollout.decode import empty_chunk
from jaxrl_llm.rollout.programs import Programs
from jaxrl_llm.types import PyTree

# Numbers per row of a TPU memory tile.
TILE = 128


class DecodeMemory(NamedTuple):
    """Bytes per chip while a chunk is decoded."""

    policy: int
    prompt: int
    """Prompt KV cache."""
    suffix: int
    """KV cache of the completions, counted once because it is donated."""
    chunk: int
    """Recorded columns: a chip's own rows in the loop, then all rows on every chip."""
    working: int
    """Estimated working memory of the compiler."""

    @property
    def total(self) -> int:
        return sum(self)


def decode_memory(
    programs: Programs, params: PyTree, groups: int, window: int, controlled: bool = False
) -> DecodeMemory:
    """Return the memory of decoding one chunk.

    Args:
        programs: programs of the engine.
        params: parameters of the policy, as arrays or as `jax.ShapeDtypeStruct`s with shardings.
        groups: sequence groups in the active batch.
        window: slots of the completions' KV cache.
        controlled: rows have controls, whose columns are recorded.
    """
    rows, cfg, layout = groups * programs.rows_per_group, programs.decoding.model, programs.decoding.layout
    prompt, suffix = programs.caches(groups, window)
    chunk = jax.eval_shape(lambda: empty_chunk(programs.decoding, rows, controlled))
    recorded = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(chunk))
    share = rows // layout.size("rows")
    slots = window + max(x.shape[2] for x in jax.tree.leaves(prompt))
    return DecodeMemory(
        policy=bytes_per_device(params),
        prompt=bytes_per_device(prompt),
        suffix=bytes_per_device(suffix),
        chunk=recorded + recorded // layout.size("rows"),
        working=4 * share * _widest(cfg, layout, slots) + _transposed(params, cfg, layout),
    )


def _widest(cfg: ModelConfig, layout: Layout, slots: int) -> int:
    """Return the size of the largest intermediate per row: logits, attention scores of a layer, or gate and up of a layer."""
    return max(
        cfg.vocab_size // layout.size("vocab"),
        cfg.heads // layout.size("heads") * slots,
        2 * cfg.d_mlp * max(cfg.experts_per_token, 1) // layout.size("mlp"),
    )


def _transposed(params: PyTree, cfg: ModelConfig, layout: Layout) -> int:
    """Return bytes of `qkv`, and of experts padded to whole tiles if a chip's share is not a multiple of the tile width."""
    found = bytes_per_device([layer["qkv"] for layer in params["layers"]])
    width = cfg.d_mlp // layout.size("mlp")
    if cfg.experts and width % TILE:
        found += bytes_per_device([layer["gate_up"] for layer in params["layers"]]) // width * (width + -width % TILE)
    return found

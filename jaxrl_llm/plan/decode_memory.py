"""Bytes per chip while decoding, from shapes and shardings alone: without compiling, on machines without the chips.

The policy, both caches and the record are exact. What the compiler needs beside them is an allowance: the widest array of a step,
and matrices that a TPU reorders before the loop, and then holds twice.
"""

from typing import NamedTuple

import jax

from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.perf.work import bytes_per_device
from jaxrl_llm.rollout.decode import empty_record
from jaxrl_llm.rollout.programs import Programs
from jaxrl_llm.types import PyTree

# Numbers per row of a tile in a TPU's memory.
TILE = 128


class DecodeMemory(NamedTuple):
    """Bytes of one chip while a chunk is decoded."""

    policy: int
    prompt: int
    """Prompt cache."""
    suffix: int
    """The rows' own cache, which is donated, so that it exists once."""
    record: int
    """A chip's own part in the loop, and afterwards all of it on every chip."""
    working: int
    """Allowance for the compiler."""

    @property
    def total(self) -> int:
        return sum(self)


def decode_memory(programs: Programs, params: PyTree, groups: int, window: int) -> DecodeMemory:
    """Bytes per chip while a chunk is decoded.

    Args:
        programs: of the engine.
        params: the policy's, as arrays or as `jax.ShapeDtypeStruct`s with shardings.
        groups: sequence groups of the active batch.
        window: slots of the suffix cache.
    """
    rows, cfg, layout = groups * programs.rows_per_group, programs.decoding.model, programs.decoding.layout
    prompt, suffix = programs.caches(groups, window)
    record = jax.eval_shape(lambda: empty_record(programs.decoding, rows))
    lines = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(record))
    share = rows // layout.size("rows")
    slots = window + max(x.shape[2] for x in jax.tree.leaves(prompt))
    return DecodeMemory(
        policy=bytes_per_device(params),
        prompt=bytes_per_device(prompt),
        suffix=bytes_per_device(suffix),
        record=lines + lines // layout.size("rows"),
        working=4 * share * _widest(cfg, layout, slots) + _relaid(params, cfg, layout),
    )


def _widest(cfg: ModelConfig, layout: Layout, slots: int) -> int:
    """Most numbers of one array that a step makes per row: logits, scores of a layer, or gate and up of a layer."""
    return max(
        cfg.vocab_size // layout.size("vocab"),
        cfg.heads // layout.size("heads") * slots,
        2 * cfg.d_mlp * max(cfg.experts_per_token, 1) // layout.size("mlp"),
    )


def _relaid(params: PyTree, cfg: ModelConfig, layout: Layout) -> int:
    """Bytes of matrices that a TPU reorders: `qkv`, and experts whose part on a chip is not a whole number of tiles wide."""
    found = bytes_per_device([layer["qkv"] for layer in params["layers"]])
    width = cfg.d_mlp // layout.size("mlp")
    if cfg.experts and width % TILE:
        found += bytes_per_device([layer["gate_up"] for layer in params["layers"]]) // width * (width + -width % TILE)
    return found

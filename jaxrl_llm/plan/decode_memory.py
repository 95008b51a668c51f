"""Bytes a chip holds while it decodes, from shapes and shardings alone: before anything is compiled, on machines without the chips.

What counts is exact: the policy, both caches and what is written down. What a compiler needs beside that is an allowance: the
widest thing that a step makes, and matrices that a TPU puts in another order before the loop, and then holds twice.
"""

from typing import NamedTuple

import jax

from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.perf.work import held
from jaxrl_llm.rollout.decode import blank_record
from jaxrl_llm.rollout.programs import Programs
from jaxrl_llm.types import PyTree

# Numbers side by side in a tile of a TPU's memory.
TILE = 128


class Flight(NamedTuple):
    """Bytes of one chip while a segment runs."""

    policy: int
    prompt: int
    """The prompt cache."""
    suffix: int
    """The rows' own cache, donated: the one that a segment returns is the one that it was given."""
    record: int
    """Each chip's own lines, in the loop; then all lines on every chip."""
    working: int
    """The allowance."""

    @property
    def total(self) -> int:
        return sum(self)


def flight(programs: Programs, params: PyTree, units: int, window: int) -> Flight:
    """Of so many units in a window of so many slots.

    `params`: the policy's, as arrays or as `jax.ShapeDtypeStruct`s with shardings.
    """
    rows, cfg, layout = units * programs.each, programs.decoding.model, programs.decoding.layout
    prompt, suffix = programs.caches(units, window)
    record = jax.eval_shape(lambda: blank_record(programs.decoding, rows))
    lines = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(record))
    share = rows // layout.size("rows")
    slots = window + max(x.shape[2] for x in jax.tree.leaves(prompt))
    return Flight(
        policy=held(params),
        prompt=held(prompt),
        suffix=held(suffix),
        record=lines + lines // layout.size("rows"),
        working=4 * share * _widest(cfg, layout, slots) + _relaid(params, cfg, layout),
    )


def _widest(cfg: ModelConfig, layout: Layout, slots: int) -> int:
    """Numbers that a step makes for one row at a time, at most: logits, scores of a layer, or gate and up of a layer."""
    return max(
        cfg.vocab_size // layout.size("vocab"),
        cfg.heads // layout.size("heads") * slots,
        2 * cfg.d_mlp * max(cfg.experts_per_token, 1) // layout.size("mlp"),
    )


def _relaid(params: PyTree, cfg: ModelConfig, layout: Layout) -> int:
    """`qkv`; and experts of which a chip's share is not whole tiles wide, filled up to whole ones."""
    found = held([layer["qkv"] for layer in params["layers"]])
    width = cfg.d_mlp // layout.size("mlp")
    if cfg.experts and width % TILE:
        found += held([layer["gate_up"] for layer in params["layers"]]) // width * (width + -width % TILE)
    return found

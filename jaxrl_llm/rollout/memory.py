"""Bytes a chip holds while it decodes, from shapes and shardings alone: before anything is compiled, on machines without the chips.

What counts is exact: the policy, both caches and what is written down. What the compiler needs beside that is an allowance: one
array of the widest thing that a step makes, and the policy's `qkv` once more, which a TPU re-lays for the loop.
"""

import math
from typing import NamedTuple

import jax

from jaxrl_llm.model import cache
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.rollout.decode import Shape, blank_record
from jaxrl_llm.types import PyTree


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


def flight(
    params: PyTree, units: int, each: int, slots: int, window: int, shape: Shape, cfg: ModelConfig, layout: Layout
) -> Flight:  # fmt: skip
    """Of `units` prompts of `slots` slots, `each` rows a prompt, in a window of so many slots.

    `params`: the policy's, as arrays or as `jax.ShapeDtypeStruct`s with shardings.
    """
    rows = units * each
    record = jax.eval_shape(lambda: blank_record(shape, rows, layout))
    lines = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(record))
    return Flight(
        policy=held(params),
        prompt=held(placed(lambda: cache.empty_prompt(cfg, units, slots, layout), layout)),
        suffix=held(placed(lambda: cache.empty_suffix(cfg, rows, window, layout), layout)),
        record=lines + lines // layout.size("rows"),
        working=_working(params, rows, slots + window, cfg, layout),
    )


def placed(make, layout: Layout) -> PyTree:
    """The caches that `make()` would return, described."""
    shapes = jax.eval_shape(make)
    where = cache.shardings(shapes, layout)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)


def held(tree: PyTree) -> int:
    """Bytes that one chip holds of arrays with shardings; not counting what a chip's tiles leave empty."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _working(params: PyTree, rows: int, slots: int, cfg: ModelConfig, layout: Layout) -> int:
    """f32: logits, scores of one layer, or gate and up of one layer; in a chip's share of the rows."""
    widest = max(
        cfg.vocab_size // layout.size("vocab"),
        cfg.heads // layout.size("heads") * slots,
        2 * cfg.d_mlp * max(cfg.experts_per_token, 1) // layout.size("mlp"),
    )
    return 4 * rows // layout.size("rows") * widest + held([layer["qkv"] for layer in params["layers"]])

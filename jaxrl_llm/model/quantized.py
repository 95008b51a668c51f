"""Matrices in 8 bits, for policies: what is quantized, how, and the product with one. There is no gradient: the trainer's stay f32.

    q = round(w / scale)     scale = max |w| / largest     one scale an output channel, symmetric: w is q scale, within scale / 2

`largest` is 127 in int8 and 448 in float8_e4m3fn. fp8 rounds relatively instead: w within 2^-4 |w|, or scale 2^-10 near 0.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.params import ParamSpec
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.types import PyTree

DTYPES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
LARGEST = {jnp.dtype(jnp.int8): 127.0, jnp.dtype(jnp.float8_e4m3fn): 448.0}
# Of each matrix that is quantized: the dims that a product sums over, in one layer's array. Norms, biases and the router stay:
# they are small, and a router that errs sends a token elsewhere.
INNER = {"qkv": (0,), "out": (0, 1, 2), "gate_up": (1,), "down": (0,)}


class Quantized(flax.struct.PyTreeNode):
    """A matrix as q scale. The scale keeps the dims that a product sums over, as 1: so both are transposed alike."""

    q: Array
    """int8 or float8_e4m3fn."""
    scale: Array
    """f32."""
    groups: int = flax.struct.field(pytree_node=False, default=1)
    """Equal parts of the summed dims; a row of activations has a scale in each. See `product`."""


def quantize(w: Float[Array, "..."], inner: tuple[int, ...], dtype: jnp.dtype, groups: int = 1) -> Quantized:
    """Scales are the largest |w| over the dims `inner`; a channel of zeros has scale 1."""
    q, scale = _round(w.astype(jnp.float32), inner, dtype)
    return Quantized(q, scale, groups)


def dequantize(w: Quantized) -> Float[Array, "..."]:
    """f32."""
    return w.q.astype(jnp.float32) * w.scale


def look_up(table: Array | Quantized, index: Int[Array, "B ..."], dtype: jnp.dtype, layout: Layout) -> Array:
    """Rows of an embedding.

    Of a quantized one each shard of the vocabulary dequantizes those that it has, and one sum brings them together: left to the
    compiler, numbers and scales are fetched apart.
    """
    if not isinstance(table, Quantized):
        return jnp.take(table, index, axis=0).astype(dtype)
    axis = layout.rules["vocab"]

    def own(q: Array, scale: Array, index: Array) -> Array:
        place = index - lax.axis_index(axis) * len(q)
        mine = (place >= 0) & (place < len(q))
        place = jnp.where(mine, place, 0)
        rows = dequantize(Quantized(q[place], scale[place]))
        return lax.psum(jnp.where(mine[..., None], rows, 0.0).astype(dtype), axis)

    vocab, rows = layout.sharding(("vocab", None)).spec, layout.sharding(("rows",)).spec
    on_mesh = jax.shard_map(own, mesh=layout.mesh, in_specs=(vocab, vocab, rows), out_specs=rows)
    return on_mesh(table.q, table.scale, index)


def product(x: Float[Array, "..."], w: Quantized, inner: int) -> Float[Array, "..."]:
    """Sum over the last `inner` dims of `x` and the first `inner` of `w`, f32, multiplied in the 8 bits of `w`.

    Activations are rounded as the weights are, one scale a row and group; int8 adds up in int32, exactly. Where a mesh splits the
    summed dims, a shard holds whole groups: it finds their scales alone and dequantizes before it adds, so one all-reduce is all
    that crosses. Groups do not depend on the mesh, nor do the numbers.
    """
    rows, outputs = x.shape[: x.ndim - inner], w.q.shape[inner:]
    x = x.astype(jnp.float32).reshape(*rows, w.groups, -1)
    q, scale = _round(x, (-1,), w.q.dtype)
    sums = jnp.int32 if w.q.dtype == jnp.int8 else jnp.float32
    matrices, w_scale = w.q.reshape(w.groups, -1, *outputs), w.scale.reshape(outputs)
    if w.groups == 1:
        dims = (((len(rows),), (0,)), ((), ()))
        added = lax.dot_general(q[..., 0, :], matrices[0], dims, preferred_element_type=sums).astype(jnp.float32)
        return added * scale.reshape(*rows, *(1,) * len(outputs)) * w_scale
    dims = (((len(rows) + 1,), (1,)), ((len(rows),), (0,)))
    parts = lax.dot_general(q, matrices, dims, preferred_element_type=sums).astype(jnp.float32)
    scale = jnp.moveaxis(scale[..., 0], -1, 0)
    # All scaling ahead of the sum: what follows it is the caller's cast alone, which a TPU does before it reduces over the mesh.
    return jnp.sum(parts * scale.reshape(*scale.shape, *(1,) * len(outputs)) * w_scale, axis=0)


def _round(w: Array, inner: tuple[int, ...], dtype: jnp.dtype) -> tuple[Array, Array]:
    largest = LARGEST[jnp.dtype(dtype)]
    most = jnp.max(jnp.abs(w), axis=inner, keepdims=True)
    scale = jnp.where(most > 0, most / largest, 1.0)
    # w / scale may round to just above `largest`, which float8 would make NaN of.
    scaled = jnp.clip(w / scale, -largest, largest)
    return (jnp.round(scaled) if jnp.issubdtype(dtype, jnp.integer) else scaled).astype(dtype), scale


def map_matrices(
    matrix: Callable[[Any, tuple[int, ...], int], Any], other: Callable[[Any], Any], tree: PyTree, cfg: ModelConfig
) -> PyTree:
    """`matrix(leaf, inner, groups)` of what is quantized, `other(leaf)` elsewhere; a tree like `specs(cfg)`, layers stacked.

    The head is quantized: it is a quarter and more of what a small model reads in a step. Where it is tied it is the embedding,
    with a scale a token, which serves the look-up as well. An embedding of its own is not: a step reads a few rows of it.
    """
    head = "embed" if cfg.tied_head else "head"
    top = {key: matrix(leaf, (1,), 1) if key == head else other(leaf) for key, leaf in tree.items() if key != "layers"}

    def of_layer(key: str, leaf: Any) -> Any:
        if key not in INNER:
            return other(leaf)
        # What `tensor` splits in a summed dim it splits in kv heads too: so a shard holds whole groups.
        groups = math.gcd(leaf.shape[1], cfg.kv_heads) if key in ("out", "down") else 1
        return matrix(leaf, tuple(axis + 1 for axis in INNER[key]), groups)

    return top | {"layers": {key: of_layer(key, leaf) for key, leaf in tree["layers"].items()}}


def quantized_specs(tree: PyTree, cfg: ModelConfig) -> PyTree:
    """`specs(cfg)` of a policy in 8 bits: two a matrix, the scale split like its outputs."""

    def matrix(spec: ParamSpec, inner: tuple[int, ...], groups: int) -> Quantized:
        keep = [i not in inner for i in range(len(spec.shape))]
        shape = tuple(n if kept else 1 for n, kept in zip(spec.shape, keep, strict=True))
        axes = tuple(axis if kept else None for axis, kept in zip(spec.axes, keep, strict=True))
        return Quantized(spec, ParamSpec(shape, axes, None), groups)

    return map_matrices(matrix, lambda spec: spec, tree, cfg)


def problems(cfg: ModelConfig, weights: str, device: jax.Device) -> list[str]:
    """What stands against a policy with such weights on such a device, in words."""
    if weights == "compute":
        return []
    found = []
    if cfg.experts:
        found.append(f"rollout.engine.weights: got {weights}, want compute for a model with experts ({cfg.experts})")
    if weights == "fp8" and not _multiplies_fp8(device):
        works = "a GPU of compute capability 8.9 or later (Ada, Hopper)"
        found.append(f"rollout.engine.weights: got fp8 on {device.device_kind}, want {works}; int8 works here")
    return found


def _multiplies_fp8(device: jax.Device) -> bool:
    if device.platform != "gpu":
        return False
    major, _, minor = str(getattr(device, "compute_capability", "0.0")).partition(".")
    return (int(major), int(minor)) >= (8, 9)

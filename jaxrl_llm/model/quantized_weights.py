"""8-bit weight matrices of policies: quantization, and the product with quantized activations. No gradient: the trainer uses f32.

    q = round(w / scale)     scale = max |w| / largest     one scale per output channel, symmetric: |w - q scale| <= scale / 2

`largest` is 127 in int8 and 448 in float8_e4m3fn. fp8 has a relative error instead: at most 2^-4 |w|, or scale 2^-10 near 0.
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
# Quantized matrices, with the dimensions that a product sums over (in one layer's array). Norms, biases and the router are not
# quantized: they are small, and rounding the router would change the experts of tokens.
INNER = {"qkv": (0,), "out": (0, 1, 2), "gate_up": (1,), "down": (0,)}


class Quantized(flax.struct.PyTreeNode):
    """A matrix as q * scale. The summed dimensions have size 1 in `scale`, so both are transposed in the same way."""

    q: Array
    """int8 or float8_e4m3fn."""
    scale: Array
    """f32."""
    groups: int = flax.struct.field(pytree_node=False, default=1)
    """Number of equal parts of the summed dimensions; activations have one scale per row and part. See `product`."""


def quantize(w: Float[Array, "..."], inner: tuple[int, ...], dtype: jnp.dtype, groups: int = 1) -> Quantized:
    """Quantize `w`.

    Args:
        w: the matrix.
        inner: dimensions that a product sums over; scales come from the largest |w| over them. Channels of zeros have scale 1.
        dtype: int8 or float8_e4m3fn.
        groups: as in `Quantized`.
    """
    q, scale = _round(w.astype(jnp.float32), inner, dtype)
    return Quantized(q, scale, groups)


def dequantize(w: Quantized) -> Float[Array, "..."]:
    """The matrix q * scale, f32."""
    return w.q.astype(jnp.float32) * w.scale


def look_up(table: Array | Quantized, index: Int[Array, "B ..."], dtype: jnp.dtype, layout: Layout) -> Array:
    """Rows of an embedding.

    A quantized table, and on GPUs one in another dtype: each vocabulary shard reads and casts its own rows, and one sum combines
    them. The compiler alone would gather numbers and scales separately, or send rows in the dtype of the table.

    Args:
        table: the embedding [V D].
        index: token ids.
        dtype: dtype of the result.
        layout: the table's layout.
    """
    if not isinstance(table, Quantized) and not (layout.on_gpu and table.dtype != dtype):
        return jnp.take(table, index, axis=0).astype(dtype)
    axis = layout.rules["vocab"]

    def own(table: Array | Quantized, index: Array) -> Array:
        size = len(jax.tree.leaves(table)[0])
        position = index - lax.axis_index(axis) * size
        mine = (position >= 0) & (position < size)
        rows = jax.tree.map(lambda x: x[jnp.where(mine, position, 0)], table)
        rows = dequantize(rows) if isinstance(rows, Quantized) else rows
        return lax.psum(jnp.where(mine[..., None], rows, 0.0).astype(dtype), axis)

    columns = jax.tree.map(lambda x: layout.sharding(("vocab", "embed")[: x.ndim]).spec, table)
    beside = layout.sharding(("rows_beside_embed",)).spec
    out = layout.sharding(("rows_beside_embed", *(None,) * (index.ndim - 1), "embed")).spec
    return jax.shard_map(own, mesh=layout.mesh, in_specs=(columns, beside), out_specs=out)(table, index)


def product(x: Float[Array, "..."], w: Quantized, inner: int, dtype: jnp.dtype) -> Float[Array, "..."]:
    """Sum over the last `inner` dimensions of `x` and the first `inner` of `w`, multiplied in the 8-bit dtype of `w`, as `dtype`.

    Activations are quantized like weights, with one scale per row and group; int8 products are summed exactly, in int32. If the
    mesh splits the summed dimensions, each shard has whole groups: it computes their scales locally and dequantizes before the
    sum, so one all-reduce suffices. Groups do not depend on the mesh, and neither do the results.
    """
    rows, outputs = x.shape[: x.ndim - inner], w.q.shape[inner:]
    x = x.astype(jnp.float32).reshape(*rows, w.groups, -1)
    q, scale = _round(x, (-1,), w.q.dtype)
    sums = jnp.int32 if w.q.dtype == jnp.int8 else jnp.float32
    matrices, w_scale = w.q.reshape(w.groups, -1, *outputs), w.scale.reshape(outputs)
    if w.groups == 1:
        dims = (((len(rows),), (0,)), ((), ()))
        added = lax.dot_general(q[..., 0, :], matrices[0], dims, preferred_element_type=sums).astype(jnp.float32)
        return (added * scale.reshape(*rows, *(1,) * len(outputs)) * w_scale).astype(dtype)
    dims = (((len(rows) + 1,), (1,)), ((len(rows),), (0,)))
    parts = lax.dot_general(q, matrices, dims, preferred_element_type=sums).astype(jnp.float32)
    scale = jnp.moveaxis(scale[..., 0], -1, 0)
    # Scale before the sum: only the cast follows it, which a TPU moves before the reduction over the mesh. A GPU sends f32: a cast
    # before would round each group of a device, not their sum.
    return jnp.sum(parts * scale.reshape(*scale.shape, *(1,) * len(outputs)) * w_scale, axis=0).astype(dtype)


def _round(w: Array, inner: tuple[int, ...], dtype: jnp.dtype) -> tuple[Array, Array]:
    largest = LARGEST[jnp.dtype(dtype)]
    most = jnp.max(jnp.abs(w), axis=inner, keepdims=True)
    scale = jnp.where(most > 0, most / largest, 1.0)
    # w / scale may round to just above `largest`, which becomes NaN in float8.
    scaled = jnp.clip(w / scale, -largest, largest)
    return (jnp.round(scaled) if jnp.issubdtype(dtype, jnp.integer) else scaled).astype(dtype), scale


def map_matrices(
    matrix: Callable[[Any, tuple[int, ...], int], Any], other: Callable[[Any], Any], tree: PyTree, cfg: ModelConfig
) -> PyTree:
    """Map over a parameter tree, with separate functions for quantized matrices and other leaves.

    The head is quantized: it is a quarter or more of the bytes a small model reads per decode step. If it is tied, it is the
    embedding, with one scale per token, which also fits the look-up. An untied embedding is not quantized: a step reads few rows.

    Args:
        matrix: function of (leaf, summed dimensions, groups) for quantized matrices.
        other: function of all other leaves.
        tree: a tree like `specs(cfg)`, layers stacked.
        cfg: the model.
    """
    head = "embed" if cfg.tied_head else "head"
    top = {key: matrix(leaf, (1,), 1) if key == head else other(leaf) for key, leaf in tree.items() if key != "layers"}

    def of_layer(key: str, leaf: Any) -> Any:
        if key not in INNER:
            return other(leaf)
        # Summed dimensions that `tensor` splits are split by kv heads, so each shard has whole groups.
        groups = math.gcd(leaf.shape[1], cfg.kv_heads) if key in ("out", "down") else 1
        return matrix(leaf, tuple(axis + 1 for axis in INNER[key]), groups)

    return top | {"layers": {key: of_layer(key, leaf) for key, leaf in tree["layers"].items()}}


def quantized_specs(tree: PyTree, cfg: ModelConfig) -> PyTree:
    """Specs of an 8-bit policy: two per matrix, with the scale sharded like the outputs."""

    def matrix(spec: ParamSpec, inner: tuple[int, ...], groups: int) -> Quantized:
        keep = [i not in inner for i in range(len(spec.shape))]
        shape = tuple(n if kept else 1 for n, kept in zip(spec.shape, keep, strict=True))
        axes = tuple(axis if kept else None for axis, kept in zip(spec.axes, keep, strict=True))
        return Quantized(spec, ParamSpec(shape, axes, None), groups)

    return map_matrices(matrix, lambda spec: spec, tree, cfg)


def problems(cfg: ModelConfig, weights: str, device: jax.Device) -> list[str]:
    """Error messages for a weight dtype that the model or the device does not support."""
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

"""Low-rank adapters (Hu et al. 2021, LoRA): a frozen matrix W is replaced by W + scale A B, and only A and B are trained.

    scale = alpha / rank      A is initialized at random, B to 0: the first policy is the base

There is one pair per Hugging Face module, although q, k and v share one matrix here, as do gate and up: PEFT reads the pairs
unchanged.

The product is with the sum W + scale A B in the compute dtype, as in `publish` for the sampler, so trainer and sampler multiply by
the same numbers. (PEFT's x W + scale (x A) B rounds differently in bfloat16.) The gradient of W, a third of a step's work, is never
computed: with R the sum of the ranks of a matrix's modules, only products with [.., R] arrays are added.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxrl_llm.model import params as model_params
from jaxrl_llm.model.config import LoraConfig, ModelConfig
from jaxrl_llm.model.params import ParamSpec, is_spec
from jaxrl_llm.model.products import rounded_dot, sum_of_outer_products
from jaxrl_llm.model.quantized_weights import INNER
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.types import PyTree


class ModuleSlice(NamedTuple):
    """The part of a parameter that is one Hugging Face module."""

    leaf: str
    at: slice | None
    """Slice of the outputs' first dimension; None: the whole matrix."""


MODULES = {
    "q": ModuleSlice("qkv", slice(0, -2)),
    "k": ModuleSlice("qkv", slice(-2, -1)),
    "v": ModuleSlice("qkv", slice(-1, None)),
    "o": ModuleSlice("out", None),
    "gate": ModuleSlice("gate_up", slice(0, 1)),
    "up": ModuleSlice("gate_up", slice(1, 2)),
    "down": ModuleSlice("down", None),
}

# Frozen if there are adapters. All other entries of a parameter tree are the critic's.
POLICY = ("embed", "layers", "final_norm", "head")


class Adapter(flax.struct.PyTreeNode):
    """The adapter of one module. I: the dimensions that a product sums over, O: those of its outputs, as in the base matrix; in
    training with a leading L."""

    a: Array
    """[*I, rank]."""
    b: Array
    """[rank, *O]."""


class Adapted(flax.struct.PyTreeNode):
    """A matrix with adapters; takes the matrix's place in the parameter tree."""

    base: Array
    """Frozen. None in the trainable half of `split`."""
    pairs: dict[str, Adapter]
    """By module, for the modules with an adapter."""
    scale: float = flax.struct.field(pytree_node=False, default=1.0)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        return self.base.shape

    def swapaxes(self, one: int, other: int) -> "Adapted":
        """Swap two dimensions of the base. The adapters stay: their outputs are always in the order of `[*I, *O]`."""
        return self.replace(base=self.base.swapaxes(one, other))


def problems(cfg: ModelConfig, lora: LoraConfig) -> list[str]:
    """Return error messages for adapters that the model cannot have."""
    if not lora.rank:
        return []
    found, targets = [], ", ".join(lora.targets)
    if not lora.targets or len(set(lora.targets)) < len(lora.targets):
        found.append(f"lora.targets: got [{targets}], want one or more of {', '.join(MODULES)}, each once")
    refused = [name for name in lora.targets if MODULES[name].leaf in ("gate_up", "down")]
    if cfg.experts and refused:
        found.append(
            f"lora.targets: got {', '.join(refused)} for a model with experts ({cfg.experts}), want some of q, k, v, o: "
            "experts have no adapters"
        )
    return found


def adapted_specs(tree: PyTree, cfg: ModelConfig, lora: LoraConfig) -> PyTree:
    """Return `specs(cfg)` with adapters, frozen parameters in the compute dtype; the tree itself if `lora.rank` is 0.

    A has PEFT's initial variance 1 / (3 I), so learning rates carry over.
    """
    if not lora.rank:
        return tree
    tree = model_params.map_specs(lambda spec: spec._replace(dtype=cfg.compute), tree)
    layers = dict(tree["layers"])
    for leaf in {MODULES[name].leaf: None for name in lora.targets}:
        pairs = {
            name: _pair_specs(layers[leaf], name, lora.rank) for name in lora.targets if MODULES[name].leaf == leaf
        }
        layers[leaf] = Adapted(layers[leaf], pairs, lora.alpha / lora.rank)
    return {**tree, "layers": layers}


def _pair_specs(base: ParamSpec, name: str, rank: int) -> Adapter:
    """Return the specs of a module's adapter; `base` is the stacked matrix."""
    leaf, at = MODULES[name]
    inner = [1 + axis for axis in INNER[leaf]]
    outer = [axis for axis in range(1, len(base.shape)) if axis not in inner]
    take = lambda values, axes: tuple(values[axis] for axis in axes)  # noqa: E731
    summed, out = take(base.shape, inner), list(take(base.shape, outer))
    if at is not None:
        out[-2] = len(range(out[-2])[at])
    (layers, *_), (depth, *_) = base.shape, base.axes
    return Adapter(
        ParamSpec((layers, *summed, rank), (depth, *take(base.axes, inner), None), (3 * math.prod(summed)) ** -0.5),
        ParamSpec((layers, rank, *out), (depth, None, *take(base.axes, outer)), 0.0),
    )


def adapt(params: PyTree, tree: PyTree, key: jax.Array, layout: Layout) -> PyTree:
    """Return `params` with newly initialized adapters.

    Args:
        params: stacked parameters without adapters.
        tree: `adapted_specs`.
        key: seed of the initialization.
        layout: the training layout.
    """
    trained, frozen = split(tree)
    if trained is tree:
        return params
    described, structure = jax.tree.flatten(frozen, is_leaf=is_spec)
    cast = [x.astype(spec.dtype) for x, spec in zip(jax.tree.leaves(params), described, strict=True)]
    return join(model_params.init(trained, key, layout), structure.unflatten(cast))


def split(tree: PyTree) -> tuple[PyTree, PyTree]:
    """Split into (trainable, frozen): two trees of one structure with None where a leaf is in the other. `join` is the inverse.

    Takes arrays or specs. With adapters, the adapters and the critic are trainable; without, everything is.
    """
    if not any(is_adapted(x) for x in jax.tree.leaves(tree, is_leaf=_is_leaf)):
        return tree, _all_none(tree)
    return _half(tree, trained=True), _half(tree, trained=False)


def _half(tree: PyTree, trained: bool) -> PyTree:
    def of(x: Array | ParamSpec | Adapted) -> object:
        if not is_adapted(x):
            return None if trained else x
        return x.replace(base=None) if trained else x.replace(pairs=_all_none(x.pairs))

    def part(name: str, x: PyTree) -> PyTree:
        if name in POLICY:
            return jax.tree.map(of, x, is_leaf=_is_leaf)
        return x if trained else _all_none(x)

    return {name: part(name, x) for name, x in tree.items()}


def _all_none(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda _: None, tree, is_leaf=is_spec)


def join(trained: PyTree, frozen: PyTree) -> PyTree:
    """Return the complete tree, with the top-level names of `trained`; `trained` itself if it has no None."""
    stops = lambda x: x is None or is_spec(x)  # noqa: E731
    if not any(x is None for x in jax.tree.leaves(trained, is_leaf=stops)):
        return trained
    fill = lambda own, other: other if own is None else own  # noqa: E731
    return {name: jax.tree.map(fill, x, frozen[name], is_leaf=stops) for name, x in trained.items()}


def without_adapters(params: PyTree) -> PyTree:
    """Return the base parameters, not copied: the policy at the start of RL."""
    return jax.tree.map(lambda x: x.base if is_adapted(x) else x, params, is_leaf=_is_leaf)


def merge(params: PyTree, dtype: jnp.dtype) -> PyTree:
    """Return stacked parameters with each adapted matrix as W + scale A B, summed in f32 and cast; the rest unchanged."""
    return jax.tree.map(
        lambda x: by_layer(lambda w: w.astype(dtype), x) if is_adapted(x) else x, params, is_leaf=is_adapted
    )


def by_layer(view: Callable[[Array], PyTree], x: Array | Adapted) -> PyTree:
    """Return `view(x)` of a stacked matrix; of one with adapters, `view` of W + scale A B in f32.

    The latter is computed in a loop, one layer [1, ...] at a time: in f32 all layers at once would be larger than the policy.
    """
    if not is_adapted(x):
        return view(x)
    swapped = MODULES[next(iter(x.pairs))].leaf == "gate_up"

    def layer(w: Adapted) -> PyTree:
        w = w.swapaxes(0, 1) if swapped else w
        merged = _matrix(w.base, *_packed(w), w.scale, jnp.float32)
        return jax.tree.map(lambda x: x[0], view((merged.swapaxes(0, 1) if swapped else merged)[None]))

    return jax.lax.map(layer, x)


def product(x: Array, w: Adapted, inner: int, dtype: jnp.dtype) -> Array:
    """Sum over the last `inner` dimensions of `x` and the first `inner` of W + scale A B, in `dtype`, as `linear.contract` does."""
    return _product(x, w.base, *_packed(w), w.scale, inner, dtype)


def _packed(w: Adapted) -> tuple[Array, Array]:
    """Return all modules' A concatenated, [*I, R], and their B, [R, *O], each zero in the outputs of the other modules."""
    padded = []
    for name, pair in w.pairs.items():
        at = MODULES[name].at
        if at is None:
            padded.append(pair.b)
            continue
        total = w.base.shape[-2]
        start, stop, _ = at.indices(total)
        padded.append(jnp.pad(pair.b, [(0, 0)] * (pair.b.ndim - 2) + [(start, total - stop), (0, 0)]))
    return jnp.concatenate([pair.a for pair in w.pairs.values()], axis=-1), jnp.concatenate(padded, axis=0)


def _matrix(base: Array, a: Array, b: Array, scale: float, dtype: jnp.dtype) -> Array:
    return (base.astype(jnp.float32) + scale * jnp.tensordot(a, b, 1)).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _product(x: Array, base: Array, a: Array, b: Array, scale: float, inner: int, dtype: jnp.dtype) -> Array:
    over = tuple(range(x.ndim - inner, x.ndim)), tuple(range(inner))
    return rounded_dot(x, _matrix(base, a, b, scale, x.dtype), *over, dtype)


def _forward(x: Array, base: Array, a: Array, b: Array, *static: Any) -> tuple[Array, tuple[Array, ...]]:
    return _product(x, base, a, b, *static), (x, base, a, b)


def _backward(
    scale: float, inner: int, dtype: jnp.dtype, saved: tuple[Array, ...], g: Array
) -> tuple[Array, None, Array, Array]:
    """Gradients of y = x W + scale (x A) B: dx = g (W + scale A B)', dA = scale x' (g B'), dB = scale (x A)' g; none for W.

    Products in the dtype of `x`, sums in f32, as in `linear.contract`.
    """
    x, base, a, b = saved
    g, a, b = g.astype(x.dtype), a.astype(x.dtype), b.astype(x.dtype)
    rows, outputs = x.ndim - inner, tuple(range(g.ndim - base.ndim + inner, g.ndim))
    dx = rounded_dot(g, _matrix(base, *saved[2:], scale, x.dtype), outputs, tuple(range(inner, base.ndim)), x.dtype)
    narrow_g = rounded_dot(g, b, outputs, tuple(range(1, b.ndim)), x.dtype)
    narrow_x = rounded_dot(x, a, tuple(range(rows, x.ndim)), tuple(range(inner)), x.dtype)
    da, db = (scale * sum_of_outer_products(*of, rows) for of in ((x, narrow_g), (narrow_x, g)))
    return dx, None, da.astype(saved[2].dtype), db.astype(saved[3].dtype)


_product.defvjp(_forward, _backward)


def is_adapted(x: object) -> bool:
    return isinstance(x, Adapted)


def _is_leaf(x: object) -> bool:
    return is_adapted(x) or is_spec(x)

"""Low-rank adapters (Hu et al. 2021, LoRA): a frozen matrix W that counts as W + scale A B, of which A and B alone are trained.

    scale = alpha / rank      A starts at random, B at 0: the first policy is the base

One pair a module of Hugging Face's, though q, k and v lie in one matrix here and gate and up in another: PEFT takes them as they
are.

The product is with the sum W + scale A B in the compute dtype, as `publish` makes it for the sampler: so trainer and sampler
multiply by the same numbers. (x W + scale (x A) B, as PEFT has it, rounds elsewhere in bfloat16.) The gradient never makes that of
W, a third of a step's work: with R the ranks of a matrix's modules together, products with [.., R] arrays are all it adds.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxrl_llm.model import params as model_params
from jaxrl_llm.model.config import LoraConfig, ModelConfig
from jaxrl_llm.model.params import ParamSpec, is_spec
from jaxrl_llm.model.quantized import INNER
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.types import PyTree


class Module(NamedTuple):
    """Where a module of Hugging Face's lies in a matrix of ours."""

    leaf: str
    at: slice | None
    """Of the first dim of the outputs; None: it is the whole matrix."""


MODULES = {
    "q": Module("qkv", slice(0, -2)),
    "k": Module("qkv", slice(-2, -1)),
    "v": Module("qkv", slice(-1, None)),
    "o": Module("out", None),
    "gate": Module("gate_up", slice(0, 1)),
    "up": Module("gate_up", slice(1, 2)),
    "down": Module("down", None),
}


# Frozen where there are adapters. What else a parameter tree has is a critic's.
POLICY = ("embed", "layers", "final_norm", "head")


class Pair(flax.struct.PyTreeNode):
    """The adapter of one module. I: the dims that a product sums over, O: those of its outputs, as in the matrix it stands beside;
    in training a leading L before both."""

    a: Array
    """[*I, rank]."""
    b: Array
    """[rank, *O]."""


class Adapted(flax.struct.PyTreeNode):
    """A matrix with adapters, in the place where the matrix stood."""

    base: Array
    """Frozen. None where `split` has left it out."""
    pairs: dict[str, Pair]
    """By module, of those that have one."""
    scale: float = flax.struct.field(pytree_node=False, default=1.0)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        return self.base.shape

    def swapaxes(self, one: int, other: int) -> "Adapted":
        """With two dims of the base swapped. The adapters stay: their outputs lie as in `[*I, *O]` always."""
        return self.replace(base=self.base.swapaxes(one, other))


def problems(cfg: ModelConfig, lora: LoraConfig) -> list[str]:
    """What stands against such adapters, in words."""
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
    """`specs(cfg)` with adapters; what is frozen has the compute dtype. The tree itself where `lora.rank` is 0.

    A has the variance 1 / (3 I) that PEFT's A starts with, so its learning rates carry over.
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


def _pair_specs(base: ParamSpec, name: str, rank: int) -> Pair:
    """Of a stacked matrix."""
    leaf, at = MODULES[name]
    inner = [1 + axis for axis in INNER[leaf]]
    outer = [axis for axis in range(1, len(base.shape)) if axis not in inner]
    take = lambda values, axes: tuple(values[axis] for axis in axes)  # noqa: E731
    summed, out = take(base.shape, inner), list(take(base.shape, outer))
    if at is not None:
        out[-2] = len(range(out[-2])[at])
    (layers, *_), (depth, *_) = base.shape, base.axes
    return Pair(
        ParamSpec((layers, *summed, rank), (depth, *take(base.axes, inner), None), (3 * math.prod(summed)) ** -0.5),
        ParamSpec((layers, rank, *out), (depth, None, *take(base.axes, outer)), 0.0),
    )


def adapt(params: PyTree, tree: PyTree, key: jax.Array, layout: Layout) -> PyTree:
    """`params` with fresh adapters, as `tree`, which is `adapted_specs`, describes them."""
    trained, frozen = split(tree)
    if trained is tree:
        return params
    described, structure = jax.tree.flatten(frozen, is_leaf=is_spec)
    cast = [x.astype(spec.dtype) for x, spec in zip(jax.tree.leaves(params), described, strict=True)]
    return join(model_params.init(trained, key, layout), structure.unflatten(cast))


def split(tree: PyTree) -> tuple[PyTree, PyTree]:
    """What is trained and what is frozen, each with None in the place of the other; `join` undoes it. For arrays and specs alike.

    Where there are adapters they are trained, and what stands beside the policy, a critic; else everything is.
    """
    if not any(is_adapted(x) for x in jax.tree.leaves(tree, is_leaf=_stops)):
        return tree, _nothing(tree)
    return _side(tree, trained=True), _side(tree, trained=False)


def _side(tree: PyTree, trained: bool) -> PyTree:
    def of(x: Array | ParamSpec | Adapted) -> object:
        if not is_adapted(x):
            return None if trained else x
        return x.replace(base=None) if trained else x.replace(pairs=_nothing(x.pairs))

    def part(name: str, x: PyTree) -> PyTree:
        if name in POLICY:
            return jax.tree.map(of, x, is_leaf=_stops)
        return x if trained else _nothing(x)

    return {name: part(name, x) for name, x in tree.items()}


def _nothing(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda _: None, tree, is_leaf=is_spec)


def join(trained: PyTree, frozen: PyTree) -> PyTree:
    """The whole tree, of the names in `trained`. A `trained` without gaps is whole already: all of it, whatever is frozen."""
    stops = lambda x: x is None or is_spec(x)  # noqa: E731
    if not any(x is None for x in jax.tree.leaves(trained, is_leaf=stops)):
        return trained
    fill = lambda own, other: other if own is None else own  # noqa: E731
    return {name: jax.tree.map(fill, x, frozen[name], is_leaf=stops) for name, x in trained.items()}


def without_adapters(params: PyTree) -> PyTree:
    """The base, not copied: the policy of the start of RL."""
    return jax.tree.map(lambda x: x.base if is_adapted(x) else x, params, is_leaf=_stops)


def merge(params: PyTree, dtype: jnp.dtype) -> PyTree:
    """Stacked parameters with W + scale A B, summed in f32 and cast, for each matrix with adapters; the rest as it is."""
    return jax.tree.map(
        lambda x: by_layer(lambda w: w.astype(dtype), x) if is_adapted(x) else x, params, is_leaf=is_adapted
    )


def by_layer(view: Callable[[Array], PyTree], x: Array | Adapted) -> PyTree:
    """`view` of a stacked matrix; of one with adapters that of W + scale A B, f32.

    There a loop makes it for a layer at a time, [1, ...]: in f32 all layers at once would be more than the policy itself.
    """
    if not is_adapted(x):
        return view(x)
    turned = MODULES[next(iter(x.pairs))].leaf == "gate_up"

    def one(w: Adapted) -> PyTree:
        w = w.swapaxes(0, 1) if turned else w
        whole = _matrix(w.base, *_packed(w), w.scale, jnp.float32)
        return jax.tree.map(lambda x: x[0], view((whole.swapaxes(0, 1) if turned else whole)[None]))

    return jax.lax.map(one, x)


def product(x: Array, w: Adapted, inner: int) -> Array:
    """As `linear.contract`: sum over the last `inner` dims of `x` and the first `inner` of W + scale A B, f32."""
    return _product(x, w.base, *_packed(w), w.scale, inner)


def _packed(w: Adapted) -> tuple[Array, Array]:
    """All modules' A beside each other, [*I, R], and their B below each other, each 0 in the outputs of the others, [R, *O]."""
    wide = []
    for name, pair in w.pairs.items():
        at = MODULES[name].at
        if at is None:
            wide.append(pair.b)
            continue
        total = w.base.shape[-2]
        start, stop, _ = at.indices(total)
        wide.append(jnp.pad(pair.b, [(0, 0)] * (pair.b.ndim - 2) + [(start, total - stop), (0, 0)]))
    return jnp.concatenate([pair.a for pair in w.pairs.values()], axis=-1), jnp.concatenate(wide, axis=0)


def _matrix(base: Array, a: Array, b: Array, scale: float, dtype: jnp.dtype) -> Array:
    return (base.astype(jnp.float32) + scale * jnp.tensordot(a, b, 1)).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _product(x: Array, base: Array, a: Array, b: Array, scale: float, inner: int) -> Array:
    return _dot(x, _matrix(base, a, b, scale, x.dtype), inner)


def _forward(x: Array, base: Array, a: Array, b: Array, scale: float, inner: int) -> tuple[Array, tuple[Array, ...]]:
    return _product(x, base, a, b, scale, inner), (x, base, a, b)


def _backward(scale: float, inner: int, saved: tuple[Array, ...], g: Array) -> tuple[Array, None, Array, Array]:
    """Of y = x W + scale (x A) B: dx = g (W + scale A B)', dA = scale x' (g B'), dB = scale (x A)' g; none of W.

    Products in the dtype of `x`, sums f32, as in `linear.contract`.
    """
    x, base, a, b = saved
    g, a, b = g.astype(x.dtype), a.astype(x.dtype), b.astype(x.dtype)
    outputs, rows = tuple(range(inner - base.ndim, 0)), tuple(range(x.ndim - inner))
    dx = _dot(g, _matrix(base, *saved[2:], scale, x.dtype), (outputs, tuple(range(inner, base.ndim))))
    narrow_g = _dot(g, b, (outputs, tuple(range(1, b.ndim)))).astype(x.dtype)
    narrow_x = _dot(x, a, inner).astype(x.dtype)
    da, db = scale * _dot(x, narrow_g, (rows, rows)), scale * _dot(narrow_x, g, (rows, rows))
    return dx.astype(x.dtype), None, da.astype(saved[2].dtype), db.astype(saved[3].dtype)


_product.defvjp(_forward, _backward)


def _dot(a: Array, b: Array, over: int | tuple[tuple[int, ...], tuple[int, ...]]) -> Array:
    return jnp.tensordot(a, b, over, preferred_element_type=jnp.float32)


def is_adapted(x: object) -> bool:
    return isinstance(x, Adapted)


def _stops(x: object) -> bool:
    return is_adapted(x) or is_spec(x)

"""Parameter descriptions: a tree of `ParamSpec`. Initialization, sharding and counting are maps over it.

For training the layers are stacked on a leading dimension L, for a scan; a policy has one entry per layer, because decoding is
unrolled and would copy each slice of a stacked array.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.parallel.layout import Axes, Layout
from jaxrl_llm.types import PyTree

# Order of the matrices in a `gate_up`.
GATE_UP = ("gate", "up")


class ParamSpec(NamedTuple):
    """One parameter of the trainer. Initially ones if `std` is None, zeros if 0.0, else normal with that standard deviation."""

    shape: tuple[int, ...]
    axes: Axes
    std: float | None
    dtype: str = "float32"
    """float32 for trained parameters; frozen ones may use fewer bits."""


def is_spec(x: object) -> bool:
    """True for a leaf of a tree of specs."""
    return isinstance(x, ParamSpec)


def specs(cfg: ModelConfig) -> PyTree:
    """Specs of all parameters, layers stacked.

    Queries, keys and values of a key/value head are stored together, `[D, K, G + 2, H]`, and gate before up, `[2, D, F]`: so a
    `tensor` shard holds whole heads, and splitting them costs no collective. (Concatenated columns cost three times as many.)
    With the 2 in the middle a TPU would re-layout all of it at the start of every rollout, and hold both copies. Policies
    store gate and up separately. Norms that multiply by 1 + w start at w = 0.
    """
    norm = 0.0 if cfg.norm_plus_one else None
    d, h, k, g, f, n = cfg.d_model, cfg.head_dim, cfg.kv_heads, cfg.group, cfg.d_mlp, cfg.layers
    inward, outward = d**-0.5, (2 * n) ** -0.5
    layer = {
        "attn_norm": ParamSpec((d,), (None,), norm),
        "qkv": ParamSpec((d, k, g + 2, h), ("embed", "heads", None, None), inward),
        "out": ParamSpec((k, g, h, d), ("heads", None, None, "embed"), outward * (k * g * h) ** -0.5),
        "mlp_norm": ParamSpec((d,), (None,), norm),
    }
    if cfg.experts:
        e = cfg.experts
        layer["router"] = ParamSpec((d, e), ("embed", None), inward)
        layer["gate_up"] = ParamSpec((2, e, d, f), (None, "expert", "embed", "mlp"), inward)
        layer["down"] = ParamSpec((e, f, d), ("expert", "mlp", "embed"), outward * f**-0.5)
    else:
        layer["gate_up"] = ParamSpec((2, d, f), (None, "embed", "mlp"), inward)
        layer["down"] = ParamSpec((f, d), ("mlp", "embed"), outward * f**-0.5)
    if cfg.sandwich_norms:
        layer |= {name: ParamSpec((d,), (None,), norm) for name in ("attn_out_norm", "mlp_out_norm")}
    if cfg.qkv_bias:
        layer["qkv_bias"] = ParamSpec((k, g + 2, h), ("heads", None, None), 0.0)
    if cfg.qk_norm:
        layer |= {name: ParamSpec((h,), (None,), norm) for name in ("q_norm", "k_norm")}
    tree = {
        "embed": ParamSpec((cfg.vocab_size, d), ("vocab", "embed"), inward),
        "layers": {name: ParamSpec((n, *s.shape), ("layers", *s.axes), s.std) for name, s in layer.items()},
        "final_norm": ParamSpec((d,), (None,), norm),
    }
    if not cfg.tied_head:
        # Like the embedding: with the vocabulary last a TPU would re-layout it at the start of every rollout, and hold both.
        tree["head"] = ParamSpec((cfg.vocab_size, d), ("vocab", "embed"), inward)
    return tree


def policy_params(params: PyTree, cfg: ModelConfig) -> PyTree:
    """The policy's parameters, without the critic's."""
    return {name: params[name] for name in specs(cfg)}


def map_specs(f, tree: PyTree) -> PyTree:
    """`jax.tree.map` with specs as leaves."""
    return jax.tree.map(f, tree, is_leaf=is_spec)


def shardings(tree: PyTree, layout: Layout) -> PyTree:
    """Sharding of each spec."""
    return map_specs(lambda s: layout.sharding(s.axes), tree)


def count(tree: PyTree) -> int:
    """Number of parameters."""
    return sum(math.prod(s.shape) for s in jax.tree.leaves(tree, is_leaf=is_spec))


def abstract(tree: PyTree, layout: Layout, dtype: jnp.dtype | None = None) -> PyTree:
    """Shapes, dtypes and shardings without arrays, for lowering and restoring. `dtype` None: that of each spec."""
    return map_specs(
        lambda s: jax.ShapeDtypeStruct(s.shape, dtype or jnp.dtype(s.dtype), sharding=layout.sharding(s.axes)), tree
    )


def init(tree: PyTree, key: jax.Array, layout: Layout) -> PyTree:
    """Initialize parameters sharded: no device or host ever holds all of them."""
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_spec)

    def make(key: jax.Array) -> PyTree:
        keys = jax.random.split(key, len(leaves))
        return treedef.unflatten([_init(s, k) for s, k in zip(leaves, keys, strict=True)])

    return jax.jit(make, out_shardings=shardings(tree, layout))(key)


def _init(spec: ParamSpec, key: jax.Array) -> jax.Array:
    if spec.std is None:
        return jnp.ones(spec.shape, spec.dtype)
    return (spec.std * jax.random.normal(key, spec.shape, jnp.float32)).astype(spec.dtype)


def unstack(tree: PyTree, num_layers: int) -> PyTree:
    """Tree of a policy, for arrays and specs: a tuple of layers, each with an MLP's `gate_up` split into `gate` and `up`.

    Stacked, one of the two products copies both to another layout: for a few rows that costs as much as the product.
    """

    def take(x: jax.Array | ParamSpec, i: int) -> jax.Array | ParamSpec:
        return x._replace(shape=x.shape[1:], axes=x.axes[1:]) if is_spec(x) else x[i]

    def entry(tree: PyTree, i: int) -> PyTree:
        return map_specs(lambda x: take(x, i), tree)

    def layer(i: int) -> PyTree:
        params = entry(tree["layers"], i)
        if "router" in params:
            return params
        stacked = params.pop("gate_up")
        return params | {name: entry(stacked, side) for side, name in enumerate(GATE_UP)}

    return {**tree, "layers": tuple(layer(i) for i in range(num_layers))}

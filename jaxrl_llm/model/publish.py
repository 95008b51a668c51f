"""`publish`: the trainer's parameters to a policy that decodes: cast or quantized, re-laid and unstacked in one jit, never through
the host."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.lora import Adapted, by_layer, is_adapted
from jaxrl_llm.model.params import abstract, policy_part, shardings, specs, unstack
from jaxrl_llm.model.quantized import DTYPES, Quantized, map_matrices, quantize, quantized_specs
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.types import Policy, PyTree

Publish = Callable[[PyTree, Array, Policy], Policy]


def policy_shardings(cfg: ModelConfig, decode: Layout, weights: str = "compute") -> Policy:
    return Policy(params=shardings(unstack(_view_specs(cfg, weights), cfg.layers), decode), version=decode.replicated)


def abstract_policy(cfg: ModelConfig, decode: Layout, weights: str = "compute") -> Policy:
    """Shapes, dtypes and shardings of a policy without its arrays: what lowering needs."""

    def make(params: PyTree) -> Policy:
        return Policy(unstack(_view(params, cfg, weights), cfg.layers), jnp.zeros((), jnp.int32))

    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        jax.eval_shape(make, abstract(specs(cfg), decode)),
        policy_shardings(cfg, decode, weights),
    )


def make_publish(cfg: ModelConfig, train: Layout, decode: Layout, weights: str = "compute") -> Publish:
    """The program `publish(params, version, old) -> Policy`; `weights` is `rollout.engine.weights`.

    `old`, the policy published before, only lends its buffers: it is donated, so one copy for decoding lives on, not two.
    `keep_unused` matters: without it jit drops the argument and the alias with it. The master is never donated.
    (While it runs, the TPU compiler gathers into memory of its own first: at most one more copy, see docs/tpu.md.)
    """
    train_shardings = shardings(_view_specs(cfg, weights), train)

    def publish(params: PyTree, version: Array, old: Policy) -> Policy:
        # Cast and quantized while still sharded: what crosses the wire is the policy's own dtype, on every backend.
        view = jax.lax.with_sharding_constraint(_view(params, cfg, weights), train_shardings)
        return Policy(params=unstack(view, cfg.layers), version=version)

    return jax.jit(publish, donate_argnums=2, keep_unused=True, out_shardings=policy_shardings(cfg, decode, weights))


def make_blank(cfg: ModelConfig, decode: Layout, weights: str = "compute") -> Callable[[], Policy]:
    """The program that makes the buffers which a `publish` without an older policy writes into."""

    def blank() -> Policy:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract_policy(cfg, decode, weights))

    return jax.jit(blank, out_shardings=policy_shardings(cfg, decode, weights))


def _view(params: PyTree, cfg: ModelConfig, weights: str) -> PyTree:
    """The masters as a policy holds them, layers stacked, adapters merged."""
    params = policy_part(params, cfg)

    def cast(x: Array | Adapted) -> Array:
        return by_layer(lambda w: w.astype(cfg.compute), x)

    if weights == "compute":
        return jax.tree.map(cast, params, is_leaf=is_adapted)

    def matrix(x: Array | Adapted, inner: tuple[int, ...], groups: int) -> Quantized:
        return by_layer(lambda w: quantize(w, inner, DTYPES[weights], groups), x)

    return map_matrices(matrix, cast, params, cfg)


def _view_specs(cfg: ModelConfig, weights: str) -> PyTree:
    return specs(cfg) if weights == "compute" else quantized_specs(specs(cfg), cfg)

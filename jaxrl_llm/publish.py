"""`publish`: the trainer's parameters to a policy that decodes: cast, re-laid and unstacked in one jit, never through the host."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.params import shardings, specs, unstack
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.types import Policy, PyTree

Publish = Callable[[PyTree, Array, Policy], Policy]


def policy_shardings(cfg: ModelConfig, decode: Layout) -> Policy:
    return Policy(params=shardings(unstack(specs(cfg), cfg.layers), decode), version=decode.replicated)


def make_publish(cfg: ModelConfig, train: Layout, decode: Layout) -> Publish:
    """The program `publish(params, version, old) -> Policy`.

    `old`, the policy published before, only lends its buffers: it is donated, so one copy for decoding lives on, not two.
    `keep_unused` matters: without it jit drops the argument and the alias with it. The master is never donated.
    (While it runs, the TPU compiler gathers into memory of its own first: at most one more copy, see docs/tpu.md.)
    """
    train_shardings = shardings(specs(cfg), train)

    def publish(params: PyTree, version: Array, old: Policy) -> Policy:
        # Cast while still sharded: what crosses the wire is the compute dtype, on every backend.
        cast = jax.tree.map(lambda x: x.astype(cfg.compute), params)
        cast = jax.lax.with_sharding_constraint(cast, train_shardings)
        return Policy(params=unstack(cast, cfg.layers), version=version)

    return jax.jit(publish, donate_argnums=2, keep_unused=True, out_shardings=policy_shardings(cfg, decode))


def make_blank(cfg: ModelConfig, decode: Layout) -> Callable[[], Policy]:
    """The program that makes the buffers the first `publish` writes into."""
    tree = unstack(specs(cfg), cfg.layers)

    def blank() -> Policy:
        params = jax.tree.map(lambda s: jnp.zeros(s.shape, cfg.compute), tree, is_leaf=lambda s: hasattr(s, "axes"))
        return Policy(params=params, version=jnp.zeros((), jnp.int32))

    return jax.jit(blank, out_shardings=policy_shardings(cfg, decode))

"""`publish`: the trainer's parameters to a policy for decoding. One jitted program casts or quantizes, reshards and unstacks them,
never through the host."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxrl_llm.errors import UserError
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.lora import Adapted, by_layer, is_adapted
from jaxrl_llm.model.params import abstract, policy_params, shardings, specs, unstack
from jaxrl_llm.model.quantized_weights import DTYPES, Quantized, map_matrices, quantize, quantized_specs
from jaxrl_llm.parallel import hosts
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.types import Policy, PyTree

Publish = Callable[[PyTree, Array, Policy], Policy]


def policy_shardings(cfg: ModelConfig, decode: Layout, weights: str = "compute") -> Policy:
    """Shardings of a policy in the DECODE layout. `weights`: `rollout.engine.weights`."""
    return Policy(params=shardings(unstack(_policy_specs(cfg, weights), cfg.layers), decode), version=decode.replicated)


def abstract_policy(cfg: ModelConfig, decode: Layout, weights: str = "compute") -> Policy:
    """Shapes, dtypes and shardings of a policy without arrays, for lowering."""

    def make(params: PyTree) -> Policy:
        return Policy(unstack(_to_policy_dtypes(params, cfg, weights), cfg.layers), jnp.zeros((), jnp.int32))

    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        jax.eval_shape(make, abstract(specs(cfg), decode)),
        policy_shardings(cfg, decode, weights),
    )


def jit_publish(cfg: ModelConfig, train: Layout, decode: Layout, weights: str = "compute") -> Publish:
    """The program `publish(params, version, old) -> Policy`.

    `old`, the previous policy, is donated and only provides the output buffers, so there is one copy for decoding, not two.
    `keep_unused` matters: without it jit drops the argument and with it the alias. The master parameters are never donated.
    (While the program runs, the TPU compiler gathers into temporary memory first: at most one more copy, see docs/tpu.md.)

    Args:
        cfg: the model.
        train: layout of `params`.
        decode: layout of the policy.
        weights: `rollout.engine.weights`.
    """
    train_shardings = shardings(_policy_specs(cfg, weights), train)

    def publish(params: PyTree, version: Array, old: Policy) -> Policy:
        # Cast and quantize while still sharded, so that data moves between devices in the policy's dtype on every backend.
        policy = jax.lax.with_sharding_constraint(_to_policy_dtypes(params, cfg, weights), train_shardings)
        return Policy(params=unstack(policy, cfg.layers), version=version)

    return jax.jit(publish, donate_argnums=2, keep_unused=True, out_shardings=policy_shardings(cfg, decode, weights))


def make_empty_policy(cfg: ModelConfig, decode: Layout, weights: str = "compute") -> Callable[[], Policy]:
    """The program that allocates the buffers for the first `publish`, which has no previous policy."""

    def empty() -> Policy:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract_policy(cfg, decode, weights))

    return jax.jit(empty, out_shardings=policy_shardings(cfg, decode, weights))


def publisher(cfg: ModelConfig, train: Layout, decode: Layout, weights: str = "compute") -> Callable[..., Policy]:
    """Return `publish(params, version=0, old=None) -> Policy`; without an old policy it writes into new buffers.

    Args:
        cfg: the model.
        train: layout of the parameters.
        decode: layout of the policy.
        weights: `rollout.engine.weights`.
    """
    program, blank = jit_publish(cfg, train, decode, weights), make_empty_policy(cfg, decode, weights)

    def publish(params: PyTree, version: int | Array = 0, old: Policy | None = None) -> Policy:
        if not isinstance(params, dict):
            raise UserError(f"params: got {type(params).__name__}, want model.params or state.params")
        hosts.check_alive("params", params)
        version = version if isinstance(version, jax.Array) else hosts.put(np.int32(version), train.replicated)
        return program(params, version, blank() if old is None else old)

    return publish


def _to_policy_dtypes(params: PyTree, cfg: ModelConfig, weights: str) -> PyTree:
    """Master parameters with the dtypes of a policy: layers stacked, adapters merged."""
    params = policy_params(params, cfg)

    def cast(x: Array | Adapted) -> Array:
        return by_layer(lambda w: w.astype(cfg.compute), x)

    if weights == "compute":
        return jax.tree.map(cast, params, is_leaf=is_adapted)

    def matrix(x: Array | Adapted, inner: tuple[int, ...], groups: int) -> Quantized:
        return by_layer(lambda w: quantize(w, inner, DTYPES[weights], groups), x)

    return map_matrices(matrix, cast, params, cfg)


def _policy_specs(cfg: ModelConfig, weights: str) -> PyTree:
    return specs(cfg) if weights == "compute" else quantized_specs(specs(cfg), cfg)

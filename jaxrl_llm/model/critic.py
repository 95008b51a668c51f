"""Critic: a linear value head on the policy's last activations or on those of a separate transformer."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.params import ParamSpec, specs
from jaxrl_llm.types import PyTree

# Keys that a critic adds to a parameter tree; the names of its optimizer groups begin with these.
NAMES = ("value", "critic")
TRUNK = ("embed", "layers", "final_norm")


def critic_specs(cfg: ModelConfig, kind: str) -> PyTree:
    """Specs that a critic adds to the policy's. `kind`: head or separate."""
    head = {"value": {"kernel": ParamSpec((cfg.d_model,), (None,), 0.0), "bias": ParamSpec((), (), 0.0)}}
    if kind == "head":
        return head
    whole = specs(cfg)
    return {"critic": {name: whole[name] for name in TRUNK} | head}


def init_critic(params: PyTree, cfg: ModelConfig, kind: str) -> PyTree:
    """Initial critic: its values are 0; a separate transformer is a copy of the policy's."""
    head = {"value": {"kernel": jnp.zeros((cfg.d_model,), jnp.float32), "bias": jnp.zeros((), jnp.float32)}}
    if kind == "head":
        return head
    return {
        "critic": {name: jax.tree.map(lambda x: jnp.copy(x.astype(jnp.float32)), params[name]) for name in TRUNK} | head
    }


def critic_values(params: PyTree, h: Float[Array, "s N D"]) -> Float[Array, "s N"] | None:
    """Values kernel . h + bias, f32; None if `params` has no value head."""
    if "value" not in params:
        return None
    kernel, bias = (params["value"][name].astype(jnp.float32) for name in ("kernel", "bias"))
    # No matrix product: on a TPU it would round f32 to bf16.
    return jnp.sum(h.astype(jnp.float32) * kernel, axis=-1) + bias

"""Values of what is before each token: a linear head, on the policy's last activations or on those of a transformer of its own."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.params import ParamSpec, specs
from jaxrl_llm.types import PyTree

# What a critic adds to a parameter tree: its groups of the optimizer begin with these.
NAMES = ("value", "critic")
TRUNK = ("embed", "layers", "final_norm")


def critic_specs(cfg: ModelConfig, kind: str) -> PyTree:
    """Beside the policy's specs. `kind`: head or separate."""
    head = {"value": {"kernel": ParamSpec((cfg.d_model,), (None,), 0.0), "bias": ParamSpec((), (), 0.0)}}
    if kind == "head":
        return head
    whole = specs(cfg)
    return {"critic": {name: whole[name] for name in TRUNK} | head}


def critic_start(params: PyTree, cfg: ModelConfig, kind: str) -> PyTree:
    """Values 0 everywhere; a transformer of its own starts as the policy's."""
    head = {"value": {"kernel": jnp.zeros((cfg.d_model,), jnp.float32), "bias": jnp.zeros((), jnp.float32)}}
    if kind == "head":
        return head
    return {
        "critic": {name: jax.tree.map(lambda x: jnp.copy(x.astype(jnp.float32)), params[name]) for name in TRUNK} | head
    }


def values_of(params: PyTree, h: Float[Array, "s N D"]) -> Float[Array, "s N"] | None:
    """kernel . h + bias, f32; None for a tree without a critic's head."""
    if "value" not in params:
        return None
    kernel, bias = (params["value"][name].astype(jnp.float32) for name in ("kernel", "bias"))
    # Not a matrix product: that rounds f32 to bf16 on a TPU.
    return jnp.sum(h.astype(jnp.float32) * kernel, axis=-1) + bias

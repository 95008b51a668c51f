"""Values of what is before each token: a linear head, on the policy's last activations or on those of a transformer of its own."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.model.config import ModelConfig, Whole
from jaxrl_llm.model.params import ParamSpec, specs
from jaxrl_llm.model.transformer import hidden
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.types import Batch, PyTree

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
    return {"critic": {name: jax.tree.map(jnp.copy, params[name]) for name in TRUNK} | head}


def values_of(
    params: PyTree, h: Float[Array, "R T D"], batch: Batch, cfg: ModelConfig, layout: Layout, how: Whole
) -> Float[Array, "R T"] | None:
    """The critic's value of what is before each token, f32; None without a critic. `h`: the policy's activations."""
    if "critic" in params:
        params = params["critic"]
        h = hidden(params, batch.tokens, batch.position, batch.until, cfg, layout)
    if "value" not in params:
        return None
    head = params["value"]
    # Not a matrix product, which would round f32 to bf16 on a TPU. Made where the activations are: numbers move, not rows of them.
    values = jnp.sum(h.astype(jnp.float32) * head["kernel"], axis=-1) + head["bias"]
    return jnp.take_along_axis(values, batch.before, axis=1)

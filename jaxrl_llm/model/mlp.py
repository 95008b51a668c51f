"""The gated MLP (Shazeer 2020)."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.linear import contract, contract_each
from jaxrl_llm.parallel.layout import Layout

ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": partial(jax.nn.gelu, approximate=True)}


def gated(gate: Float[Array, "*rows F"], up: Float[Array, "*rows F"], cfg: ModelConfig) -> Float[Array, "*rows F"]:
    """Return activation(gate) * up."""
    return ACTIVATIONS[cfg.activation](gate) * up


def dense(layer: dict[str, Array], h: Float[Array, "B T D"], cfg: ModelConfig, layout: Layout) -> Float[Array, "B T D"]:
    """Dense gated MLP.

    With stacked `gate_up` (master parameters) gate and up are one product, with one collective in each direction; on a CPU two
    products, which saves splitting the result.

    Args:
        layer: the layer's parameters, of a policy or of the trainer.
        h: normalized activations.
        cfg: the model.
        layout: how activations are sharded.
    """
    if "gate" in layer:
        gate, up = contract(h, layer["gate"]), contract(h, layer["up"])
    elif layout.on_cpu and isinstance(layer["gate_up"], jax.Array):
        gate, up = contract_each(h, layer["gate_up"])
    else:
        gate, up = jnp.moveaxis(contract(h, layer["gate_up"].swapaxes(0, 1)), -2, 0)

    # The backward pass computes the activation again from gate and up: a third less memory, and on a CPU less time.
    @partial(jax.checkpoint, prevent_cse=False)
    def down(gate: Array, up: Array, weight: Array) -> Array:
        return contract(gated(gate, up, cfg).astype(h.dtype), weight, dtype=h.dtype)

    return down(gate, up, layer["down"])

"""Rematerialization: which activations of a layer the backward pass finds in memory and which it recomputes (Chen et al. 2016).

none       nothing is recomputed but the activation of a dense MLP (`mlp.dense`)
attention  attention scores and weights are recomputed; only implementation `plain` would store them
layer      a layer is recomputed from its input, the residual stream: a third more FLOPs
offload    like `layer`, with the inputs stored in host memory
"""

import math
from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name, checkpoint_policies

from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.parallel.layout import Layout

# Bytes of activations per device up to which `auto` recomputes nothing.
BUDGET = 2**30
INPUT = "layer_input"


def choose_remat(name: str, shape: tuple[int, int], cfg: ModelConfig, layout: Layout) -> str:
    """Resolve `update.remat`. `auto`: `none` if all layers store at most a gigabyte per device, else `layer`.

    Args:
        name: auto, none, attention, layer or offload.
        shape: R, T of the rows.
        cfg: the model.
        layout: how activations are sharded.

    Returns:
        The policy, never `auto`.
    """
    if name != "auto":
        return name
    tokens = math.prod(shape) / layout.size("rows")
    return "none" if tokens * cfg.layers * saved_bytes(cfg) / layout.size("heads") <= BUDGET else "layer"


def saved_bytes(cfg: ModelConfig) -> int:
    """Approximate bytes per token that a layer stores for its gradient, without attention scores.

    In the compute dtype: the inputs of its four products, before and after norms, queries, keys, values and the attention output.
    In f32: the inputs of the norms, gate, up and the activation's output.
    """
    itemsize = 2 if cfg.compute == "bfloat16" else 4
    width = max(cfg.experts_per_token, 1) * cfg.d_mlp
    heads = (2 * cfg.heads + 2 * cfg.kv_heads) * cfg.head_dim
    return itemsize * (4 * cfg.d_model + 2 * heads + width) + 4 * (2 * cfg.d_model + 3 * width)


def named_input(x: jax.Array) -> jax.Array:
    """A layer's input, named for the `offload` policy."""
    return checkpoint_name(x, INPUT)


def checkpointed(step: Callable, name: str) -> Callable:
    """The body of the loop over layers under the policy `name`, which is not `auto`."""
    if name in ("none", "attention"):
        return step
    if name == "layer":
        return jax.checkpoint(step)
    offload = checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    )
    return jax.checkpoint(step, policy=offload)

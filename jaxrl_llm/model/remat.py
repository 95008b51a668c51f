"""What the backward pass of a layer finds in memory, and what it computes again (Chen et al. 2016).

none       all that its gradient reads is kept
attention  scores and weights of the attention are made again; the rest is kept. Forms but `plain` never keep them
layer      a layer is computed again from its input, the residual stream: a third more products
offload    as `layer`, and the inputs wait in the host's memory
"""

import math
from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name, checkpoint_policies

from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.parallel.layout import Layout

# Bytes a device that `auto` lets the layers keep.
BUDGET = 2**30
INPUT = "layer_input"


def keeping(name: str, shape: tuple[int, int], cfg: ModelConfig, layout: Layout) -> str:
    """The policy for rows [R, T]. `auto`: `none` where all layers keep at most a gigabyte a device, else `layer`."""
    if name != "auto":
        return name
    tokens = math.prod(shape) / layout.size("rows")
    return "none" if tokens * cfg.layers * kept_bytes(cfg) / layout.size("heads") <= BUDGET else "layer"


def kept_bytes(cfg: ModelConfig) -> int:
    """About what a layer keeps of a token for its gradient, attention in a form that keeps no scores.

    In the compute dtype: the inputs of its four products, normed and not, queries, keys and values, the attention's output. In f32:
    the streams that the norms read, gate, up and what the activation makes of them.
    """
    itemsize = 2 if cfg.compute == "bfloat16" else 4
    width = max(cfg.experts_per_token, 1) * cfg.d_mlp
    heads = (2 * cfg.heads + 2 * cfg.kv_heads) * cfg.head_dim
    return itemsize * (4 * cfg.d_model + 2 * heads + width) + 4 * (2 * cfg.d_model + 3 * width)


def named_input(x: jax.Array) -> jax.Array:
    """A layer's input under the name by which policies know it."""
    return checkpoint_name(x, INPUT)


def checkpointed(step: Callable, name: str) -> Callable:
    """The body of the loop over layers, under the policy `name`, which is not `auto`."""
    if name in ("none", "attention"):
        return step
    if name == "layer":
        return jax.checkpoint(step)
    away = checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    )
    return jax.checkpoint(step, policy=away)

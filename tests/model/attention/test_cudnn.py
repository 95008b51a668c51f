"""cuDNN's fused attention against plain attention, on an NVIDIA GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from setups import SMALL, layouts

from jaxrl_llm.model.attention.plain import PackedRows
from jaxrl_llm.model.attention.selection import attention_for

CFG = dataclasses.replace(SMALL, compute="bfloat16", head_dim=64)


@pytest.mark.gpu
def test_cudnn_is_attention_under_the_tree_mask():
    """A prompt of 40 with completions of 50 and 38, outputs and gradients, in bfloat16, to its rounding."""
    if jax.devices()[0].platform not in ("gpu", "cuda"):
        pytest.skip("no NVIDIA GPU")
    slots = np.arange(128)
    until = np.where(slots < 40, 128, np.where(slots < 90, 90, 128)).astype(np.int32)[None]
    position = np.where(slots < 90, slots, slots - 50).astype(np.int32)[None]
    shapes = [
        (1, 128, CFG.kv_heads, CFG.group, 64),
        *[(1, 128, CFG.kv_heads, 64)] * 2,
        (1, 128, CFG.kv_heads, CFG.group, 64),
    ]
    q, k, v, g = (jax.random.normal(jax.random.key(i), s, jnp.bfloat16) for i, s in enumerate(shapes))

    def outputs(name: str) -> tuple:
        attend = attention_for(name, PackedRows(jnp.asarray(until), jnp.asarray(position)), CFG, layouts()[0])(128)
        out, back = jax.jit(lambda *x: jax.vjp(attend, *x))(q, k, v)
        return out, *back(g)

    for got, want in zip(outputs("cudnn"), outputs("plain"), strict=True):
        scale = float(jnp.abs(want).max())
        np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), atol=0.02 * scale)

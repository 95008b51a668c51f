"""Every attention implementation against the plain one, and every rematerialization policy: outputs and gradients.

Rows: a tree of three completions, packed sequences, padding at the end; layers with and without a sliding window.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from setups import FAMILIES, SMALL, layouts, make_params

from jaxrl_llm.errors import UserError
from jaxrl_llm.model import remat
from jaxrl_llm.model.attention import selection
from jaxrl_llm.model.attention.blockwise import BlockOptions, attend_blocks
from jaxrl_llm.model.attention.plain import PackedRows, attend, tree_mask
from jaxrl_llm.model.attention.selection import choose_attention
from jaxrl_llm.model.cache import UNLIMITED
from jaxrl_llm.model.config import ForwardOptions
from jaxrl_llm.model.transformer import hidden

SLIDING = FAMILIES["gemma2, window 5"]


def rows(slots: int) -> PackedRows:
    """Two rows: a prompt of 9 with completions of 20, 3 and 11, then a sequence of 13; and one sequence."""
    until, position = np.tile(np.arange(slots), (2, 1)), np.zeros((2, slots), int)
    until[0, :9], position[0, :9] = 43, np.arange(9)
    for start, end in ((9, 29), (29, 32), (32, 43)):
        until[0, start:end], position[0, start:end] = end, 9 + np.arange(end - start)
    until[0, 43:56], position[0, 43:56] = 56, np.arange(13)
    until[1, : slots - 2], position[1, : slots - 2] = slots - 2, np.arange(slots - 2)
    return PackedRows(until.astype(np.int32), position.astype(np.int32))


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "at_a_time", "window", "softcap"),
    [(16, 2**12, UNLIMITED, None), (8, 1, 6, 1.5), (100, 2**20, "traced", None)],
    ids=["several blocks at a time", "one at a time, sliding, capped", "one block, traced window"],
)
def test_blocks_are_attention_under_the_tree_mask(size, at_a_time, window, softcap):
    """61 slots: no multiple of a block. The reference is softmax in float64, its gradient by the formula."""
    both, options = rows(61), BlockOptions(size, 0.5, softcap, at_a_time)
    q, k, v, g = normal(0, 2, 61, 2, 3, 8), normal(1, 2, 61, 2, 8), normal(2, 2, 61, 2, 8), normal(3, 2, 61, 2, 3, 8)
    number = 6 if window == "traced" else window

    @jax.jit
    def blocks(q, k, v, g, traced):
        at = traced if window == "traced" else window
        out, back = jax.vjp(lambda *x: attend_blocks(*x, both, at, options), q, k, v)
        return out, *back(g)

    mask = np.asarray(tree_mask(both, number))
    for got, want in zip(blocks(q, k, v, g, jnp.int32(6)), by_formula(q, k, v, g, mask, softcap), strict=True):
        np.testing.assert_allclose(got, want, atol=5e-6)


def by_formula(q, k, v, g, mask, cap):
    """Output and gradients in float64; zeros for queries without keys."""
    q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
    raw = 0.5 * np.einsum("btkgh,bukh->bkgtu", q, k)
    scores = raw if cap is None else cap * np.tanh(raw / cap)
    weights = np.exp(scores) * mask[:, None, None]
    weights = weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)
    dw = np.einsum("btkgh,bukh->bkgtu", g, v)
    ds = weights * (dw - (weights * dw).sum(axis=-1, keepdims=True))
    ds = 0.5 * (ds if cap is None else ds * (1 - (scores / cap) ** 2))
    return (
        np.einsum("bkgtu,bukh->btkgh", weights, v),
        np.einsum("bkgtu,bukh->btkgh", ds, k),
        np.einsum("bkgtu,btkgh->bukh", ds, q),
        np.einsum("bkgtu,btkgh->bukh", weights, g),
    )


@pytest.mark.slow
def test_blocks_skip_masked_keys():
    """Values in fully masked blocks are NaN: a product with them would show."""
    first = PackedRows(*(jnp.asarray(x[:1]) for x in rows(64)))
    q, k, v = normal(0, 1, 64, 1, 1, 4), normal(1, 1, 64, 1, 4), normal(2, 1, 64, 1, 4)
    v[:, 56:] = np.nan
    out = attend_blocks(q, k, v, first, options=BlockOptions(size=8, at_a_time=1))
    np.testing.assert_array_equal(out[:, 56:], 0.0)
    want = attend(q[:, :56], k[:, :56], v[:, :56], tree_mask(first)[:, :56, :56])
    np.testing.assert_allclose(out[:, :56], want, atol=2e-6)


def test_blocks_in_bfloat16_sum_in_f32():
    both = rows(61)
    q, k, v, g = (jnp.asarray(normal(i, 2, 61, 2, *h, 8), jnp.bfloat16) for i, h in enumerate(((2,), (), (), (2,))))
    mask = np.asarray(tree_mask(both))

    @jax.jit
    def blocks(q, k, v, g):
        out, back = jax.vjp(lambda *x: attend_blocks(*x, both, options=BlockOptions(16, 0.5)), q, k, v)
        return out, *back(g)

    for got, want in zip(blocks(q, k, v, g), by_formula(q, k, v, g, mask, None), strict=True):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.05, rtol=0.02)


@cache
def gradients(sliding: bool, mesh: tuple[int, ...], forward: ForwardOptions):
    """Gradients of sum(hidden * random numbers), 0 at padding, for every parameter."""
    cfg, train = SLIDING if sliding else SMALL, layouts(mesh)[0]
    until, position = rows(128)
    tokens = np.random.default_rng(5).integers(0, 16, until.shape).astype(np.int32)
    g = normal(6, 2, 128, cfg.d_model) * (until > np.arange(128))[:, :, None]

    @jax.jit
    def loss(params):
        return jnp.sum(hidden(params, tokens, position, until, cfg, train, forward) * g)

    return jax.device_get(jax.grad(loss)(make_params(cfg, train)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sliding", "mesh", "forward"),
    [
        (True, (1, 1, 1), ForwardOptions("blocks", "none")),
        (False, (1, 2, 2), ForwardOptions("blocks", "layer")),
        (True, (1, 1, 1), ForwardOptions("splash", "layer")),
        (True, (1, 1, 1), ForwardOptions("plain", "attention")),
        (False, (1, 2, 2), ForwardOptions("plain", "offload")),
    ],
    ids=lambda x: f"{x.attention}-{x.remat}" if isinstance(x, ForwardOptions) else str(x),
)
def test_every_implementation_and_remat_policy_has_the_gradients_of_plain_attention(sliding, mesh, forward):
    """Reference: `plain` without rematerialization, on one device. Each leaf to 1e-5 of its largest entry."""
    want = jax.tree.leaves(gradients(sliding, (1, 1, 1), ForwardOptions("plain", "none")))
    for got, ref in zip(jax.tree.leaves(gradients(sliding, mesh, forward)), want, strict=True):
        assert np.max(np.abs(ref)) > 0
        np.testing.assert_allclose(got, ref, atol=1e-5 * np.max(np.abs(ref)))


def test_auto_depends_on_platform_and_length(monkeypatch):
    train = layouts()[0]
    assert [choose_attention("auto", slots, SMALL, train) for slots in (127, 128, 4096)] == [
        "plain",
        "blocks",
        "blocks",
    ]
    for platform, slots, want in [
        ("tpu", 1024, "splash"), ("tpu", 1025, "plain"), ("tpu", 512, "plain"), ("gpu", 1023, "plain"), ("gpu", 1024, "blocks"),
    ]:  # fmt: skip
        monkeypatch.setattr(selection, "_platform", lambda layout, platform=platform: platform)
        assert choose_attention("auto", slots, SMALL, train) == want


@pytest.mark.parametrize(("name", "slots", "message"), [("splash", 130, "multiple of 128"), ("cudnn", 128, "on cpu")])
def test_an_unsupported_implementation_is_refused_by_name(name, slots, message):
    with pytest.raises(UserError, match=f"update.attention: got {name}.*{message}"):
        choose_attention(name, slots, SMALL, layouts()[0])


def test_auto_remat_is_none_up_to_a_gigabyte():
    """SMALL has 2 layers of D 32, 48 heads of width 8 (twice 16 of queries, 8 of keys, 8 of values), twice, and an MLP of 64."""
    train, bytes_per_token = layouts()[0], 2 * 4 * (4 * 32 + 2 * 48 * 8 + 64 + 2 * 32 + 3 * 64)
    most = 2**30 // bytes_per_token
    assert [remat.choose_remat("auto", (n, 1), SMALL, train) for n in (most, most + 1)] == ["none", "layer"]
    assert remat.choose_remat("auto", (8 * most, 1), SMALL, layouts((8, 1, 1))[0]) == "none"
    assert remat.choose_remat("offload", (1, 1), SMALL, train) == "offload"

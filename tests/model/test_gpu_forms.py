"""What only programs for GPUs do (`Layout.on_gpu`, `platform_dependent(cuda=...)`), computed on CPUs: the same numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from setups import TINY, layouts, make_params

from jaxrl_llm.distribution import head
from jaxrl_llm.distribution.score import Scoring, score_tokens
from jaxrl_llm.model.linear import contract
from jaxrl_llm.model.products import dot, rounded_dot
from jaxrl_llm.model.quantized_weights import look_up, quantize
from jaxrl_llm.parallel import hosts
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.types import Batch

R, T = 8, 12
CFG = dataclasses.replace(TINY, vocab_size=64, layers=2)
MODELS = {
    "dense": CFG,
    "experts": dataclasses.replace(CFG, experts=4, experts_per_token=2),
    "untied head, soft cap": dataclasses.replace(CFG, tied_head=False, logit_softcap=5.0),
}


@pytest.fixture
def as_on_gpus(monkeypatch):
    """Return a function that makes layouts and products those of GPUs from then on."""

    def begin() -> None:
        jax.clear_caches()
        monkeypatch.setattr(Layout, "on_gpu", property(lambda self: True))
        monkeypatch.setattr(Layout, "on_cpu", property(lambda self: False))
        monkeypatch.setattr(
            jax.lax, "platform_dependent", lambda *args, default=None, **forms: forms.get("cuda", default)(*args)
        )

    # Tiles with several blocks and chunks, which begin early at the end.
    for name in ("CPU", "GPU"):
        monkeypatch.setattr(head, name, head.TileSize(logits=4 * 64, tokens=10))
    monkeypatch.setattr(head, "MIN_TOKENS", 8)
    monkeypatch.setattr(head, "BLOCK_MULTIPLE", 3)
    yield begin
    jax.clear_caches()


def batch() -> Batch:
    rng = np.random.default_rng(0)
    slot = np.tile(np.arange(T, dtype=np.int32), (R, 1))
    until = np.full((R, T), T, np.int32)
    mask = rng.random((R, T)) < 0.7
    mask[:, 0] = False
    numbers = [rng.normal(size=(R, T)).astype(np.float32) for _ in range(3)]
    tokens = rng.integers(0, 60, (R, T)).astype(np.int32)
    ones, zeros = np.ones((R, T), np.float32), np.zeros((R, T), np.int32)
    return Batch(tokens, slot, until, np.maximum(slot - 1, 0), zeros, zeros, mask, *numbers, ones)


def value_and_gradient(cfg, sizes):
    """A sum of weighted log-probs and entropies over all layers and the head, and its gradient."""
    train = layouts(sizes)[0]
    params, rows = make_params(cfg, train), hosts.put(batch(), train.sharding(("rows", None)))

    def loss(params, batch):
        found = score_tokens(params, batch, Scoring(cfg, train, cfg.vocab_size))
        return jnp.sum(jnp.where(batch.loss_mask, batch.weight * found.logprobs + 0.01 * found.entropy, 0.0))

    return jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(loss))(params, rows))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("dense", (2, 2, 2)),
        ("experts", (2, 2, 2)),
        pytest.param("untied head, soft cap", (2, 2, 2), marks=pytest.mark.soak),
        pytest.param("dense", (1, 1, 1), marks=pytest.mark.soak),
    ],
    ids=str,
)
def test_gradients_are_those_of_cpus(as_on_gpus, name, sizes):
    want = value_and_gradient(MODELS[name], sizes)
    as_on_gpus()
    got = value_and_gradient(MODELS[name], sizes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5 * np.abs(b).max()), got, want)


@pytest.mark.slow
def test_gradients_in_bfloat16_differ_by_roundings(as_on_gpus):
    """Parts are rounded before they are added over the mesh: by some 2^-8 of a number."""
    cfg = dataclasses.replace(CFG, compute="bfloat16")
    want = value_and_gradient(cfg, (2, 2, 2))
    as_on_gpus()
    got = value_and_gradient(cfg, (2, 2, 2))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = (np.asarray(x, np.float64).ravel() for x in (a, b))
        assert np.linalg.norm(a - b) <= 0.03 * np.linalg.norm(b)
        assert b.size == 1 or a @ b >= 0.999 * np.linalg.norm(a) * np.linalg.norm(b)


@pytest.mark.slow
def test_rows_of_an_embedding_and_their_gradient(as_on_gpus):
    """Cast before they cross the mesh: the same bits. Gradients add in f32; tokens come several times."""
    rng, layout = np.random.default_rng(0), layouts((2, 2, 2))[0]
    table, given = rng.normal(size=(16, 8)).astype(np.float32), rng.normal(size=(8, 5, 8)).astype(np.float32)
    index = rng.integers(0, 16, (8, 5)).astype(np.int32)
    where = layout.sharding(("vocab", "embed"))

    def both():
        rows = lambda table: look_up(table, index, jnp.bfloat16, layout)  # noqa: E731
        out, pullback = jax.vjp(jax.jit(rows), jax.device_put(table, where))
        return np.asarray(out.astype(jnp.float32)), np.asarray(pullback(jnp.asarray(given, jnp.bfloat16))[0])

    want = both()
    as_on_gpus()
    rows, gradient = both()
    np.testing.assert_array_equal(rows, want[0])
    np.testing.assert_allclose(gradient, want[1], atol=0.02)


def test_products_are_rounded_once(as_on_gpus):
    """Summed in f32, then rounded: at most a unit in the last place from the f32 sum, rounded; 8-bit products as well."""
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((6, 64), (64, 5)))
    exact = np.asarray(dot(a, b, (1,), (0,)))
    w = quantize(b.astype(jnp.float32), (0,), jnp.int8, groups=4)
    plain = np.asarray(contract(a, w))
    as_on_gpus()
    close = dict(rtol=2**-7, atol=2**-9)
    np.testing.assert_allclose(np.asarray(rounded_dot(a, b, (1,), (0,), jnp.bfloat16), np.float32), exact, **close)
    assert rounded_dot(a, b, (1,), (0,), jnp.float32).dtype == jnp.float32
    # Four groups, each rounded to 8 bits of mantissa.
    np.testing.assert_allclose(np.asarray(contract(a, w, dtype=jnp.bfloat16), np.float32), plain, atol=0.1)
    np.testing.assert_allclose(np.asarray(contract(a, w)), plain, rtol=1e-5, atol=1e-6)

"""Features in which model families differ, each by hand; whole families are tested in `test_parity`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from setups import FAMILIES, TINY, layouts

from jaxrl_llm.model import transformer
from jaxrl_llm.model.attention.plain import UNLIMITED
from jaxrl_llm.model.cache import empty_suffix
from jaxrl_llm.model.mlp import gated
from jaxrl_llm.model.transformer import layer_attentions, rms_norm, scanned_attentions


def test_norms_by_hand():
    """rms of (3, 4, 0, 0) is 5/2; Gemma multiplies by 1 + w."""
    x, weight = jnp.array([3.0, 4.0, 0.0, 0.0]), jnp.array([1.0, 0.5, 1.0, 1.0])
    cfg = dataclasses.replace(TINY, norm_eps=1e-12)
    np.testing.assert_allclose(rms_norm(x, weight, cfg), [1.2, 0.8, 0, 0], rtol=1e-6)
    plus_one = dataclasses.replace(cfg, norm_plus_one=True)
    np.testing.assert_allclose(rms_norm(x, weight, plus_one), [2.4, 2.4, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_of_a_norm_is_that_of_its_formula(dtype, plus_one):
    """`_over_rms` writes its gradient out; the formula's is the compiler's own."""
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.normal(size=(2, 7, 48)), dtype) for _ in range(2))
    weight, cfg = jnp.asarray(rng.normal(size=48), jnp.float32), dataclasses.replace(TINY, norm_plus_one=plus_one)

    def formula(x, weight):
        wide = x.astype(jnp.float32)
        wide = wide / jnp.sqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + cfg.norm_eps)
        return (wide * (1 + weight if plus_one else weight)).astype(dtype)

    got, want = (jax.vjp(f, x, weight) for f in (lambda x, w: rms_norm(x, w, cfg), formula))
    np.testing.assert_array_equal(got[0].dtype, dtype)
    # In bfloat16 the last step rounds to 8 bits.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 2**-7, "atol": 2**-7}
    np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in (got[0], want[0])), **tolerance)
    for mine, other in zip(got[1](g), want[1](g), strict=True):
        assert mine.dtype == other.dtype
        np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in (mine, other)), **tolerance)


def test_embeddings_are_scaled_by_a_rounded_root():
    """sqrt(3072) = 55.43, in bfloat16 55.5."""
    params = {"embed": jnp.ones((4, 3072))}
    cfg = dataclasses.replace(TINY, d_model=3072, scale_embedding=True, compute="bfloat16")
    got = transformer._embed(params, jnp.array([[1]]), cfg, layouts()[0])
    assert got.dtype == jnp.bfloat16 and float(got[0, 0, 0]) == 55.5


def test_activations_by_hand():
    """silu(1) = 1 / (1 + e^-1); gelu by tanh: (1 + tanh(sqrt(2 / pi) 1.044715)) / 2."""
    gate, up = jnp.array([1.0]), jnp.array([3.0])
    np.testing.assert_allclose(gated(gate, up, TINY), 3 / (1 + np.exp(-1)), rtol=1e-6)
    gelu = dataclasses.replace(TINY, activation="gelu_tanh")
    want = 1.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * 1.044715))
    np.testing.assert_allclose(gated(gate, up, gelu), want, rtol=1e-6)


def test_logits_are_capped():
    """2 tanh(x / 2)."""
    cfg = dataclasses.replace(TINY, d_model=1, logit_softcap=2.0)
    params, h = {"embed": jnp.array([[1.0], [-6.0]])}, jnp.array([[[1.0]]])
    want = 2 * np.tanh([0.5, -3.0])
    np.testing.assert_allclose(transformer.logits(params, h, cfg)[0, 0], want, rtol=1e-6)


def test_only_fields_that_differ_between_layers_are_scanned():
    """So a model with only sliding layers, or with none, has the program of one kind of layer."""
    assert all(scanned_attentions(FAMILIES[name])[1] == {} for name in ("llama3", "mistral, window 3", "qwen3-moe"))
    assert [kind.window for kind in layer_attentions(FAMILIES["mistral, window 3"])] == [3, 3]
    first, differ = scanned_attentions(FAMILIES["gemma2, window 5"])
    assert set(differ) == {"window"} and differ["window"].tolist() == [5, UNLIMITED] and first.window == 5
    _, differ = scanned_attentions(FAMILIES["gemma3, window 9"])
    assert set(differ) == {"window", "frequency"} and differ["frequency"].shape == (2, 4)


def test_suffix_caches_of_sliding_layers_are_rings():
    cache = jax.eval_shape(lambda: empty_suffix(FAMILIES["gemma2, window 5"], 3, 6, layouts()[1]))
    assert [x.shape for x in cache.k] == [x.shape for x in cache.v] == [(3, 2, 5, 8), (3, 2, 6, 8)]
    short = jax.eval_shape(lambda: empty_suffix(FAMILIES["gemma2, window 5"], 3, 4, layouts()[1]))
    assert [x.shape[2] for x in short.k] == [4, 4]

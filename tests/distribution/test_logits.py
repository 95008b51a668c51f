"""The token distribution: temperature, padding of the vocabulary, masks and kept tokens, with finite gradients."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.distribution.allowed_tokens import AllowedTokens
from jaxrl_llm.distribution.logits import entropy, kept_logprobs, process_logits

LOGITS = jnp.array([[1.0, 3.0, 3.0, 0.0, 9.0], [0.0, np.log(2.0), -1e4, 0.0, 9.0]], jnp.float32)


def test_by_hand():
    """exp = 1, 2, 0, 1 of 4 at temperature 1; squares, 1, 4, 0, 1 of 6, at 1/2; the fifth is padding."""
    row = jnp.stack([LOGITS[1]] * 2)
    with np.errstate(divide="ignore"):
        want = np.log([[1 / 4, 2 / 4, 0, 1 / 4, 0], [1 / 6, 4 / 6, 0, 1 / 6, 0]])
    got = np.array(process_logits(row, jnp.array([1.0, 0.5]), 4))
    assert got[0, 2] < -9e3 and np.isneginf(got[:, 4]).all()
    got[:, 2] = -np.inf
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(entropy(jnp.asarray(got)), [1.5 * np.log(2), np.log(6) - 4 / 6 * np.log(4)], rtol=1e-6)


def test_temperature_zero_is_uniform_over_the_largest_logits():
    logp = process_logits(LOGITS, jnp.zeros(2), 4)
    want = np.full((2, 5), -np.inf, np.float32)
    want[0, 1:3], want[1, 1] = -np.log(2.0), 0.0
    np.testing.assert_allclose(logp, want, rtol=1e-6)
    np.testing.assert_allclose(entropy(logp), [np.log(2.0), 0.0], rtol=1e-6)


def test_temperature_zero_is_the_limit():
    logp = process_logits(LOGITS, jnp.full(2, 1e-30), 4)
    np.testing.assert_allclose(np.exp(logp), np.exp(process_logits(LOGITS, jnp.zeros(2), 4)), atol=1e-7)


def test_nan_logits_give_nan():
    """Also at temperature 0, where no logit equals NaN and no token would be left."""
    x = LOGITS.at[:, 0].set(jnp.nan)
    assert np.isnan(process_logits(x, jnp.array([0.0, 1.0]), 4)[:, :4]).all()


def test_gradients_are_finite_with_padding_and_beside_temperature_zero():
    """d log p(1) / d logit = (indicator - p) / T; the entropy has a gradient too; a row at temperature 0 has none."""

    def loss(x):
        logp = process_logits(x, jnp.array([0.0, 0.5]), 4)
        return jnp.sum(logp[:, 1]), jnp.sum(entropy(logp))

    by_logp, by_entropy = map(np.asarray, jax.jit(jax.jacrev(loss))(LOGITS))
    np.testing.assert_array_equal(by_logp[0], 0.0)
    np.testing.assert_allclose(by_logp[1], np.array([-1 / 6, 2 / 6, 0, -1 / 6, 0]) / 0.5, atol=1e-6)
    np.testing.assert_array_equal(by_entropy[0], 0.0)
    p, h = np.array([1 / 6, 4 / 6, 1 / 6]), np.log(6) - 4 / 6 * np.log(4)
    np.testing.assert_allclose(by_entropy[1][[0, 1, 3]], -p * (np.log(p) + h) / 0.5, atol=1e-6)
    np.testing.assert_array_equal(by_entropy[1][[2, 4]], 0.0)


def test_tokens_that_are_not_allowed_have_probability_0():
    """exp = 1, 2, 0, 1: without token 1, of class 1, half and half; in the second row it is allowed. Token 4 is padding."""
    row = jnp.stack([LOGITS[1]] * 2)
    with np.errstate(divide="ignore"):
        want = np.log([[1 / 2, 0, 0, 1 / 2, 0], [1 / 4, 2 / 4, 0, 1 / 4, 0]])
    allowed = AllowedTokens(jnp.array([[0b001], [0b011]], jnp.uint32), None, jnp.array([[0, 1, 0, 0, 2]], jnp.uint8))
    got = np.array(process_logits(row, jnp.ones(2), 4, allowed))
    got[:, 2] = -np.inf
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_distribution_over_kept_tokens_by_hand():
    """Tokens 1 and 3 of exp = 1, 2, 0, 1: two thirds and one third, at temperature 1/2 four fifths and one fifth."""
    row, kept_tokens = jnp.stack([LOGITS[1]] * 2), jnp.array([[1, 3, -1]] * 2)
    with np.errstate(divide="ignore"):
        want = np.log([[2 / 3, 1 / 3, 0], [4 / 5, 1 / 5, 0]])
    np.testing.assert_allclose(kept_logprobs(row, jnp.array([1.0, 0.5]), kept_tokens), want, rtol=1e-6)


def test_gradients_over_kept_tokens():
    """d log p(1) / d logit = (indicator - p) / T over tokens 1 and 3; finite in a row without kept tokens."""
    kept_tokens = jnp.array([[1, 3, -1], [-1, -1, -1]])

    def loss(x):
        logp = kept_logprobs(x, jnp.array([0.5, 0.5]), kept_tokens)
        return jnp.sum(jnp.where(kept_tokens == 1, logp, 0.0)), jnp.sum(entropy(logp))

    by_logp, by_entropy = map(np.asarray, jax.jit(jax.jacrev(loss))(LOGITS[::-1]))
    np.testing.assert_allclose(by_logp, np.array([[0, 1 / 5, 0, -1 / 5, 0], [0] * 5]) / 0.5, atol=1e-6)
    assert np.isfinite(by_entropy).all() and np.abs(by_entropy[0, [0, 2, 4]]).max() == 0

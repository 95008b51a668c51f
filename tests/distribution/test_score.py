"""The one distribution: temperature, padding of the vocabulary and the limit at 0, with gradients that stay finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from setups import TINY, layouts

from jaxrl_llm.distribution.logits import entropy, kept_token_logprobs, process_logits
from jaxrl_llm.distribution.score import Scoring, score_tokens
from jaxrl_llm.types import Batch

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


def test_a_logit_that_is_not_a_number_stays_so():
    """At temperature 0 too: nothing equals it, so nothing would be left to draw."""
    x = LOGITS.at[:, 0].set(jnp.nan)
    assert np.isnan(process_logits(x, jnp.array([0.0, 1.0]), 4)[:, :4]).all()


def test_gradients_are_finite_with_padding_and_beside_temperature_zero():
    """d log p(1) / d logit = (indicator - p) / T; entropy's flows too; a row at temperature 0 has none."""

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


def test_barred_end_tokens_have_no_mass_by_hand():
    """exp = 1, 2, 0, 1: without token 1 half and half; the row that is not barred has it."""
    row = jnp.stack([LOGITS[1]] * 2)
    with np.errstate(divide="ignore"):
        want = np.log([[1 / 2, 0, 0, 1 / 2, 0], [1 / 4, 2 / 4, 0, 1 / 4, 0]])
    got = np.array(process_logits(row, jnp.ones(2), 4, (1, 4), jnp.array([True, False])))
    got[:, 2] = -np.inf
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_support_is_the_whole_distribution_by_hand():
    """Of exp = 1, 2, 0, 1 the tokens 1 and 3: two thirds and one third, at temperature 1/2 four fifths and one fifth."""
    row, kept_tokens = jnp.stack([LOGITS[1]] * 2), jnp.array([[1, 3, -1]] * 2)
    with np.errstate(divide="ignore"):
        want = np.log([[2 / 3, 1 / 3, 0], [4 / 5, 1 / 5, 0]])
    np.testing.assert_allclose(kept_token_logprobs(row, jnp.array([1.0, 0.5]), kept_tokens), want, rtol=1e-6)


def test_gradients_through_a_support_are_those_of_its_tokens():
    """d log p(1) / d logit = (indicator - p) / T over tokens 1 and 3; a row without a support has finite ones."""
    kept_tokens = jnp.array([[1, 3, -1], [-1, -1, -1]])

    def loss(x):
        logp = kept_token_logprobs(x, jnp.array([0.5, 0.5]), kept_tokens)
        return jnp.sum(jnp.where(kept_tokens == 1, logp, 0.0)), jnp.sum(entropy(logp))

    by_logp, by_entropy = map(np.asarray, jax.jit(jax.jacrev(loss))(LOGITS[::-1]))
    np.testing.assert_allclose(by_logp, np.array([[0, 1 / 5, 0, -1 / 5, 0], [0] * 5]) / 0.5, atol=1e-6)
    assert np.isfinite(by_entropy).all() and np.abs(by_entropy[0, [0, 2, 4]]).max() == 0


def test_bars_without_the_end_tokens_are_refused():
    ones = np.ones((1, 2), np.int32)
    batch = Batch(*[ones] * 6, ones > 0, *[ones.astype(np.float32)] * 4, eos_masked=ones > 0)
    with pytest.raises(ValueError, match="ends: got none"):
        score_tokens({}, batch, Scoring(TINY, layouts()[0], 16))

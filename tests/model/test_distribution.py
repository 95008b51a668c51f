"""The one distribution: temperature, padding of the vocabulary and the limit at 0, with gradients that stay finite."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.model.distribution import entropy, process_logits

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

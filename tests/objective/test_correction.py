"""Truncated importance sampling: weights and ratio by hand, what has a gradient, and the mutants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_losses import batch_of

from jaxrl_llm.config.loading import validate
from jaxrl_llm.distribution.score import TokenScores
from jaxrl_llm.errors import UserError
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.loss_config import (
    AutoCorrection,
    Clip,
    Dpo,
    NoCorrection,
    PolicyGradient,
    TruncatedImportance,
    resolve_correction,
)
from jaxrl_llm.objective.losses import policy_terms

CAP2 = TruncatedImportance(cap=2.0)
LN = np.log
# sampler's p, trainer's p before the first update, p now -> weight, ratio. The last is outside the loss.
SAMPLED, PROXIMAL, NOW = ([0.5, 0.2, 0.1, 0.4, 0.3], [0.4, 0.3, 0.5, 0.4, 0.3], [0.5, 0.3, 0.55, 0.2, 0.9])
WEIGHT, RATIO = [0.8, 1.5, 2.0, 1.0], [1.25, 1.0, 1.1, 0.5]
ADVANTAGE = np.array([[1.0, -2.0, 3.0, 1.0, 5.0]], np.float32)
MASK = np.array([[True, True, True, True, False]])


def logs(p):
    return LN(np.array([p], np.float32))


def a_batch(proximal=PROXIMAL):
    made = batch_of(MASK, logs(SAMPLED), ADVANTAGE)
    return made.replace(proximal_logprobs=None if proximal is None else logs(proximal))


def terms_of(now, data, correction=CAP2):
    cfg = PolicyGradient(surrogate=Clip(low=0.2, high=0.2))
    return policy_terms(TokenScores(now, jnp.zeros_like(now)), data, cfg, correction)


def loss_of(now, data, correction=CAP2):
    return jnp.sum(jnp.where(MASK, terms_of(now, data, correction).loss, 0.0))


def assert_by_hand(data):
    terms = terms_of(jnp.asarray(logs(NOW)), data)
    np.testing.assert_allclose(terms.means["ratio/mean"][0, :4], RATIO, rtol=1e-5)
    np.testing.assert_allclose(terms.means["mismatch/weight_mean"][0, :4], WEIGHT, rtol=1e-5)
    np.testing.assert_array_equal(terms.means["mismatch/truncated"][0], [False, False, True, False, False])
    # Ratio 1.25 is clipped to 1.2; 0.5 with a positive advantage is not clipped.
    np.testing.assert_allclose(terms.loss[0, :4], [-0.8 * 1.2, 1.5 * 2, -2 * 1.1 * 3, -0.5], rtol=1e-5)
    # d = ln(0.4 / 0.5): e^d - d - 1 = 0.8 + 0.22314 - 1.
    np.testing.assert_allclose(terms.means["mismatch/kl"][0, 0], 0.0231436, rtol=1e-4)
    np.testing.assert_allclose(terms.means["mismatch/mean_abs_dlogp"][0, :4], np.abs(LN([0.8, 1.5, 5, 1])), atol=1e-6)
    np.testing.assert_allclose(terms.maxima["mismatch/max_abs_dlogp"][0, 2], LN(5), rtol=1e-5)


def test_by_hand():
    assert_by_hand(a_batch())


def test_without_a_correction_the_ratio_is_to_the_sampler_and_nothing_is_weighted():
    terms = terms_of(jnp.asarray(logs(NOW)), a_batch(), NoCorrection())
    np.testing.assert_allclose(terms.means["ratio/mean"][0, :4], [1.0, 1.5, 5.5, 0.5], rtol=1e-5)
    np.testing.assert_allclose(terms.loss[0, :4], [-1.0, 3.0, -3.6, -0.5], rtol=1e-5)
    assert "mismatch/truncated" not in terms.means


def assert_gradient():
    """By central differences in f64 of -w A r with w fixed, where no bound is active."""
    now = logs(NOW).astype(np.float64)

    def by_hand(now):
        ratio, weight = np.exp(now[0, :4] - LN(PROXIMAL[:4])), np.array(WEIGHT)
        bounded = np.clip(ratio, 0.8, 1.2)
        return -np.sum(weight * np.minimum(ratio * ADVANTAGE[0, :4], bounded * ADVANTAGE[0, :4]))

    numeric = np.zeros_like(now)
    for i in range(now.shape[1]):
        step = np.zeros_like(now)
        step[0, i] = 1e-5
        numeric[0, i] = (by_hand(now + step) - by_hand(now - step)) / 2e-5
    got = jax.grad(loss_of)(jnp.asarray(now, jnp.float32), a_batch())
    np.testing.assert_allclose(got, numeric, rtol=1e-3, atol=1e-5)


def assert_gradient_of_the_only_update():
    """Ratio 1 whose gradient is that of log p, times min(now / sampled, cap), which has none: -w A."""
    got = jax.grad(loss_of)(jnp.asarray(logs(PROXIMAL)), a_batch(proximal=None))
    np.testing.assert_allclose(got[0], [-0.8, 1.5 * 2, -2.0 * 3, -1.0, 0.0], rtol=1e-5)


def test_gradient_is_the_surrogates_alone():
    assert_gradient()
    assert_gradient_of_the_only_update()


def test_mutant_with_the_weight_inside_the_gradient_is_killed(monkeypatch):
    monkeypatch.setattr(jax.lax, "stop_gradient", lambda x: x)
    with pytest.raises(AssertionError):
        assert_gradient_of_the_only_update()


def test_mutant_anchored_on_the_sampler_is_killed(monkeypatch):
    """The ratio to the sampler times the weight counts the mismatch twice."""
    monkeypatch.setattr("jaxrl_llm.objective.losses.anchored_on_proximal", lambda cfg, correction: False)
    for check in (lambda: assert_by_hand(a_batch()), assert_gradient):
        with pytest.raises(AssertionError):
            check()


def test_mutant_with_the_behavior_overwritten_is_killed():
    with pytest.raises(AssertionError):
        assert_by_hand(a_batch().replace(behavior_logprobs=logs(PROXIMAL)))


def test_a_token_outside_the_loss_may_be_as_unlikely_as_it_likes():
    data = a_batch().replace(proximal_logprobs=logs(PROXIMAL).copy())
    data.proximal_logprobs[0, 4], data.behavior_logprobs[0, 4] = 300.0, -300.0
    got = jax.grad(loss_of)(jnp.asarray(logs(NOW)).at[0, 4].set(-900.0), data)
    assert np.isfinite(got).all() and got[0, 4] == 0


def test_auto_corrects_what_is_quantized_and_nothing_else():
    auto = ObjectiveConfig().loss.correction
    assert auto == AutoCorrection()

    def of(correction, *dtypes):
        return resolve_correction(PolicyGradient(correction=correction), *dtypes)

    assert of(auto, "compute", "compute") == NoCorrection()
    assert of(auto, "int8", "compute") == of(auto, "compute", "int8") == TruncatedImportance(cap=2.0)
    assert of(NoCorrection(), "int8", "int8") == NoCorrection()
    assert of(TruncatedImportance(cap=5.0), "compute", "compute") == TruncatedImportance(cap=5.0)
    assert resolve_correction(Dpo(), "int8", "int8") == NoCorrection()


def test_the_config_names_what_is_wrong_with_a_correction():

    def given(**more):
        return validate({"objective": {"loss": {"correction": {"kind": "truncated_importance", **more}}}}, "a.yaml")

    assert given(cap=3).objective.loss.correction == TruncatedImportance(cap=3.0)
    name = r"objective\.loss\.correction"
    with pytest.raises(UserError, match=rf"a\.yaml: {name}\.cap: got 0, want"):
        given(cap=0)
    with pytest.raises(UserError, match=rf"a\.yaml: {name}\.caps: no such key, perhaps you meant {name}\.cap"):
        given(caps=1)

"""Every part of a policy-gradient loss, and every preset, against the oracle: advantages, the loss, and its gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import assess, batch_of, objective_of, package_loss
from parts import CASES, PARTS, STEP, by_oracle, by_package, with_loss

from jaxrl_llm.distribution.score import TokenScores
from jaxrl_llm.objective import losses
from jaxrl_llm.objective.loss_config import NoCorrection, PolicyGradient
from jaxrl_llm.objective.surrogates import SURROGATES


@pytest.mark.parametrize("name", PARTS)
def test_loss_and_gradient(name):
    want, got = by_oracle(name), by_package(name)
    np.testing.assert_allclose(got.losses, want.losses, rtol=1e-6, atol=1e-6)
    for leaf, gradient in want.gradients.items():
        np.testing.assert_allclose(got.gradients[leaf], gradient, rtol=1e-5, atol=1e-6, err_msg=f"of {leaf}")
        assert np.abs(gradient).max() > 1e-3, "nothing to see"


def test_before_the_first_update_the_proximal_policy_is_the_current_one():
    """It is then not scored separately, and the weight in its place has no gradient either."""
    preset, cfg = PARTS["everything"]
    case = CASES[0]._replace(proximal=CASES[0].now)
    found = assess(cfg, case)
    with jax.enable_x64(True):
        given = package_loss(cfg, case, found)[0], package_loss(cfg, case._replace(proximal=None), found)[0]
        args = package_loss(cfg, case, found)[1]
        (a, grad_a), (b, grad_b) = (jax.value_and_grad(of)(*args) for of in given)
    np.testing.assert_allclose([a, b], oracle.loss(preset, case, *preset.advantage(case)), rtol=1e-6)
    np.testing.assert_array_equal(grad_a, grad_b)


def test_the_gradient_of_dpo():
    cfg, case = objective_of("paper:dpo"), CASES[3]
    with jax.enable_x64(True):
        of, given = package_loss(cfg, case, assess(cfg, case), packed=True)
        got = np.asarray(jax.grad(of)(*given)).reshape(case.mask.shape)
    want = np.zeros(case.mask.shape)
    for at in map(tuple, np.argwhere(case.mask)):
        ends = []
        for step in (STEP, -STEP):
            moved = case.now.copy()
            moved[at] += step
            ends.append(oracle.dpo_loss(case._replace(now=moved)))
        want[at] = (ends[0] - ends[1]) / (2 * STEP)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-8)
    assert np.abs(want).max() > 1e-3


def test_an_exact_kl_is_the_scorers_own():
    """Over the vocabulary: in a distillation the whole loss, else weighted beside the surrogate."""
    case, rng = CASES[0], np.random.default_rng(0)
    cfg = with_loss()
    exact = rng.uniform(0, 1, case.mask.shape)
    with jax.enable_x64(True):
        batch = batch_of(case, assess(cfg, case), case.mask, "token", packed=False)
        scores = TokenScores(jnp.asarray(case.now), jnp.asarray(case.entropy), None, jnp.asarray(exact))
        total = lambda found: float(jnp.sum(jnp.where(batch.loss_mask, found.loss, 0.0) * batch.weight))  # noqa: E731
        alone = total(losses.distillation_terms(scores, batch))
        without = total(losses.policy_terms(scores, batch, cfg.loss, NoCorrection()))
        kl = dataclasses.replace(cfg.loss.kl, kind="full", weight=0.5)
        beside = total(losses.policy_terms(scores, batch, dataclasses.replace(cfg.loss, kl=kl), NoCorrection()))
    np.testing.assert_allclose(alone, exact[case.mask].mean(), rtol=1e-6)
    np.testing.assert_allclose(beside - without, 0.5 * exact[case.mask].mean(), rtol=1e-6)


def test_the_grid_has_every_variant_of_the_config():
    """A new surrogate, correction, ratio, KL or aggregation without a case here is an omission."""
    assert {type(cfg.loss.surrogate) for _, cfg in PARTS.values()} == set(SURROGATES)
    seen = {(field, getattr(cfg.loss, field)) for _, cfg in PARTS.values() for field in ("ratio", "aggregation")}
    kinds = {cfg.loss.kl.kind for _, cfg in PARTS.values()} | {"full"}
    for field in ("ratio", "aggregation"):
        options = PolicyGradient.__dataclass_fields__[field].type.__args__
        assert {value for name, value in seen if name == field} == set(options)
    assert kinds == set(type(with_loss().loss.kl).__dataclass_fields__["kind"].type.__args__)

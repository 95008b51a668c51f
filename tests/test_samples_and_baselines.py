"""The bandit of experiments/samples_and_baselines.py: its closed forms, its criteria on a small version, mutants that fail them."""

import numpy as np
import pytest

from experiments.samples_and_baselines import (
    BASELINES,
    Bandit,
    failures,
    gradients,
    make_bandit,
    measure_all,
    ratio,
    to_groups,
)
from jaxrl_llm.types import Credit, check


def small(samples=(2, 8), **baselines) -> dict:
    return measure_all(0, 0.4, samples, BASELINES | baselines, 2**18)


def advantages(groups, baseline_of) -> Credit:
    reward = groups.reward.reshape(len(groups.failure), -1)
    return Credit(np.float32(reward - baseline_of(reward)).reshape(-1, 1))


def test_the_criteria_hold():
    assert failures(small((1, 2, 8, 32))) == []


def test_with_few_samples_a_baseline_can_raise_the_variance():
    """Success 0.1: about (1 - J) K / (K - 1), 1.8 with K = 2 and 0.93 with K = 32."""
    run = measure_all(0, 0.1, (1, 2, 32), BASELINES, 2**17)
    assert 1.7 < ratio(run, 2) < 1.9 and 0.9 < ratio(run, 32) < 0.97 and ratio(run, 32, shifted=True) < 0.1


@pytest.mark.parametrize(
    "mutant, fails",
    [
        # The own sample is left inside the mean; or K / (K - 1) is forgotten, which is the same.
        (BASELINES["mean"], {"scale of leave-one-out", "closed form"}),
        # The own sample is left inside the sum, which is divided by K - 1.
        (
            lambda groups: advantages(groups, lambda r: r.sum(1, keepdims=True) / max(r.shape[1] - 1, 1)),
            {"scale of leave-one-out", "shift of leave-one-out", "closed form"},
        ),
        # The same number for all rewards.
        (lambda groups: advantages(groups, lambda r: 0.4), {"shift of leave-one-out"}),
    ],
    ids=["own sample in the mean", "own sample in the sum", "a constant"],
)
def test_a_wrong_leave_one_out_fails(mutant, fails):
    found = {line.split(",")[0] for line in failures(small(**{"leave-one-out": mutant}))}
    assert fails <= found


def test_a_mean_without_the_own_sample_fails():
    assert "scale of mean, K 2" in failures(small(mean=BASELINES["leave-one-out"]))


def test_the_gradient_of_one_group():
    """p = (1/2, 1/4, 1/4), arms 0 and 2 with advantages 1 and -1: ((1/2, -1/4, -1/4) - (-1/2, -1/4, 3/4)) / 2 = (1/2, 0, -1/2)."""
    bandit = Bandit(np.array([0.5, 0.25, 0.25]), np.array([1.0, 0.0, 0.0]))
    assert bandit.gradient.tolist() == [0.25, -0.125, -0.125]
    # |(1/2, -1/4, -1/4)|^2 = 3/8, |(-1/2, 3/4, -1/4)|^2 = 7/8.
    assert bandit.score_norm.tolist() == [0.375, 0.875, 0.875]
    assert gradients(bandit, np.array([[0, 2]]), np.array([[1.0, -1.0]])).tolist() == [[0.5, 0.0, -0.5]]


def test_the_closed_form_of_two_samples_by_enumeration():
    """All nine pairs of arms."""
    bandit = Bandit(np.array([0.5, 0.3, 0.2]), np.array([1.0, 0.0, 1.0]))
    arm = np.array([(a, b) for a in range(3) for b in range(3)])
    advantage = np.float64(BASELINES["leave-one-out"](to_groups(bandit.reward[arm])).advantage).reshape(arm.shape)
    each, prob = gradients(bandit, arm, advantage), bandit.probs[arm].prod(axis=1)
    mean = prob @ each
    np.testing.assert_allclose(mean, bandit.gradient, atol=1e-12)
    np.testing.assert_allclose(
        prob @ (each**2).sum(axis=1) - mean @ mean, bandit.variance_of_leave_one_out(2), rtol=1e-12
    )


def test_a_bandit_is_right_as_often_as_asked():
    for seed, success in ((0, 0.1), (1, 0.9)):
        bandit = make_bandit(seed, success)
        np.testing.assert_allclose([bandit.probs.sum(), bandit.probs @ bandit.reward], [1, success], rtol=1e-12)


def test_groups_are_complete():
    groups = check(to_groups(np.array([[0.0, 1.0], [1.0, 1.0]])))
    assert (
        groups.rollouts.prompt.tolist() == [0, 0, 1, 1] and groups.reward.tolist() == [0, 1, 1, 1] and groups.keep.all()
    )

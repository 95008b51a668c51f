"""Advantages against golden vectors, and what baselines do to the gradient of a policy small enough to enumerate."""

import itertools

import numpy as np
import pytest
from estimator_inputs import single_tokens, to_groups

from jaxrl_llm.objective.advantages import estimate
from jaxrl_llm.objective.group_estimators import BestWorst, Gpg, Grpo, LeaveOneOut, MeanOnly, Opo, PassAtK, Rloo

GOLDEN = np.array([[1, 0, 0, 0.5]], np.float32)
# Of a group alone, with a baseline: what is added to all its rewards does not matter.
BASELINED = [Grpo(), MeanOnly(), Rloo(), LeaveOneOut(), PassAtK(), Opo(), Gpg(), BestWorst()]
# A reward that is not 0 is a part of the whole batch's scale.
ALONE = [cfg for cfg in BASELINED if not isinstance(cfg, Gpg)]
CENTERED = [Grpo(), MeanOnly(), Rloo()]
KIND = {"ids": lambda cfg: cfg.kind}


def of(cfg, reward):
    """Advantages [P G]."""
    reward = np.asarray(reward)
    return estimate(cfg, single_tokens(reward)).advantage.reshape(reward.shape)


@pytest.mark.parametrize(
    "cfg, want",
    [
        (Grpo(), [1.30530975, -0.78318585, -0.78318585, 0.26106195]),  # TRL
        (Grpo(eps=1e-6), [1.30557969, -0.78334782, -0.78334782, 0.26111594]),  # verl
        (Grpo(eps=1e-9), [1.30558242, -0.78334945, -0.78334945, 0.26111648]),  # OpenRLHF
        (MeanOnly(), [0.625, -0.375, -0.375, 0.125]),
        (Rloo(), [0.83333333, -0.5, -0.5, 0.16666667]),
    ],
    ids=["grpo as TRL", "grpo as verl", "grpo as OpenRLHF", "mean_only", "rloo"],
)
def test_golden_vectors(cfg, want):
    np.testing.assert_allclose(of(cfg, GOLDEN)[0], want, atol=5e-9)


def test_rloo_is_the_reward_less_the_mean_of_the_others():
    reward = np.random.default_rng(0).uniform(size=(3, 5)).astype(np.float32)
    others = (reward.sum(axis=1, keepdims=True) - reward) / 4
    np.testing.assert_allclose(of(Rloo(), reward), reward - others, atol=1e-6)


@pytest.mark.parametrize("lone", range(8))
@pytest.mark.parametrize(
    ("low", "high"),
    [(0.1, 1.0), (1e6 + 0.0625, 1e6 + 1.0), (1e30, 2.1e30), (-0.3, 0.7), (1 / 3, 1.0), (0.0, 2.0**-140)],
)
def test_leave_one_out_of_equal_others(low, high, lone):
    """One of eight has d more than the others. It gets d: the others' std is 0. Of the others of each other one, seven, one has d
    more: (-d / 7) / (d / sqrt(7)) = -1 / sqrt(7)."""
    reward = np.full((1, 8), low, np.float32)
    reward[0, lone] = high
    d = float(np.float32(high)) - float(np.float32(low))
    want = np.full(8, -1 / np.sqrt(7))
    want[lone] = d
    np.testing.assert_allclose(of(LeaveOneOut(eps=0), reward)[0], want, rtol=1e-14)
    # As its source has it, 1e-6 beside a std of d / sqrt(7).
    want[np.arange(8) != lone] *= d / (d + 1e-6 * np.sqrt(7))
    np.testing.assert_allclose(of(LeaveOneOut(), reward)[0], want, rtol=1e-14)


@pytest.mark.parametrize("cfg", BASELINED, **KIND)
def test_groups_do_not_mix_and_order_does_not_matter(cfg):
    rng = np.random.default_rng(1)
    reward = rng.uniform(size=(6, 8)).astype(np.float32)
    advantage = of(cfg, reward)
    np.testing.assert_array_equal(of(cfg, reward[[4, 1]]), advantage[[4, 1]])
    order = rng.permutation(8)
    np.testing.assert_array_equal(of(cfg, reward[:, order]), advantage[:, order])
    if cfg in CENTERED:
        np.testing.assert_allclose(advantage.sum(axis=1), 0, atol=1e-12)


@pytest.mark.parametrize("cfg", ALONE, **KIND)
def test_a_constant_added_to_all_rewards_changes_nothing(cfg):
    # Multiples of 1/8 and shifts by them are exact, so equality is to the bit.
    reward = np.random.default_rng(2).integers(0, 9, (50, 6)).astype(np.float32) / 8
    for shift in (1.0, -7.5, 1024.0):
        np.testing.assert_array_equal(of(cfg, reward + np.float32(shift)), of(cfg, reward))


@pytest.mark.parametrize("cfg", BASELINED, **KIND)
def test_equal_rewards_earn_exactly_nothing(cfg):
    for size, value in ((5, 0.9532), (3, 0.9532), (6, 0.3), (7, 1e-30), (12, 1e30)):
        np.testing.assert_array_equal(of(cfg, np.full((2, size), value, np.float32)), 0.0)


@pytest.mark.parametrize("cfg", BASELINED, **KIND)
def test_a_group_without_rewards_is_dropped_and_earns_nothing(cfg):
    """The advantages of the others do not change."""
    reward = np.array([[0, 1, 0], [np.nan] * 3, [1, 0, 1]], np.float32)
    groups = to_groups(reward)
    advantage = cfg(groups.replace(keep=~np.isnan(groups.reward))).advantage[:, 0].reshape(3, 3)
    np.testing.assert_array_equal(advantage[1], 0)
    np.testing.assert_array_equal(advantage[[0, 2]], of(cfg, reward[[0, 2]]).astype(np.float32))


# The toy: a softmax policy over arms a with fixed rewards. grad log p(a) = e_a - p, so dJ/dtheta_a = p_a (r_a - J).
P = np.exp([0.0, 0.7, -0.4, 0.2])
P /= P.sum()
REWARD = np.array([0.0, 1.0, 0.3, 0.7], np.float32)
GRADIENT = P * (REWARD - P @ REWARD)
SCORES = np.eye(len(P)) - P


def no_baseline(reward: np.ndarray) -> np.ndarray:
    return reward


def rloo(reward: np.ndarray) -> np.ndarray:
    return of(Rloo(), reward)


def mean_only(reward: np.ndarray) -> np.ndarray:
    return of(MeanOnly(), reward)


def grpo(reward: np.ndarray) -> np.ndarray:
    return of(Grpo(), reward)


def estimates(advantage, arms: np.ndarray, reward: np.ndarray = REWARD, scores: np.ndarray = SCORES) -> np.ndarray:
    """Policy gradients [N arms] of N groups of sampled arms [N K]: the mean over the group of A_k grad log p(a_k)."""
    return np.einsum("nk,nka->na", advantage(reward[arms]).astype(np.float64), scores[arms]) / arms.shape[1]


def sample_arms(rng: np.random.Generator, groups: int, samples: int) -> np.ndarray:
    return rng.choice(len(P), p=P, size=(groups, samples))


def exactly(advantage, samples: int, reward: np.ndarray = REWARD) -> tuple[np.ndarray, float]:
    """Mean and trace of the covariance of the estimate, over all groups there are."""
    arms = np.array(list(itertools.product(range(len(P)), repeat=samples)))
    weight, each = P[arms].prod(axis=1), estimates(advantage, arms, reward)
    mean = weight @ each
    return mean, float(weight @ ((each - mean) ** 2).sum(axis=1))


def test_variance_falls_as_one_over_the_number_of_samples():
    rng, sizes = np.random.default_rng(3), 2 ** np.arange(7)
    variance = [estimates(no_baseline, sample_arms(rng, 20_000, k)).var(axis=0).sum() for k in sizes]
    slope = np.polyfit(np.log(sizes), np.log(variance), 1)[0]
    print(f"slope {slope:.4f}")
    assert abs(slope + 1) < 0.05


def test_rloo_is_unbiased():
    sampled = estimates(rloo, sample_arms(np.random.default_rng(4), 50_000, 4)).mean(axis=0)  # 2e5 samples
    error = np.linalg.norm(sampled - GRADIENT) / np.linalg.norm(GRADIENT)
    print(f"relative error {error:.4f}")
    assert error < 0.02
    for samples in (2, 3, 5):
        np.testing.assert_allclose(exactly(rloo, samples)[0], GRADIENT, atol=1e-7)


def test_the_mean_of_the_group_shrinks_the_gradient():
    """By 1 - 1/K: exactly over all groups, and within 1 % in 2e6 samples projected on the true gradient."""
    for samples in (2, 3, 5):
        np.testing.assert_allclose(exactly(mean_only, samples)[0], GRADIENT * (1 - 1 / samples), atol=1e-7)
    for samples in (2, 4, 8):
        mean = estimates(mean_only, sample_arms(np.random.default_rng(5), 2_000_000 // samples, samples)).mean(axis=0)
        ratio = mean @ GRADIENT / (GRADIENT @ GRADIENT)
        print(f"K {samples}: ratio {ratio:.4f}, want {1 - 1 / samples:.4f}")
        assert abs(ratio / (1 - 1 / samples) - 1) < 0.01


def test_shifting_all_rewards_moves_only_the_estimate_without_baseline():
    arms, shift = sample_arms(np.random.default_rng(6), 1000, 8), np.float32(3.0)
    for advantage in (mean_only, rloo, grpo):
        np.testing.assert_allclose(estimates(advantage, arms, REWARD + shift), estimates(advantage, arms), atol=1e-6)
    before, after = exactly(no_baseline, 1)[1], exactly(no_baseline, 1, REWARD + shift)[1]
    assert after - before >= shift**2 * (P @ (SCORES**2).sum(axis=1))


def test_a_baseline_cuts_the_variance():
    """Ten arms, equally likely, four of them right: J = 0.4. At K = 8, at most 0.75 of the variance without a baseline.

    By hand, for K large: E|s|^2 = 0.9 and |grad J|^2 = 0.024, so (0.24 * 0.9 - 0.024) / (0.4 * 0.9 - 0.024) = 0.57.
    """
    reward, scores = np.repeat(np.float32([1, 0]), [4, 6]), np.eye(10) - 0.1
    arms = np.random.default_rng(7).integers(0, 10, (20_000, 8))
    with_rloo, without = (estimates(a, arms, reward, scores).var(axis=0).sum() for a in (rloo, no_baseline))
    print(f"variance with RLOO / without: {with_rloo / without:.3f}")
    assert 0.57 < with_rloo / without <= 0.75

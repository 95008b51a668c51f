"""Bounds of advantages, by hand, and the errors of larger ones."""

import numpy as np
import pytest
from estimator_inputs import single_tokens

from jaxrl_llm.errors import AdvantageError
from jaxrl_llm.objective.advantages import bound, estimate
from jaxrl_llm.objective.estimator import AdvantageEstimate, sequence_rewards
from jaxrl_llm.objective.group_estimators import (
    BestWorst,
    Gdpo,
    Gpg,
    Grpo,
    LeaveOneOut,
    MaxRl,
    MeanOnly,
    Opo,
    PassAtK,
    Raw,
    Rloo,
)
from jaxrl_llm.objective.reward_kl import RewardKl
from jaxrl_llm.objective.token_estimators import Gae, ReinforcePlusPlus

pytestmark = pytest.mark.filterwarnings("error")

# --- how large: one success of four rewards, one token per sequence -------------------------------------------------------------


ONE = [[1, 0, 0, 0]]
QUARTERS = [[1, 0, 0, 0], [0.25] * 4]
ATTAINED = [
    (Grpo(eps=0), ONE, 1.5),  # 3 / sqrt(4)
    (Grpo(eps=0, std="population"), ONE, 3**0.5),
    (Grpo(eps=0, mean_over="batch", std_over="batch"), [[1, 0, 0, 0], [0] * 4], 7 / 8**0.5),
    (Grpo(eps=0, std_over="batch"), QUARTERS, (7 * 3 / 4) ** 0.5),  # the other group is at this one's mean
    (MeanOnly(), ONE, 0.75),
    (Rloo(), ONE, 1.0),
    (Rloo(whiten=True), ONE, 1.5),
    (LeaveOneOut(eps=0), [[1, 0]], 1.0),
    (MaxRl(), ONE, 3.0),  # 0.75 / 0.25
    (PassAtK(eps=0), ONE, 2.0),  # s = 1 / 2
    (PassAtK(scale=False), ONE, 1.0),
    (Gpg(), ONE, 3.0),  # 0.75 * 4 / 1
    (Gdpo(eps=0), ONE, 1.5),
    (Raw(), ONE, 1.0),
    (BestWorst(), ONE, 1.0),
    (ReinforcePlusPlus(), ONE, 1.5),
    (ReinforcePlusPlus(variance="population"), ONE, 3**0.5),
    (ReinforcePlusPlus(baseline=True), ONE, 1.5),
    (Gae(), ONE, 1.5),
    # Of several groups, that of the largest, or of the largest range; a group of one has neither.
    (Grpo(eps=0), [[1, 0], [1, 0, 0, 0], [9]], 1.5),
    (Grpo(eps=0, std_over="batch"), [[1, 0, 0, 0], [0.25] * 3, [0.25]], (7 * 3 / 4) ** 0.5),
    (MeanOnly(), [[3, 2], [1, 0, 0, 0], [9]], 0.75),
    (Rloo(), [[0.5, 0, 0, 0], [2, 1], [9]], 1.0),
    (LeaveOneOut(eps=0), [[1, 0], [9]], 1.0),
    (MaxRl(), [[1, 0], [1, 0, 0, 0], [9]], 3.0),
    (PassAtK(eps=0), [[1, 0], [1, 0, 0, 0], [9]], 2.0),
    (PassAtK(scale=False), [[0.5, 0, 0], [2, 1], [9]], 1.0),
    (Gpg(), [[1, 0, 0, 0], [0]], 3.75),  # 0.75 * 5 / 1
    (Raw(), [[1, 0], [9]], 9.0),
    (MeanOnly(), [[9]], 0.0),
]


@pytest.mark.parametrize(("cfg", "reward", "want"), ATTAINED, ids=repr)
def test_bounds_by_hand_are_reached(cfg, reward, want):
    inputs = single_tokens(reward)
    assert bound(cfg, inputs) == pytest.approx(want, rel=1e-12)
    # Of the whitening, 1e-4 beside a std of 2/3.
    np.testing.assert_allclose(np.abs(estimate(cfg, inputs).advantage).max(), want, rtol=2e-4)


def test_the_bound_of_opo_is_the_range():
    """Reached as the lengths of the others grow: r - sum(length r) / sum(length) = 1 - 1 / 13 with lengths 1, 4, 4, 4."""
    inputs = single_tokens(ONE)._replace(mask=np.arange(4) < np.array([1, 4, 4, 4])[:, None])
    assert bound(Opo(), inputs) == 1
    np.testing.assert_allclose(estimate(Opo(), inputs).advantage[0], 12 / 13, rtol=1e-15)


def test_the_bound_of_leave_one_out_scales_where_the_others_differ():
    """The others of the first are 1/4 apart: std 0.25 / sqrt(2 * 2) or more, so 1 / 0.125; the others of the second have 1."""
    assert bound(LeaveOneOut(eps=0), single_tokens([[1, 0, 0, 0.25]])) == 8


def by_differences_of_sums(cfg, inputs):
    """`LeaveOneOut.estimate` as it was."""
    score = sequence_rewards(inputs)
    n = len(score) - 1
    shifted = score - score[0]
    mean = (shifted.sum() - shifted) / n
    square = ((shifted**2).sum() - shifted**2) / n
    std = np.sqrt(np.maximum(square - mean**2, 0.0) * (n / (n - 1)))
    away = shifted - mean
    return AdvantageEstimate(np.where(std > 0, away / (std + cfg.eps), away))


def test_the_guard_names_an_estimator_that_leaves_its_bound(monkeypatch):
    """The others of the seven have 0.9 apart, so a std of 0.9 / sqrt(2 * 6) or more: 3.4641 less what eps takes."""
    monkeypatch.setattr(LeaveOneOut, "estimate", by_differences_of_sums)
    message = r"objective\.advantage\.kind leave_one_out: got an advantage of 8898\d\d, want at most 3\.46409, .* bug"
    with pytest.raises(AdvantageError, match=message) as error:
        estimate(LeaveOneOut(), single_tokens([[1.0] + [0.1] * 7]))
    assert error.value.exit_code == 4


# --- numbers that float32 does not hold -----------------------------------------------------------------------------------------

MAX = float(np.finfo(np.float32).max)
ENDS = np.float32([[MAX, -MAX, -MAX, -MAX]])


@pytest.mark.parametrize(
    ("cfg", "reward", "size"),
    [
        (Rloo(), ENDS, "6.80565e\\+38"),  # twice the largest
        (MeanOnly(), ENDS, "5.10424e\\+38"),  # 3/4 of that
        (Opo(), ENDS, "5.10424e\\+38"),
        (Gpg(), [[MAX, 0, 0, 0]], "1.02085e\\+39"),  # 3/4 of the largest, times 4
        (MaxRl(), [[3e38, -3e38, 1, 0]], "1.2e\\+39"),  # over a mean of 1/4
        (LeaveOneOut(eps=0), [[3e38, 0, 0, 2.0**-140]], "[0-9.]+e\\+80"),
        (PassAtK(scale=False), ENDS, "6.80565e\\+38"),
    ],
    ids=repr,
)
def test_an_advantage_that_float32_does_not_hold_ends_the_run_by_name(cfg, reward, size):
    message = rf"objective\.advantage\.kind {cfg.kind}: got advantages of {size}, want at most 3\.40282e\+38, .*"
    todo = r": rewards reach 3.*e\+38; bound what the graders return, or lower their reward\.graders\.weight"
    with pytest.raises(AdvantageError, match=message + todo) as error:
        estimate(cfg, single_tokens(reward))
    assert error.value.exit_code == 4


@pytest.mark.parametrize("cfg", [Grpo(), Rloo(whiten=True), PassAtK(), Gdpo(), ReinforcePlusPlus(), Gae()], ids=repr)
def test_rewards_of_any_size_have_advantages_that_are_divided_by_a_std(cfg):
    largest = np.abs(estimate(cfg, single_tokens(ENDS)).advantage).max()
    # Of gdpo, 1e-4 beside a std of 1.
    np.testing.assert_allclose(largest, 2.0 if isinstance(cfg, PassAtK) else 1.5, rtol=1.01e-4)


def test_returns_that_float32_does_not_hold_are_named():
    inputs = single_tokens([[MAX, 0.0]], values=np.full((2, 1), -1e38, np.float32))
    with pytest.raises(AdvantageError, match=r"kind gae: got advantages of 4\.40282e\+38"):
        estimate(Gae(whiten=False), inputs)
    diverged = single_tokens([[1.0, 0.0]], values=np.float32([[np.nan], [0.0]]))
    with pytest.raises(AdvantageError, match=r"kind gae: got values of the critic of nan, .* learning rate"):
        estimate(Gae(), diverged)


@pytest.mark.parametrize("to", ["token_reward", "late_reward"])
def test_a_kl_that_float32_does_not_hold_is_named(to):
    """k3 of a token that the sampler holds for e^-900 as probable as the reference does is e^900."""
    mask = np.ones((2, 1), bool)
    far = RewardKl(kind="k3", weight=0.1)(np.float32([[-900.0], [0.0]]), np.zeros((2, 1)), mask)
    with pytest.raises(AdvantageError, match=r"got (late )?rewards per token of inf, .* objective\.reward_kl\.kind"):
        estimate(Rloo(), single_tokens([[1.0, 0.0]], **{to: far}))


def test_k3_is_never_below_zero():
    d = np.random.default_rng(0).normal(0, 1e-6, (1000, 1))
    for scale in (1.0, 1e-4, 1e-9):
        paid = RewardKl(kind="k3", weight=1.0)(scale * d, np.zeros_like(d), np.ones_like(d, bool))
        assert (paid <= 0).all()

"""Credit of steps: `grpo_steps`, and the returns-to-go of estimators per token, by hand."""

import numpy as np
import pytest
from estimator_inputs import grouping, single_tokens, to_groups
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import ragged_groups

from jaxrl_llm.config.consistency import training_problems
from jaxrl_llm.config.loading import validate
from jaxrl_llm.objective.advantages import bound, estimate
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.credit import make_advantage
from jaxrl_llm.objective.estimator import EstimatorInputs
from jaxrl_llm.objective.group_estimators import Grpo, MeanOnly
from jaxrl_llm.objective.reward_kl import RewardKl
from jaxrl_llm.objective.rules import drops_equal_rewards, refusals
from jaxrl_llm.objective.token_estimators import Gae, GrpoSteps, ReinforcePlusPlus
from jaxrl_llm.types import Scores

pytestmark = pytest.mark.filterwarnings("error")
N = np.nan
ROOT2 = 2**0.5


def with_steps(steps, reward=None, **more):
    """Groups of lists of rows of three tokens: the reward at the last token of each step. `reward`: by default a row's mean."""
    rows = [row for group in steps for row in group]
    flat = np.float32(rows)
    means = np.nanmean(flat, axis=1) if reward is None else np.float32(reward)
    groups = to_groups(np.split(means, np.cumsum([len(group) for group in steps])[:-1]))
    return groups.replace(step_reward=flat, **more)


def credit(cfg, groups, **objective):
    return make_advantage(ObjectiveConfig(advantage=cfg, **objective), [1.0])(groups, Scores())


def test_steps_of_a_group_are_normalized_together():
    """Steps 1, 0 | 1, 1, 0 | 0 of three rows: mean 1/2, population std 1/2, so 1 is 1 and 0 is -1. From the end: 1 - 1, -1 | 1 + 1
    - 1, 1 - 1, -1 | -1. The other group has 2, 6: -1 and 1, as if it were alone."""
    groups = with_steps([[[N, 1, 0], [1, 1, 0], [N, N, 0]], [[N, 2, 6]]])
    want = [[0, 0, -1], [1, 0, -1], [-1, -1, -1], [0, 0, 1]]
    np.testing.assert_array_equal(credit(GrpoSteps(std="population", eps=0), groups).advantage, want)


def test_the_std_divides_by_steps_less_one_and_has_an_eps():
    """Steps 1, 0: sample std sqrt(1/2), away by 1/2."""
    groups = with_steps([[[N, N, 1], [N, N, 0]]])
    a = 0.5 / (0.5**0.5 + 1e-4)
    np.testing.assert_allclose(credit(GrpoSteps(), groups).advantage, [[a] * 3, [-a] * 3], rtol=1e-6)
    np.testing.assert_array_equal(credit(GrpoSteps(), groups).advantage, credit(Grpo(), groups).advantage)


def test_equal_steps_give_nothing_whatever_their_number():
    groups = with_steps([[[0.1, 0.1, 0.1], [N, N, 0.1]], [[N, N, 7], [7, N, 7]]])
    assert not credit(GrpoSteps(eps=0), groups).advantage.any()


def test_equal_means_teach_where_steps_differ():
    """Both rows have a mean of 1/2: an advantage per row is 0. Steps 1, 0 | 0, 1: 1, -1 | -1, 1, which sum to 0 over each row."""
    groups = with_steps([[[N, 1, 0], [N, 0, 1]]])
    assert not credit(Grpo(eps=0), groups).advantage.any()
    want = [[0, 0, -1], [0, 0, 1]]
    np.testing.assert_array_equal(credit(GrpoSteps(std="population", eps=0), groups).advantage, want)


def test_tokens_that_were_not_sampled_get_nothing_and_pass_credit_on():
    groups = with_steps([[[1, N, 0], [N, N, 0], [N, N, 1]]])
    sampled = np.array([[True, False, True], [True, False, True], [True, True, True]])
    groups = groups.replace(rollouts=groups.rollouts.replace(sampled=sampled))
    want = [[0, 0, -1], [-1, 0, -1], [1, 1, 1]]
    np.testing.assert_array_equal(credit(GrpoSteps(std="population", eps=0), groups).advantage, want)


@pytest.mark.parametrize("over", ["sampled", "kept"])
def test_the_rows_that_count_are_those_whose_steps_do(over):
    """Steps 1, 0 | 0 | 1; the second row was dropped. sampled: mean 1/2, deviations 1/2; over 1/2: 1, -1 | -1 | 1. kept: 1, 0, 1:
    mean 2/3, deviations 1/3, -2/3, 1/3 over the population std sqrt(2)/3."""
    groups = with_steps([[[N, 1, 0], [N, N, 0], [N, N, 1]]], keep=np.array([True, False, True]))
    found = credit(GrpoSteps(std="population", eps=0), groups, baseline_over=over).advantage
    if over == "sampled":
        want = [[0, 0, -1], [-1, -1, -1], [1, 1, 1]]
    else:
        high, low = 1 / ROOT2, -2 / ROOT2
        want = [[high + low, high + low, low], [0, 0, 0], [high] * 3]
    np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-7)


def test_a_kl_in_the_reward_counts_for_the_step_of_its_token():
    """k1 of 1 at the first token, times 1: steps 1, 0 | 1, 0 become 0, 0 | 1, 0. Mean 1/4, population std sqrt(3)/4."""
    groups = with_steps([[[N, 1, 0], [N, 1, 0]]])
    reference = np.zeros((2, 3), np.float32)
    reference[0, 0] = -1
    make = make_advantage(
        ObjectiveConfig(advantage=GrpoSteps(std="population", eps=0), reward_kl=RewardKl(weight=1.0)), [1.0]
    )
    high, low = 3**0.5, -(3**-0.5)
    want = [[2 * low, 2 * low, low], [high + low, high + low, low]]
    np.testing.assert_allclose(make(groups, Scores(reference_logprobs=reference)).advantage, want, rtol=1e-6)


def test_estimators_per_token_credit_steps_where_they_end():
    """Steps 1, 3 and 5 of one row, whose reward is their mean, 3: from the end 3, 3 + 1; not the 3 of the row."""
    inputs = EstimatorInputs(
        reward=np.float32([2, 5]), reward_components=np.float32([[2], [5]]), component_weights=np.ones(1), groups=grouping(1, 1),
        mask=np.ones((2, 3), bool), values=np.zeros((2, 3), np.float32), step_reward=np.float32([[N, 1, 3], [N, N, 5]]),
    )  # fmt: skip
    found = estimate(Gae(gamma=1.0, lam=1.0, whiten=False), inputs)
    np.testing.assert_array_equal(found.advantage, [[4, 4, 3], [5, 5, 5]])
    np.testing.assert_array_equal(found.returns, found.advantage)
    # Whitened: 4, 4, 3, 5, 5, 5 have a mean of 26/6 and a population variance of 20/36.
    white = estimate(ReinforcePlusPlus(variance="population"), inputs).advantage
    np.testing.assert_allclose(white, (np.array([[4, 4, 3], [5, 5, 5]]) - 26 / 6) / (20**0.5 / 6), rtol=1e-6)
    # One number per row: the reward.
    assert estimate(MeanOnly(), inputs._replace(groups=grouping(2))).advantage.tolist() == [-1.5, 1.5]


def test_the_bound_is_attained_and_grows_with_the_steps_of_a_row():
    """One row 1, 1 and one 0, 0: over the population std 1, 1 | -1, -1. The first token has 2, the bound: sqrt(4 * 2 * 2 / 4)."""
    inputs = single_tokens([[1, 0]])._replace(mask=np.ones((2, 2), bool), step_reward=np.float32([[1, 1], [0, 0]]))
    cfg = GrpoSteps(std="population", eps=0)
    assert np.abs(estimate(cfg, inputs).advantage).max() == bound(cfg, inputs) == 2
    # One step each: that of grpo, sqrt(2 - 1).
    assert bound(cfg, inputs._replace(step_reward=None)) == 1
    assert bound(cfg, single_tokens([[3]])) == 0


def test_a_single_token_of_several_steps_is_within_its_bound():
    """Steps that end in one token count with their sum, which may exceed the mean that is the row's reward."""
    inputs = single_tokens([[1]])._replace(step_reward=np.float32([[2]]))
    assert estimate(ReinforcePlusPlus(), inputs).advantage.tolist() == [[2]]


few = settings(max_examples=40, derandomize=True, database=None, deadline=None)
batches = st.builds(
    lambda seed, size: ragged_groups(np.random.default_rng(seed), size, 1)[0],
    st.integers(0, 999),
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
)


@few
@given(groups=batches, eps=st.sampled_from([0.0, 1e-4]), level=st.sampled_from([0.1, -3.0, 1e30]))
def test_equal_steps_of_any_groups_give_exactly_nothing(groups, eps, level):
    """Each group its own value."""
    if groups.step_reward is None:
        groups = groups.replace(step_reward=np.full(groups.rollouts.tokens.shape, np.nan, np.float32))
    own = np.float32(level * (groups.rollouts.prompt[:, None] + 1))
    last = groups.rollouts.sampled & (np.cumsum(groups.rollouts.sampled[:, ::-1], axis=1)[:, ::-1] == 1)
    steps = np.where(np.isnan(groups.step_reward) & ~last, np.nan, own).astype(np.float32)
    assert not GrpoSteps(eps=eps)(groups.replace(step_reward=steps)).advantage.any()


@few
@given(groups=batches)
def test_responses_of_one_step_have_the_advantages_of_grpo(groups):
    """To the bit, with a step at the last token or none."""
    groups, sampled = groups.replace(step_reward=None), groups.rollouts.sampled
    last = sampled & (np.cumsum(sampled[:, ::-1], axis=1)[:, ::-1] == 1)
    steps = np.where(last, groups.reward[:, None], np.float32(np.nan))
    for one in (groups, groups.replace(step_reward=steps)):
        np.testing.assert_array_equal(GrpoSteps()(one).advantage, Grpo()(one).advantage)


# --- which groups are trained on, and refusals ----------------------------------------------------------------------------------


def test_the_automatic_filter_keeps_groups_of_equal_rewards():
    objective = ObjectiveConfig(advantage=GrpoSteps())
    assert not drops_equal_rewards(objective, 1) and drops_equal_rewards(ObjectiveConfig(advantage=Grpo()), 1)
    (why,) = refusals(objective, 4, "none", "reward", 1)
    assert "experience.filter: got signal by reward, want auto or none" in why and "compares steps" in why


def test_a_late_kl_is_refused():
    objective = ObjectiveConfig(advantage=GrpoSteps(), reward_kl=RewardKl(weight=0.1, to="advantage"))
    assert any(
        "got advantage with the advantage grpo_steps, want reward" in text for text in refusals(objective, 4, "none")
    )


def test_steps_without_a_grader_that_has_them_are_refused():
    def problems(reward, **objective):
        task = {"kind": "arithmetic", "terms": 2, "held_out": 8}
        return training_problems(validate({"task": task, "reward": reward, "objective": objective}, "test"))

    steps = {"grader": "m:f", "step_end": ";"}
    (found,) = problems("m:f", advantage={"kind": "grpo_steps"})
    assert found.startswith(
        "objective.advantage.kind: got grpo_steps without a grader that has steps, want a step_end in"
    )
    assert problems(steps, advantage={"kind": "grpo_steps"}) == problems(steps, advantage={"kind": "grpo"}) == []
    assert problems({"graders": ["exact_match", steps]}, advantage={"kind": "grpo_steps"}) == []

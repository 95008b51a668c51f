"""Credit of graded groups, by hand, for several advantages."""

import numpy as np
import pytest
from estimator_inputs import to_groups

from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.credit import make_advantage, reward_kl_metrics
from jaxrl_llm.objective.group_estimators import BestWorst, Gdpo, Grpo, MeanOnly, Rloo
from jaxrl_llm.objective.reward_kl import RewardKl
from jaxrl_llm.objective.token_estimators import Gae
from jaxrl_llm.types import Scores


def test_an_estimator_is_called():
    """Rewards 1, 0, 0, 0: less their mean; over the sample std, 1/2."""
    groups = to_groups([[1, 0, 0, 0]])
    np.testing.assert_array_equal(MeanOnly()(groups).advantage[:, 0], [0.75, -0.25, -0.25, -0.25])
    found = Grpo(eps=0)(groups)
    np.testing.assert_allclose(found.advantage, np.array([[1.5, -0.5, -0.5, -0.5]]).T * np.ones(3), rtol=1e-7)
    assert found.advantage.dtype == np.float32 and found.returns is found.keep is None


def test_a_group_that_is_not_kept_is_worth_nothing_and_one_of_which_a_row_is_kept_counts_whole():
    groups = to_groups([[1, 0], [np.nan, 0], [4, 0]])
    groups = groups.replace(keep=np.array([True, True, False, False, True, False]))
    np.testing.assert_array_equal(Rloo()(groups).advantage[:, 0], [1, -1, 0, 0, 4, -4])
    np.testing.assert_array_equal(groups.trainable_tokens[:, 0], groups.keep)


def test_pairs_leave_out_what_is_neither_best_nor_worst():
    found = BestWorst()(to_groups([[1, 0, 0.5], [2, 2, 2]]))
    np.testing.assert_array_equal(found.advantage[:, 0], [1, -1, 0, 0, 0, 0])
    np.testing.assert_array_equal(found.keep, [True, True, False, False, False, False])


def test_graders_weigh_as_the_config_says():
    """Two graders that disagree, of which the second weighs nothing: whitened, the first alone. With 1 each all is equal."""
    groups = to_groups([[1, 0]], components=[[1, 0], [0, 1]])
    advantage = make_advantage(ObjectiveConfig(advantage=Gdpo(eps=0)), [1.0, 0.0])
    np.testing.assert_allclose(advantage(groups, Scores()).advantage[:, 0], [2**-0.5, -(2**-0.5)], rtol=1e-6)
    np.testing.assert_array_equal(Gdpo(eps=0)(groups).advantage, np.zeros((2, 3)))


@pytest.mark.parametrize("to", ["reward", "advantage"])
def test_a_kl_is_taken_from_what_teaches(to):
    """The reference holds the first row's tokens for e^-1 as probable: k1 is 1 at each, times 0.1. In the reward its sum, -0.3, is
    halved against the other row's 0; behind the advantage each token gets what is still to come."""
    groups = to_groups([[0, 0]])
    scores = Scores(reference_logprobs=np.float32([[-1, -1, -1], [0, 0, 0]]))
    kl = RewardKl(weight=0.1, to=to)
    found = make_advantage(ObjectiveConfig(advantage=MeanOnly(), reward_kl=kl), [1.0])(groups, scores)
    want = [[-0.15] * 3, [0.15] * 3] if to == "reward" else [[-0.3, -0.2, -0.1], [0, 0, 0]]
    np.testing.assert_allclose(found.advantage, want, rtol=1e-6)
    # Three of six tokens have 1 nat.
    assert reward_kl_metrics(kl, groups, scores) == {"reward_kl": pytest.approx(0.5)}
    assert reward_kl_metrics(RewardKl(), groups, Scores()) == {}
    assert reward_kl_metrics(kl, groups.replace(keep=np.zeros(2, bool)), scores) == {}


def test_a_critic_has_returns():
    """With lam 1 and no discount each advantage is 1 minus its value, and the returns are 1."""
    scores = Scores(values=np.float32([[0.25, 0.5, 0.75]]))
    found = Gae(lam=1.0, whiten=False)(to_groups([[1]]), scores)
    np.testing.assert_allclose(found.advantage, [[0.75, 0.5, 0.25]], rtol=1e-6)
    np.testing.assert_allclose(found.returns, [[1, 1, 1]], rtol=1e-6)

"""Scores that an objective reads, with a fake in the place of the scorer: whose parameters it is asked about, and how often."""

import numpy as np
import pytest
from fakes import groups_of, state_of

from jaxrl_llm.config.loading import validate
from jaxrl_llm.distribution.loss_terms import Loss
from jaxrl_llm.distribution.score import TokenScores
from jaxrl_llm.errors import UserError
from jaxrl_llm.model.lora import Adapted, split
from jaxrl_llm.roles.blueprint import loss_of
from jaxrl_llm.roles.learner import Learner, policy_entropy, score_groups
from jaxrl_llm.types import OwnColumn, Scores, join_groups
from jaxrl_llm.update.packing import GroupSizes

GROUPS = groups_of(np.array([[1.0, 0.0]] * 2))
OWN, OTHER = {"w": "own"}, {"w": "other"}


class Score:
    """Log-probs of 1 under the own parameters, of 2 under the reference's; a critic's values of 3."""

    def __init__(self, has_critic=False):
        self.asked, self.has_critic = [], has_critic

    def __call__(self, params, groups):
        assert groups is GROUPS
        self.asked.append(params)
        nothing = np.zeros(groups.rollouts.tokens.shape, np.float32)
        return TokenScores(nothing + (1 if params == OWN else 2), nothing, nothing + 3 if self.has_critic else None)


def scores_of(values, score, **state):
    cfg = validate({"reward": "exact_match"} | values, "test")
    train = state_of().train.replace(params=OWN)
    return score_groups(
        cfg.objective, loss_of(cfg), score, state_of(**{"train": train, "reference": OTHER} | state), GROUPS
    )


@pytest.mark.parametrize(
    ("values", "asked", "numbers"),
    [
        ({"objective": {"advantage": {"kind": "grpo"}}}, [], (None, None, None)),
        ({"objective": {"reward_kl": {"weight": 0.1}}}, [OTHER], (2, None, None)),
        ({"objective": {"loss": {"kl": {"weight": 0.1}}}}, [OTHER], (2, None, None)),
        # The update runs the reference itself.
        ({"objective": {"loss": {"kl": {"weight": 0.1, "kind": "full"}}}}, [], (None, None, None)),
        ({"objective": {"loss": {"anchor": "proximal"}}, "update": {"epochs": 2}}, [OWN], (None, 1, None)),
        # The only update has the proximal policy's log-probs at hand.
        ({"objective": {"loss": {"anchor": "proximal"}}}, [], (None, None, None)),
        ({"objective": "verl:ppo"}, [OWN], (None, None, 3)),
        (
            {
                "objective": {"preset": "verl:ppo", "reward_kl": {"weight": 0.1}, "loss": {"anchor": "proximal"}},
                "update": {"epochs": 2},
            },
            [OTHER, OWN],
            (2, 1, 3),
        ),
    ],
)
def test_models_are_asked_once_where_their_scores_are_read_and_not_at_all_elsewhere(values, asked, numbers):
    score = Score(has_critic="verl:ppo" in str(values))
    found = scores_of(values, score)
    assert score.asked == asked
    for column, number in zip((found.reference_logprobs, found.proximal_logprobs, found.values), numbers, strict=True):
        if number is None:
            assert column is None
        else:
            np.testing.assert_array_equal(column, np.full((4, 2), number, np.float32))


def test_a_reference_of_adapters_is_asked_about_on_the_policys_frozen_matrices():
    def adapted(a):
        return {"layers": {"qkv": Adapted(base="frozen", pairs={"q": a})}}

    score, train = Score(), state_of().train.replace(params=adapted("now"))
    held = split(adapted("at the start"))[0]
    assert held["layers"]["qkv"].base is None
    scores_of({"objective": {"reward_kl": {"weight": 0.1}}}, score, train=train, reference=held)
    assert score.asked == [adapted("at the start")]


def test_columns_of_a_loss_are_made_from_groups_and_scores():
    def make(groups, scores):
        return groups.rollouts.length[:, None] + scores.proximal_logprobs

    loss = Loss(None, columns=("proximal_logprobs",), own=(OwnColumn("mine", make),))
    cfg = validate({"reward": "exact_match"}, "test")
    found = score_groups(cfg.objective, loss, Score(), state_of(train=state_of().train.replace(params=OWN)), GROUPS)
    np.testing.assert_array_equal(found.own["mine"], np.full((4, 2), 3, np.float32))
    wrong = loss._replace(own=(OwnColumn("mine", lambda groups, scores: np.zeros(4)),))
    with pytest.raises(UserError, match=r"the column mine of the loss: got float64\[4\], want .*, \[4, 2\]"):
        score_groups(cfg.objective, wrong, Score(), state_of(train=state_of().train.replace(params=OWN)), GROUPS)


@pytest.mark.parametrize("sizes", [GroupSizes(2, 4, 2), GroupSizes(4, 9, 2), GroupSizes(9, 5, 4)])
def test_entropies_are_of_the_policy_now_and_asked_for_in_batches_of_a_fixed_size(sizes):
    """Six groups of two rows of two tokens, the second not sampled; row b has entropy b at both. Row 3 is not kept."""
    asked, groups = [], join_groups(*[GROUPS] * 3)
    rollouts = groups.rollouts
    sampled = np.zeros_like(rollouts.sampled)
    sampled[:, 0] = True
    number = np.arange(len(groups.keep), dtype=np.float32)[:, None]
    groups = groups.replace(
        rollouts=rollouts.replace(sampled=sampled, behavior_logprobs=np.tile(number, (1, 2))), keep=number[:, 0] != 3
    )

    def score(params, part):
        asked.append(params)
        assert len(part.failure) <= sizes.prompts and len(part.keep) <= sizes.rows
        return TokenScores(None, part.rollouts.behavior_logprobs)

    state = state_of(train=state_of().train.replace(params=OWN))
    found = policy_entropy(score, sizes, state, groups)
    assert asked == [OWN] * len(asked) and len(asked) == -(
        -len(groups.failure) // min(sizes.prompts, sizes.rows // sizes.most)
    )
    assert found.tolist() == [0, 1, 2, 0, *range(4, len(number))]


def test_the_stages_of_a_learner_stand_in_the_order_of_the_training_loop():
    *stages, last = Learner._fields
    assert stages == ["filter", "replay", "score", "entropy", "advantage", "update", "refresh", "publish"]
    assert last == "compile"
    assert Scores() == Scores(None, None, None, {})

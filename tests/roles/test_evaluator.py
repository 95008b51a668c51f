"""The evaluator with a fake collector and fake scorers: every number by hand, and what it leaves out."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from fakes import groups_of, sums

from jaxrl_llm.distribution.score import TokenScores
from jaxrl_llm.roles.collector import Collected
from jaxrl_llm.roles.evaluator import Evaluator
from jaxrl_llm.roles.supervised import right_responses
from jaxrl_llm.rollout.session import Stats

TASK, KEY, NAN = sums(held_out=5), jax.random.key(4), np.nan
PARTS = np.float32([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0.5, 1, 1], [NAN] * 4, [0, 1, 0, 0]])
VOTES = np.int32([[7, 7, 8, 9], [1, 1, 1, 1], [2, 3, 2, 2], [0] * 4, [5, 6, 0, 0]])


class Collect:
    """Gives these parts of the first grader, rewards that are 1 more, and these votes. Log-probs of row b are -(b + 1) / 8."""

    def __init__(self, parts=PARTS, votes=VOTES, length=None):
        self.parts, self.votes, self.length, self.asked = parts, votes, length, []

    def __call__(self, *given):
        self.asked.append(given)
        groups = groups_of(self.parts, self.length)
        rollouts = groups.rollouts.replace(prompts=given[1])
        said = -(np.arange(len(rollouts.length), dtype=np.float32)[:, None] + 1) / 8
        rollouts = rollouts.replace(behavior_logprobs=np.where(rollouts.sampled, said, 0).astype(np.float32))
        return Collected(
            groups.replace(rollouts=rollouts, reward=groups.reward + 1, vote=self.votes.reshape(-1)), Stats(), 0.0
        )


class ScoreRight:
    """A probability for each row of the held-out part: 0.1 more each, in the row's first token."""

    def __init__(self):
        self.parts = []

    def __call__(self, params, groups):
        assert params == "params"
        prompts = groups.rollouts.prompts
        rows = [
            next(
                i
                for i, row in enumerate(TASK.held_out)
                if np.array_equal(row.tokens, prompts.tokens[p, : prompts.length[p]])
            )
            for p in range(len(prompts.length))
        ]
        self.parts.append(rows)
        logprobs = np.zeros(groups.rollouts.tokens.shape)
        logprobs[:, 0] = np.log(0.1 * (1 + np.array(rows)))
        return TokenScores(logprobs, logprobs)


def make(collect=None, at_once=2, threshold=1.0, task=TASK, score=None):
    return Evaluator(
        task=task, collect=collect or Collect(), key=KEY, at_once=at_once, threshold=threshold,
        right=partial(right_responses, task, TASK.target_slots, 1.0), score_right=ScoreRight(), score=score,
    )  # fmt: skip


def test_the_numbers_by_hand():
    """Right of 4, at a threshold of 1: 2, 0, 3, not graded, 1. Votes: the first group's 7 is right; the third's 2; the last's 5 and
    6 are as many, one of them right."""
    found = make()("params", "policy")
    assert found == {
        "eval/exact": pytest.approx((0.1 + 0.2 + 0.3 + 0.4 + 0.5) / 5),
        "eval/left_out": 1.0,
        "eval/pass@1": pytest.approx((2 + 0 + 3 + 1) / 16),
        "eval/pass@4": pytest.approx(3 / 4),
        "eval/maj@4": pytest.approx((1 + 0 + 1 + 0.5) / 4),
    }


def test_each_task_of_a_mixture_has_its_own_numbers():
    """Rows 0, 2, 3 are of one task, of which 3 cannot be graded; 1 and 4 of the other, whose responses are not known."""
    names = ["a", "b", "a", "a", "b"]
    held_out = tuple(
        dataclasses.replace(row, task=name, target=row.target if name == "a" else None)
        for row, name in zip(TASK.held_out, names, strict=True)
    )
    task = dataclasses.replace(TASK, held_out=held_out, weights={"a": 2.0, "b": 1.0, "without held-out rows": 1.0})
    found = make(task=task)("params", "policy")
    whole = make()("params", "policy")
    assert {name: found[name] for name in whole if name in found} == {
        name: x for name, x in whole.items() if name != "eval/exact"
    }
    assert {name: x for name, x in found.items() if name not in whole} == {
        "eval/a/exact": pytest.approx((0.1 + 0.3 + 0.4) / 3),
        "eval/a/left_out": 1.0,
        "eval/a/pass@1": pytest.approx((2 + 3) / 8),
        "eval/a/pass@4": 1.0,
        "eval/a/maj@4": 1.0,
        "eval/b/pass@1": pytest.approx(1 / 8),
        "eval/b/pass@4": 0.5,
        "eval/b/maj@4": pytest.approx(0.5 / 2),
    }
    assert make(task=task).headline == "eval/pass@1"


def test_the_threshold_decides_what_is_right():
    assert make(threshold=0.5)("params", "policy")["eval/pass@1"] == pytest.approx((2 + 0 + 4 + 1) / 16)


def test_all_held_out_rows_are_asked_once_with_the_evaluations_own_key():
    collect = Collect()
    make(collect)("params", "policy")
    [(policy, prompts, rows, key)] = collect.asked
    assert policy == "policy" and rows is TASK.held_out and key is KEY
    assert prompts.row.tolist() == prompts.uid.tolist() == [0, 1, 2, 3, 4]
    for p, row in enumerate(TASK.held_out):
        np.testing.assert_array_equal(prompts.tokens[p, : prompts.length[p]], row.tokens)


def test_left_out_is_absent_if_all_are_graded_and_the_accuracies_are_if_none_is():
    whole = Collect(np.nan_to_num(PARTS))
    assert "eval/left_out" not in make(whole)("params", "policy")
    none = Collect(np.full_like(PARTS, NAN))
    assert set(make(none)("params", "policy")) == {"eval/exact", "eval/left_out"}
    assert make(none)("params", "policy")["eval/left_out"] == 5


@pytest.mark.parametrize(
    ("at_once", "parts"), [(2, [[0, 1], [2, 3], [4, 0]]), (5, [[0, 1, 2, 3, 4]]), (7, [[0, 1, 2, 3, 4, 0, 1]])]
)
def test_right_responses_are_scored_in_parts_of_one_size_and_count_once(at_once, parts):
    evaluator = make(at_once=at_once)
    np.testing.assert_allclose(evaluator.probabilities("params"), [0.1, 0.2, 0.3, 0.4, 0.5])
    assert evaluator.score_right.parts == parts


def test_without_right_responses_the_headline_is_sampled():
    unknown = [dataclasses.replace(row, target=None) for row in TASK.held_out]
    task = dataclasses.replace(TASK, held_out=tuple(unknown))
    found = make(task=task)("params", "policy")
    assert "eval/exact" not in found and make(task=task).headline == "eval/pass@1" in found
    assert make().headline == "eval/exact"


class Uneven:
    """The sampler's log-probs, less 1 in the rows of the first prompt; the rows that it was asked for."""

    def __init__(self):
        self.rows = []

    def __call__(self, params, groups):
        of_first = groups.rollouts.prompts.row.repeat(4)[:, None] == 0
        logprobs = groups.rollouts.behavior_logprobs - np.where(of_first, 1.0, 0.0)
        self.rows.append(groups.rollouts.prompts.row.tolist())
        return TokenScores(logprobs, logprobs)


K3 = np.exp(-1.0) - 1 + 1
"""k3 of d = log sampler - log trainer = 1: e^-d - 1 + d."""


@pytest.mark.parametrize(
    ("at_once", "rows", "share"),
    [
        # The first at_once prompts alone.
        (2, [0, 1], 1 / 2),
        (5, [0, 1, 2, 3, 4], 1 / 5),
        # Filled up from the front; the repetition of the first prompt counts once: else it were 2 / 7.
        (7, [0, 1, 2, 3, 4, 0, 1], 1 / 5),
    ],
)
def test_mismatch_is_over_the_rollouts_of_a_step_and_repetitions_count_once(at_once, rows, share):
    score = Uneven()
    found = make(at_once=at_once, score=score)("params", "policy")
    assert score.rows == [rows] and found["eval/mismatch_kl"] == pytest.approx(K3 * share, rel=1e-6)


def test_mismatch_is_absent_without_a_scorer_and_counts_only_sampled_tokens():
    assert "eval/mismatch_kl" not in make()("params", "policy")
    # Of the first prompt four tokens, of the second eight. Slots that hold no token are off by one as well, and do not count.
    collect = Collect(length=[1] * 4 + [2] * 16)
    found = make(collect, score=Uneven())("params", "policy")
    assert found["eval/mismatch_kl"] == pytest.approx(K3 * 4 / 12, rel=1e-6)

"""What the stages left of a step, by hand."""

import numpy as np
import pytest
from fakes import groups_of

from jaxrl_llm.roles.stage_metrics import COUNTED, describe_stages
from jaxrl_llm.types import number_rows

NAN = np.nan


def test_what_was_kept_and_dropped_and_how_that_skews():
    """Groups of 3, 1 and 2 rows and two fillers; the last group could not be graded, the second was rejected."""
    prompt, sample = number_rows([3, 1, 2], 8)
    made = groups_of(np.zeros((4, 2)))
    reward = np.float32([1, 0, 1, 0, NAN, NAN, NAN, NAN])
    groups = made.replace(
        rollouts=made.rollouts.replace(
            prompts=made.rollouts.prompts.replace(length=np.ones(3, np.int32)), prompt=prompt, sample=sample,
            length=np.int32([1, 2, 2, 1, 2, 2, 0, 0]),
            tokens=np.int32([[1, 2], [1, 2], [1, 3], [4, 5], [1, 2], [1, 2], [0, 0], [0, 0]]),
        ),
        reward=reward, components=reward[:, None], failure=np.int32([0, 0, 1]), failed_by=np.int32([-1, -1, 0]),
        vote=np.int32([7, 7, 9, 7, 0, 0, 0, 0]), keep=np.array([True, True, False, False, False, False, False, False]),
    )  # fmt: skip
    found = describe_stages(groups)
    assert found == pytest.approx(
        {
            "rollout/samples": 6, "groups/sampled": 3,
            "kept/rows": 2, "kept/mean_length": 1.5, "kept/success": 0.5,
            "dropped/rows": 2, "dropped/mean_length": 1.5, "dropped/success": 0.5,
            "groups/effective_size": 2,
            # Two answers of three; a pair of tokens in the rows of two: 1 2 and 1 3.
            "diversity/unique_answers": 2 / 3, "diversity/distinct_2": 1.0,
        }
    )  # fmt: skip


def test_a_filter_that_keeps_short_responses_shows():
    groups = groups_of(np.array([[1.0, 0.0], [1.0, 0.0]]), length=[1, 2, 1, 2])
    found = describe_stages(groups.replace(keep=groups.rollouts.length == 1))
    assert (found["kept/mean_length"], found["dropped/mean_length"]) == (1, 2)
    assert (found["kept/success"], found["dropped/success"]) == (1, 0)


def test_means_over_nothing_are_absent():
    found = describe_stages(groups_of(np.full((2, 2), NAN)))
    assert found == {"rollout/samples": 4, "groups/sampled": 2, "kept/rows": 0, "dropped/rows": 0}
    whole = describe_stages(groups_of(np.ones((2, 1))))
    assert not [name for name in whole if name.startswith(("dropped/mean", "diversity"))]


def test_equal_responses_have_few_distinct_pairs_and_only_the_first_groups_are_read():
    groups = groups_of(np.ones((COUNTED + 5, 4)))
    tokens = np.zeros_like(groups.rollouts.tokens)
    tokens[4 * COUNTED :] = np.arange(2 * 20).reshape(-1, 2)
    found = describe_stages(groups.replace(rollouts=groups.rollouts.replace(tokens=tokens)))
    assert found["diversity/distinct_2"] == 0.25

"""Several graders in one reward: weights, components, votes, and the grader that a failure is counted against."""

import logging
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from jaxrl_llm.environments.config import GraderConfig, RewardConfig
from jaxrl_llm.environments.grader import Sample
from jaxrl_llm.environments.grader_pool import Failure, GraderPool, component_metrics
from jaxrl_llm.errors import UserError

KINDS = [kind for kind in Failure if kind]


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)


def grade(groups, *graders, workers=1, deadline_s=30.0):
    with GraderPool(RewardConfig(graders, workers, deadline_s)) as pool:
        return pool.grade(groups)


def group(*completions, answer="42", finish="eos", **columns):
    return [Sample("<prompt>", text, answer, finish, columns) for text in completions]


def test_the_reward_is_the_weighted_sum_of_the_components():
    graded = grade(
        [group("The answer is 42.", "42"), group("So 41.", "the answer")],
        GraderConfig("numeric"),
        GraderConfig("format", 0.25, options={"pattern": r".*\."}),
        GraderConfig("length", -2.0, options={"limit": 1, "unit": "words"}),
        GraderConfig("exact_match", 0.0),
    )
    np.testing.assert_array_equal(
        graded.components,
        [[[1, 1], [0, 0]], [[1, 0], [1, 0]], [[-1, 0], [-1, -1]], [[0, 1], [0, 0]]],
    )
    np.testing.assert_array_equal(graded.reward, [[1 + 0.25 + 2, 1], [0.25 + 2, 2]])
    np.testing.assert_array_equal(graded.failed_by, [-1, -1])
    assert graded.votes == [["42", "42"], ["41", ""]]
    kinds = graded.reward.dtype, graded.components.dtype, graded.failure.dtype, graded.failed_by.dtype
    assert kinds == (np.float32, np.float32, np.int32, np.int32)


def test_votes_come_from_the_first_extracting_grader_or_the_stripped_completions():
    groups = [group(" b ", "a\n")]
    assert grade(groups, GraderConfig("exact_match")).votes == [["b", "a"]]
    assert grade(groups, GraderConfig("exact_match"), GraderConfig("bad_graders:Votes")).votes == [[" B ", "A\n"]]
    numbers = [group("1,000 B", "nothing")]
    both = GraderConfig("numeric"), GraderConfig("bad_graders:Votes")
    assert grade(numbers, *both).votes == [["1000", ""]]
    assert grade(numbers, *both[::-1]).votes == [["1,000 B", "NOTHING"]]


def test_a_vote_that_is_not_a_string_is_a_failure():
    graded = grade([group("none"), group("fine")], GraderConfig("exact_match"), GraderConfig("bad_graders:Votes"))
    assert (graded.failure.tolist(), graded.failed_by.tolist()) == ([Failure.WRONG_TYPE, 0], [1, -1])
    assert graded.votes == [[""], ["FINE"]]


def test_a_failure_names_its_grader_and_costs_the_group_all_its_components():
    completions = ["nan", "str", "raise", "os._exit", "sleep", "7"]
    graded = grade(
        [group("1", text) for text in completions],
        GraderConfig("exact_match"),
        GraderConfig("bad_graders:by_completion"),
        GraderConfig("bad_graders:by_completion", name="again"),
        workers=2,
        deadline_s=3.0,
    )
    kinds = [Failure.NOT_FINITE, Failure.WRONG_TYPE, Failure.RAISED, Failure.DIED, Failure.TIMED_OUT, Failure.NONE]
    assert graded.failure.tolist() == kinds
    assert graded.failed_by.tolist() == [1, 1, 1, 1, 1, -1]
    assert np.isnan(graded.components[:, :5]).all() and np.isnan(graded.reward[:5]).all()
    np.testing.assert_array_equal(graded.reward[5], [2, 14])
    assert graded.votes == [["", ""]] * 5 + [["1", "7"]]


def test_a_sum_beyond_float32_is_blamed_on_its_largest_term():
    graded = grade(
        [group("3e38"), group("1")],
        GraderConfig("exact_match"),
        GraderConfig("bad_graders:by_completion", 10.0),
    )
    assert (graded.failure.tolist(), graded.failed_by.tolist()) == ([Failure.NOT_FINITE, 0], [1, -1])
    np.testing.assert_array_equal(graded.reward, np.float32([[np.nan], [10]]))


def test_failures_of_a_flaky_grader_are_counted_exactly_under_its_name(caplog):
    """It raises on one row in ten, sleeps forever on one in fifty, returns a string on one in a hundred."""
    caplog.set_level(logging.WARNING, "jaxrl_llm.environments")
    graders = (
        GraderConfig("numeric"),
        GraderConfig("bad_graders:flaky", 0.5, "style"),
        GraderConfig("exact_match", 0.1),
    )
    # The answers of rows 5, 30, 55 and 80 hold no number: numeric raises there, on 30 and 80 before the flaky grader can.
    groups = [group("42", "41", answer="none" if row % 25 == 5 else "42", row=row) for row in range(100)]
    graded = grade(groups, *graders, workers=2, deadline_s=3.0)
    want = np.zeros((3, len(KINDS) + 1), int)
    want[0, Failure.RAISED] = 4
    want[1, Failure.RAISED] = 8
    want[1, Failure.TIMED_OUT] = 2
    want[1, Failure.WRONG_TYPE] = 1
    rows = np.moveaxis(graded.components, 0, -1).reshape(-1, 3)
    names = [grader.label for grader in graders]
    metrics = component_metrics(rows, ~np.isnan(rows[:, 0]), graded.failure, graded.failed_by, names)
    for index, name in enumerate(["numeric", "style", "exact_match"]):
        assert [metrics[f"rewards/{name}/{kind.name.lower()}"] for kind in KINDS] == want[index, 1:].tolist()
    good = graded.failure == Failure.NONE
    assert good.sum() == 100 - want.sum()
    np.testing.assert_array_equal(graded.reward[good], np.float32([[1.6, 0.5]] * good.sum()))
    assert [metrics[f"rewards/{name}/mean"] for name in ("numeric", "style", "exact_match")] == [0.5, 1.0, 0.5]
    assert sum("grader style: RAISED: 'ValueError: a bad day'" in text for text in caplog.messages) == 5
    assert sum("grader numeric: RAISED" in text for text in caplog.messages) == 4


def test_metrics_of_groups_that_all_failed():
    nan = np.full((6, 1), np.nan, np.float32)
    metrics = component_metrics(
        nan, np.zeros(6, bool), np.int32([Failure.RAISED, Failure.DIED]), np.int32([0, 0]), ["a"]
    )
    assert "rewards/a/mean" not in metrics
    assert metrics == {
        f"rewards/a/{kind.name.lower()}": float(kind in (Failure.RAISED, Failure.DIED)) for kind in KINDS
    }


def test_columns_of_any_mapping_reach_the_grader():
    row = Sample("", "", "", "eos", MappingProxyType({"row": 3}))
    assert grade([[row]], GraderConfig("bad_graders:flaky")).reward.tolist() == [[1.0]]


def test_text_that_cannot_be_encoded_is_escaped(caplog):
    r"""json.loads turns a model's "\\ud800" into a lone surrogate; votes and errors reach files, pages and terminals."""
    graded = grade(
        [group("vote \ud800", "vote \ud801"), group("raise \ud800", "1")], GraderConfig("bad_graders:LoneSurrogates")
    )
    assert graded.failure.tolist() == [Failure.NONE, Failure.RAISED]
    assert graded.votes == [["vote \\ud800", "vote \\ud801"], ["", ""]]
    assert b"ValueError: raise" in caplog.text.encode("utf-8")
    # Without a grader that extracts, the completion itself votes.
    assert grade([group("\ud800 ")], GraderConfig("exact_match")).votes == [["\\ud800"]]


def test_a_row_that_cannot_be_pickled_and_votes_that_are_too_long_cost_their_group():
    groups = [group("1", helper=lambda: 0), group("long"), group("fine")]
    graded = grade(groups, GraderConfig("bad_graders:Votes"))
    assert graded.failure.tolist() == [Failure.RAISED, Failure.WRONG_TYPE, Failure.NONE]
    assert graded.votes == [[""], [""], ["FINE"]]


def test_all_errors_of_a_config_are_raised_before_a_worker_starts():
    with pytest.raises(UserError) as error:
        GraderPool(RewardConfig((GraderConfig("numerical"), GraderConfig("format"))))
    first, second = str(error.value).splitlines()
    assert first.startswith("reward.graders.0.grader:") and 'Perhaps you meant "numeric"' in first
    assert second == 'reward.graders.1.options.pattern: grader "format" needs this option'


def test_a_grader_that_fails_to_start_raises_and_is_named():
    with pytest.raises(UserError, match='grader "NeverStarts": a worker could not start: OSError: no license'):
        grade([group("1")], GraderConfig("exact_match"), GraderConfig("bad_graders:NeverStarts"))

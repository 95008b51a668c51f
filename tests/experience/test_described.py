"""Metrics of a curriculum's choice: shares by hand, clean names, and what each curriculum says."""

import numpy as np
import pytest
from random_groups import groups_of

from jaxrl_llm.config.loading import validate
from jaxrl_llm.errors import UserError
from jaxrl_llm.experience.config import OwnCurriculum
from jaxrl_llm.experience.curricula import counted, in_order
from jaxrl_llm.experience.described import metric_name, shares_of

LEVELS = [{"level": level} for level in (1, 1, 1, 2, 2, 4)]
ROWS = np.array([0, 1, 1, 5])


def test_shares_by_hand():
    assert shares_of(["a", "b/c", ""], np.array([0, 1, 1, 2]), np.array([1, 2, 2, 3])) == {
        "share/a": 0, "share/b_c": 0.75, "share/none": 0.25
    }  # fmt: skip
    # Two values with the same clean name are one.
    assert shares_of(["b c", "b/c"], np.array([0, 1]), np.array([1])) == {"share/b_c": 1}


def test_of_many_strata_the_largest_are_named():
    """14 strata of 1 to 14 rows: the eleven largest, and the rows of the three smallest together."""
    stratum = np.repeat(np.arange(14), np.arange(1, 15))
    found = shares_of([f"v{i}" for i in range(14)], stratum, np.array([0, 1, 3, 104]))
    assert list(found) == ["share/other", *(f"share/v{i}" for i in range(3, 14))]
    assert (found["share/other"], found["share/v13"]) == (0.75, 0.25)


def test_names_are_clean():
    assert metric_name("a b/ü\n<c>") == "a_b_c_" and metric_name("x" * 99) == "x" * 40
    assert metric_name("") == "none"


def described(written, columns=LEVELS, observed=None):
    cfg = validate({"experience": {"curriculum": written}}, "c").experience.curriculum
    curriculum = counted(cfg.over(columns, 0))
    state = curriculum.init(len(columns))
    return curriculum.describe(state if observed is None else curriculum.observe(state, observed), ROWS)


RIGHT = groups_of([2, 2, 2], [1, 1, 0, 1, 0, 0])


@pytest.mark.parametrize(
    "written, want",
    [
        ({"kind": "stratified", "column": "level"}, {"share/1": 0.75, "share/2": 0, "share/4": 0.25}),
        ({"kind": "sec", "column": "level"}, {"share/1": 0.75, "share/2": 0, "share/4": 0.25}),
        # The mean success of all six is .5: the target stays. Difficulties 1, 1, 1 and 4.
        ({"kind": "ada_rft", "column": "level", "start": 2}, {"target": 2, "difficulty": 1.75}),
        # Row 0 always right, row 1, chosen twice, half of the time; row 5 was never visited.
        ("learnability", {"expected_success": 2 / 3}),
        (
            "stratified_by_difficulty",
            {"share/new": 0.25, "share/below_0.25": 0, "share/from_0.25": 0.5, "share/from_0.75": 0.25, "expected_success": 2 / 3},
        ),
    ],
)  # fmt: skip
def test_what_each_curriculum_says(written, want):
    found = described(written, observed=RIGHT)
    assert list(found) == list(want) and found == pytest.approx(want)


def test_nothing_is_expected_before_a_visit():
    assert described("unsolved") == {}


class Mine:
    def init(self, num_rows):
        return np.zeros(num_rows)

    def choose(self, state, rng, n):
        return state, np.arange(n)

    def observe(self, state, groups):
        return state

    def describe(self, state, rows):
        state += 1
        return {"last": rows[-1]}


class Wrong(Mine):
    def describe(self, state, rows):
        return {"rows": rows}


class OneArgument(Mine):
    def describe(self, state):
        return {}


def test_a_curriculum_of_ones_own_may_say_something():
    of = lambda name: OwnCurriculum(f"test_described:{name}")  # noqa: E731
    curriculum = of("Mine").over(LEVELS, 0)
    state = curriculum.init(6)
    assert curriculum.describe(state, ROWS) == {"last": 5.0} and not state.any(), "it changes no state"
    wrong = of("Wrong").over(LEVELS, 0)
    with pytest.raises(UserError, match=r"Wrong: got array.* for the metric 'rows', want a name and one number"):
        wrong.describe(wrong.init(6), ROWS)
    [problem] = of("OneArgument").problems("experience.curriculum")
    assert "describe" in problem and "rows" in problem
    assert of("Mine").problems("experience.curriculum") == []
    assert counted(in_order(int)).describe(counted(in_order(int)).init(3), ROWS) == {}

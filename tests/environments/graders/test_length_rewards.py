"""Length rewards by hand, from the formulas of L1 and of Kimi k1.5."""

import pytest

from jaxrl_llm.environments.config import GraderConfig, RewardConfig
from jaxrl_llm.environments.grader import Sample, make_grader, problems
from jaxrl_llm.environments.grader_pool import GraderPool
from jaxrl_llm.environments.graders.length_rewards import CutOff, LengthTarget, RelativeLength


def sample(completion, tokens, finish="eos", **columns):
    return Sample("prompt", completion, "7", finish, columns, tokens)


@pytest.mark.parametrize(
    ("form", "text", "tokens", "want"),
    [
        ("exact", "7", 100, 1.0),
        ("exact", "7", 150, 0.95),
        ("exact", "7", 50, 0.95),
        ("exact", "8", 50, -0.05),
        ("max", "7", 100, 0.5),
        ("max", "7", 0, 0.6),
        ("max", "7", 400, 0.2),
        ("max", "7", 9999, 0.0),
        ("max", "8", 0, 0.0),
    ],
)
def test_a_length_target(form, text, tokens, want):
    grader = LengthTarget(target=100, form=form, alpha=0.001)
    assert grader(sample(text, tokens)) == pytest.approx(want, abs=1e-12)
    of_row = LengthTarget(column="words", form=form, alpha=0.001)
    assert of_row(sample(text, tokens, words=100)) == pytest.approx(want, abs=1e-12)


def test_a_target_may_be_far_above():
    assert LengthTarget(target=5000, form="max", alpha=0.001)(sample("7", 0)) == 1.0


@pytest.mark.parametrize("target", [None, "100", 0, True, 1.5])
def test_a_row_without_a_target_is_found_before_the_run(target):
    row = Sample("", "", "", "eos", {} if target is None else {"target_length": target})
    assert LengthTarget().problem(row).startswith(f"target_length: got {target!r}, want a whole number above 0")
    assert LengthTarget(target=3).problem(row) == ""


def test_relative_length_by_hand():
    """Lengths 10, 20, 30, 30: 0.5, 0, -0.5, -0.5 of a right one; a wrong one gains nothing by being short."""
    group = [sample("7", 10), sample("7", 20), sample("7", 30), sample("8", 30)]
    assert RelativeLength().grade_group(group) == [0.5, 0.0, -0.5, -0.5]
    wrong = [sample("8", 10), *group[1:]]
    assert RelativeLength().grade_group(wrong) == [0.0, 0.0, -0.5, -0.5]
    assert RelativeLength().grade_group([sample("7", 4)] * 3) == [0.0] * 3
    assert RelativeLength(unit="characters").grade_group([sample("7", 4), sample("77", 1)]) == [0.5, -0.5]


def test_what_is_right_is_another_graders_word():
    grader = RelativeLength(grader="numeric", grader_options={"abs_tol": 1.0})
    assert grader.grade_group([sample("it is 8", 1), sample("it is 9", 9)]) == [0.5, -0.5]
    assert LengthTarget(target=1, grader="numeric")(sample("so 7", 1)) == 1.0


def test_a_response_that_was_cut_off_costs():
    assert [CutOff()(sample("7", 1, finish)) for finish in ("eos", "length", "stop")] == [0.0, -1.0, 0.0]


def test_parts_are_added_and_logged_apart_and_the_group_is_graded_as_one():
    parts = ("exact_match", {"grader": "relative_length", "weight": 0.5}, {"grader": "cut_off", "weight": 2.0})
    config = RewardConfig(
        tuple(GraderConfig(**({"grader": part} if isinstance(part, str) else part)) for part in parts), workers=1
    )
    assert problems(config) == []
    with GraderPool(config) as pool:
        graded = pool.grade([[sample("7", 10), sample("7", 20, "length")], [sample("7", 3)]])
    # Cut off, so no exact match, and wrong: min(0, -0.5).
    assert graded.components[:, 0].tolist() == [[1.0, 0.0], [0.5, -0.5], [0.0, -1.0]]
    assert graded.reward[0].tolist() == [1.25, -2.25] and graded.reward[1, 0] == 1.0


class TooFew:
    def __call__(self, sample):
        return 0.0

    def grade_group(self, group):
        return [1.0] * (len(group) - 1)


def test_a_group_grader_that_forgets_a_sample_fails_its_group(monkeypatch):
    monkeypatch.syspath_prepend(__file__.rpartition("/")[0])
    with GraderPool(RewardConfig((GraderConfig("test_length_rewards:TooFew"),), workers=1)) as pool:
        graded = pool.grade([[sample("7", 1)] * 2])
        assert "grade_group returned 1 numbers, want 2" in pool.first_failure
    assert graded.failure.tolist() == [4]


def test_graders_are_found_by_name():
    assert make_grader("cut_off") == CutOff() and make_grader("length_target", {"target": 3}).target == 3

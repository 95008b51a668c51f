"""Graders with one value per step: how a response is split, what they may return, and where the reward was earned."""

from pathlib import Path

import numpy as np
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_llm.environments.config import GraderConfig, RewardConfig
from jaxrl_llm.environments.grader import Sample, problems, split_steps
from jaxrl_llm.environments.grader_pool import Failure, GraderPool
from jaxrl_llm.environments.worker import GraderSetup, Verdict, decode, encode
from jaxrl_llm.errors import UserError


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)


def grade(groups, *graders):
    with GraderPool(RewardConfig(graders, 1, 30.0)) as pool:
        return pool.grade([[Sample("<p>", text, "a;b", "eos") for text in group] for group in groups])


def by(function, end=";", weight=1.0, **more):
    return GraderConfig(f"step_graders:{function}", weight, step_end=end, **more)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("", [""]), ("a", ["a"]), ("a;", ["a;"]), ("a;b", ["a;", "b"]), (";", [";"]),
        (";;a", [";", ";", "a"]), ("a;\n", ["a;", "\n"]),
    ],
)  # fmt: skip
def test_steps_of_a_response(text, want):
    assert list(split_steps(text, ";")) == want


@given(st.text("ab;", max_size=8), st.sampled_from([";", ";;", "a;", "ab"]))
def test_every_character_is_in_one_step(text, end):
    steps = split_steps(text, end)
    assert "".join(steps) == text and len(steps) >= 1 and (all(steps) or text == "")
    # The text that ends a step is nowhere else in it.
    assert all(step.endswith(end) and step.count(end) == 1 for step in steps[:-1]) and end not in steps[-1][:-1]


def test_a_component_is_the_mean_of_the_steps():
    """Lengths 2, 3 and 1; 4; nothing is one step of nothing."""
    graded = grade([["a;bb;c", "aaaa", ""]], by("lengths", weight=2.0))
    np.testing.assert_array_equal(graded.components, [[[2, 4, 0]]])
    np.testing.assert_array_equal(graded.reward, [[4, 8, 0]])
    assert graded.earned == [[{2: 4.0, 5: 6.0, 6: 2.0}, {4: 8.0}, {0: 0.0}]]


def test_graders_with_other_ends_and_without_steps_are_added_where_they_earned():
    """Of "a;b.c;" the first has a; and b.c;, the second a;b. and c;, the third no steps: 2, 4 | 4, 2 times 10 | 0 times 100."""
    graded = grade(
        [["a;b.c;", "a;b"]],
        by("lengths", ";", name="x"),
        by("lengths", ".", 10.0, name="y"),
        GraderConfig("exact_match", 100.0),
    )
    assert graded.earned == [[{2: 2.0, 4: 40.0, 6: 4.0 + 20.0 + 0.0}, {2: 2.0, 3: 1.0 + 30.0 + 100.0}]]
    np.testing.assert_array_equal(graded.reward, [[3 + 30, 1.5 + 30 + 100]])


def test_without_steps_nothing_is_said_about_where():
    assert grade([["a;b"]], GraderConfig("exact_match")).earned is None


FAILURES = {
    "short": (Failure.WRONG_TYPE, "returned 1 numbers, want 2, one per step"),
    "long": (Failure.WRONG_TYPE, "returned 3 numbers, want 2, one per step"),
    "one": (Failure.WRONG_TYPE, "returned a float, want a list of 2 numbers, one per step"),
    "scalar": (Failure.WRONG_TYPE, "returned a float64, want a list of 2 numbers, one per step"),
    "none": (Failure.WRONG_TYPE, "returned a NoneType, want a list of 2 numbers"),
    "str": (Failure.WRONG_TYPE, "returned a str, want a list of 2 numbers"),
    "set": (Failure.WRONG_TYPE, "returned a set, want a list of 2 numbers"),
    "strs": (Failure.WRONG_TYPE, "returned a str, want a real number"),
    "nested": (Failure.WRONG_TYPE, "returned a list, want a real number"),
    "square": (Failure.WRONG_TYPE, "returned a list, want a real number"),
    "nan": (Failure.NOT_FINITE, "returned nan"),
    "inf": (Failure.NOT_FINITE, "returned -inf"),
    "large": (Failure.NOT_FINITE, "returned 1e+39"),
    # Each is a float32, and so is their mean; not their sum, if they end in one token.
    "huge": (Failure.NOT_FINITE, "the weighted sum is beyond float32"),
}


def test_what_is_not_one_number_per_step_fails_the_group(caplog):
    names = list(FAILURES)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("jaxrl_llm.environments.grader_pool.NUM_LOGGED", 99)
        graded = grade([["fine;", f"{name};b"] for name in names] + [["fine;b"]], by("named"))
    assert dict(zip(names, graded.failure.tolist(), strict=False)) == {
        name: kind for name, (kind, _) in FAILURES.items()
    }
    assert graded.failure[-1] == 0 and graded.earned == [[{}, {}]] * len(names) + [[{5: 0.0, 6: 1.0}]]
    for (_, words), text in zip(FAILURES.values(), caplog.messages, strict=True):
        assert words in text


def test_tuples_arrays_and_truths_are_numbers():
    graded = grade([["tuple;b;c"], ["array;b;c"]], by("named"))
    assert graded.earned == [[{6: 1.0, 8: 1.0, 9: 1.0}], [{6: 0.0, 8: 0.25, 9: 0.5}]]


def test_a_group_is_graded_at_once_with_one_list_per_sample(caplog):
    """Of 1 and 3 steps, 2 on average."""
    graded = grade([["a", "a;b;c"], ["few", "a"]], by("InGroups"))
    np.testing.assert_array_equal(graded.components[0, 0], [-1, 1])
    assert graded.votes == [["a", "c"], ["", ""]] and graded.failure.tolist() == [0, Failure.WRONG_TYPE]
    assert "grade_group returned 1 lists, want 2, one per sample" in caplog.text


# --- what a worker sends --------------------------------------------------------------------------------------------------------

STEPS, PLAIN = GraderSetup("a", {}, ";"), GraderSetup("b", {})
GROUP = [Sample("", "a;b", "", ""), Sample("", "c", "", "")]
GOOD = Verdict([[0.5, 2.0], [1.0, 0.0]], [], steps=[[[0.0, 1.0], [2.0]], []])


def test_a_verdict_is_read_as_it_was_sent():
    assert decode(encode(GOOD)[:-1], (STEPS, PLAIN), GROUP) == GOOD


@pytest.mark.parametrize(
    "steps",
    [
        (), [], [[]], [[[0.0, 1.0], [2.0]]], [[[0.0, 1.0]], []], [[[0.0], [2.0]], []], [[[0.0, 1.0], [2.0, 3.0]], []],
        [[[0.0, 1.0], [2.0]], [[1.0], [1.0]]], [[[0, 1], [2]], []], [[["0", "1"], [2.0]], []], [[[0.0, None], [2.0]], []],
        [[[0.0, float("nan")], [2.0]], []], [[[0.0, 1e39], [2.0]], []], [[[0.0, [1.0]], [2.0]], []], [["ab", "c"], []],
        [{"0": [0.0, 1.0], "1": [2.0]}, []], "steps", None, 7, {"a": 1},
    ],
    ids=repr,
)  # fmt: skip
def test_steps_of_other_sizes_or_types_are_no_verdict(steps):
    with pytest.raises((ValueError, TypeError)):
        decode(encode(GOOD._replace(steps=steps))[:-1], (STEPS, PLAIN), GROUP)


def test_a_failure_has_no_steps():
    failed = Verdict([], [], Failure.RAISED, 0, "why")
    assert decode(encode(failed)[:-1], (STEPS, PLAIN), GROUP).failure == Failure.RAISED
    with pytest.raises(ValueError, match="wrong sizes"):
        decode(encode(failed._replace(steps=GOOD.steps))[:-1], (STEPS, PLAIN), GROUP)


# --- configs --------------------------------------------------------------------------------------------------------------------


def test_short_forms_have_steps_too():
    check = pydantic.TypeAdapter(RewardConfig).validate_python
    want = (GraderConfig("m:f", 2.0, "x", {"a": 1}, "\n\n"),)
    short = {"grader": "m:f", "weight": 2.0, "name": "x", "options": {"a": 1}, "step_end": "\n\n"}
    assert check(short | {"workers": 3}) == RewardConfig(want, 3) == check({"graders": [short], "workers": 3})
    assert GraderConfig("m:f").step_end == ""


def test_a_built_in_grader_has_no_steps():
    (found,) = problems(RewardConfig((GraderConfig("exact_match", step_end="\n"),)))
    assert found.startswith("reward.graders.0.step_end: got '\\n' with exact_match, want a grader of your own")


def test_a_pool_of_a_function_takes_the_end_of_a_step():
    with GraderPool("step_graders:lengths", step_end=";", workers=1, deadline_s=30.0) as pool:
        assert pool.has_steps
        assert pool.grade([[Sample("", "a;bb", "", "")]]).earned == [[{2: 2.0, 4: 2.0}]]
    with pytest.raises(UserError, match="step_end"):
        GraderPool("exact_match", step_end=";")

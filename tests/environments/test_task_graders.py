"""Graders of single tasks of a mixture: who grades what, components and sums by hand, votes, steps and failures."""

from pathlib import Path

import numpy as np
import pytest

from jaxrl_llm.environments import worker
from jaxrl_llm.environments.config import GraderConfig, RewardConfig
from jaxrl_llm.environments.grader import Sample, unreadable_rows
from jaxrl_llm.environments.grader_pool import Failure, GraderPool, component_metrics
from jaxrl_llm.environments.worker import GraderSetup, decode, encode, grade_group

N = np.nan


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)


def group(task, *completions, answer="4"):
    return [Sample("<2+2>", text, answer, "eos", num_tokens=len(text), task=task) for text in completions]


GRADERS = (
    GraderConfig("exact_match", tasks=("sums",)),
    GraderConfig("numeric", 2.0, tasks=("words", "more")),
    GraderConfig("length", 0.5, options={"limit": 1}),
)
GROUPS = [group("sums", "4", "44"), group("words", "It is 4", "5"), group("more", "4")]
# A sum of the graders of the task: exact_match and half of length; twice numeric and half of length.
COMPONENTS = [[[1, 0], [N, N], [N, N]], [[N, N], [1, 0], [1, N]], [[0, -1], [-1, 0], [0, N]]]
REWARD = [[1, -0.5], [1.5, 0], [2, N]]


def grade(groups, *graders):
    with GraderPool(RewardConfig(graders, workers=1, deadline_s=30.0)) as pool:
        return pool.grade(groups)


def test_each_grader_grades_its_tasks_and_is_absent_elsewhere():
    graded = grade(GROUPS, *GRADERS)
    np.testing.assert_array_equal(graded.components, np.float32(COMPONENTS))
    np.testing.assert_array_equal(graded.reward, np.float32(REWARD))
    assert graded.failure.tolist() == [Failure.NONE] * 3 and graded.failed_by.tolist() == [-1] * 3
    # numeric extracts; a task without a grader that does votes by its completions.
    assert graded.votes == [["4", "44"], ["4", "5"], ["4"]]


def test_a_metric_is_the_mean_over_the_rows_of_its_graders_tasks():
    components = np.float32([[1, N, 0], [0, N, -1], [N, 1, -1], [N, 0, 0], [N, N, N]])
    graded, none = np.array([True] * 4 + [False]), np.zeros(3, np.int32)
    found = component_metrics(components, graded, none, none - 1, ["a", "b", "c"])
    assert {name: found[name] for name in found if name.endswith("mean")} == {
        "rewards/a/mean": 0.5,
        "rewards/b/mean": 0.5,
        "rewards/c/mean": -0.5,
    }
    of_one_task = component_metrics(components[:2], graded[:2], none[:2], none[:2] - 1, ["a", "b", "c"])
    assert "rewards/b/mean" not in of_one_task


def verdict(group):
    """What a worker answers on a group, through its line."""
    setups = [GraderSetup(one.grader, one.options, one.step_end, one.tasks) for one in GRADERS]
    sent = []
    made = [(worker.make_grader(one.name, one.options), one) for one in setups]
    return decode(encode(grade_group(made, group, sent.append, 4.0)), setups, group), sent


def check_verdicts():
    (sums, first), (words, second) = verdict(GROUPS[0]), verdict(GROUPS[1])
    assert (sums.components, first) == ([[1, 0], [], [0, -1]], [2])
    assert (words.components, second) == ([[], [1, 0], [-1, 0]], [1, 2])


def test_a_worker_answers_for_the_graders_of_the_task_alone():
    check_verdicts()


def test_a_mutant_that_grades_every_row_with_all_graders_is_caught(monkeypatch):
    monkeypatch.setattr(GraderSetup, "grades", lambda self, group: True)
    with pytest.raises(AssertionError):
        check_verdicts()


@pytest.mark.parametrize(
    "components", [[[1.0, 0.0], [1.0, 0.0], [0.0, -1.0]], [[1.0, 0.0], [], []], [[], [], [0.0, 0.0]]]
)
def test_a_verdict_with_rewards_of_other_graders_is_refused(components):
    setups = [GraderSetup(one.grader, one.options, one.step_end, one.tasks) for one in GRADERS]
    line = encode(worker.Verdict(components, [], steps=[[], [], []]))
    with pytest.raises(ValueError, match="wrong sizes"):
        decode(line, setups, GROUPS[0])


def test_a_failure_costs_the_group_and_names_its_grader_and_tasks_without_it_go_on():
    raises = GraderConfig("bad_graders:by_completion", tasks=("words",))
    graded = grade(GROUPS[:2], GRADERS[0], raises, GRADERS[2])
    assert graded.failure.tolist() == [Failure.NONE, Failure.RAISED] and graded.failed_by.tolist() == [-1, 1]
    np.testing.assert_array_equal(graded.components, np.float32([COMPONENTS[0][:2], [[N, N]] * 2, [[0, -1], [N, N]]]))
    np.testing.assert_array_equal(graded.reward, np.float32([REWARD[0], [N, N]]))


def test_steps_are_those_of_the_graders_of_the_task():
    """Steps "ab;" and "c": one number each by a grader of steps; elsewhere the whole reward at the end."""
    steps = GraderConfig("step_graders:lengths", 2.0, step_end=";", tasks=("words",))
    graded = grade([group("sums", "ab;c", answer="ab;c"), group("words", "ab;c")], GRADERS[0], steps)
    assert graded.earned == [[{4: 1.0}], [{3: 6.0, 4: 2.0}]]
    np.testing.assert_array_equal(graded.reward, [[1], [4]])


def test_a_grader_checks_the_rows_of_its_tasks_alone():
    rows = [("f:1", Sample("a", "", "no number", "", task="sums")), ("f:2", Sample("b", "", "none", "", task="words"))]
    first, rest = unreadable_rows(RewardConfig(GRADERS), rows)
    assert first.startswith("f:2 ('b'): grader \"numeric\":") and "cannot grade 1 of 1 rows" in rest

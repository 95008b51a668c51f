"""Metrics of each task of a mixture, and what counts as right where graders differ: by hand."""

import dataclasses

import numpy as np
import pytest
from fakes import config, groups_of, sums

from jaxrl_llm.errors import UserError
from jaxrl_llm.experience.filters import has_signal
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.credit import make_advantage
from jaxrl_llm.objective.group_estimators import Gdpo, Grpo
from jaxrl_llm.roles.build import filter_for
from jaxrl_llm.roles.summary import describe
from jaxrl_llm.roles.task_metrics import describe_tasks
from jaxrl_llm.types import Scores

N = np.nan
TASK = sums()
MIXTURE = dataclasses.replace(
    TASK,
    train=tuple(dataclasses.replace(row, task="ab"[i % 2]) for i, row in enumerate(TASK.train)),
    weights={"a": 1.0, "b": 1.0, "c": 1.0},
)


def step():
    """Groups of rows 0, 1, 2, 3: of the tasks a, b, a, b. The last could not be graded. Grader x is a's, y is b's, z both's."""
    groups = groups_of(np.array([[2.0, 0.5], [3.0, 1.0], [0.0, 0.0], [N, N]]), length=[2, 1, 2, 2, 1, 1, 2, 2])
    components = np.float32([[1, N, 1], [0, N, 0.5], [N, 2, 1], [N, 0.5, 0.5], [0, N, 0], [0, N, 0], [N] * 3, [N] * 3])
    return groups.replace(components=components, graders=("x", "y", "z"))


def test_the_numbers_of_each_task():
    want = {
        "task/a/groups": 0.5,
        "task/a/mean_length": (2 + 1 + 1 + 1) / 4,
        "task/a/reward": 2.5 / 4,
        "task/a/success": 1 / 4,
        "task/b/groups": 0.5,
        "task/b/mean_length": 2.0,
        "task/b/reward": 2.0,
        "task/b/success": 0.5,
        "task/c/groups": 0.0,
    }
    assert describe_tasks(step(), MIXTURE) == pytest.approx(want)
    assert describe_tasks(step(), TASK) == {}
    found = describe(step(), ["x", "y", "z"], MIXTURE)
    assert found.items() >= want.items() and found["rewards/x/mean"] == 1 / 4 and found["rewards/y/mean"] == 1.25
    # What no row says of a grader is no 0: z is the mean of six rows.
    assert found["rewards/z/mean"] == pytest.approx(3 / 6)


def test_success_is_by_the_first_grader_of_the_rows_task():
    groups = step()
    np.testing.assert_array_equal(groups.measure("success"), [1, 0, 1, 0, 0, 0, N, N])
    np.testing.assert_array_equal(groups.replace(threshold=0.5).measure("success"), [1, 0, 1, 1, 0, 0, N, N])
    np.testing.assert_array_equal(groups.measure("y"), [N, N, 2, 0.5, N, N, N, N])


def test_a_reward_of_one_grader_per_row_is_no_sum():
    groups = step()
    one_each = groups.replace(components=groups.components[:, :2], graders=("x", "y"))
    assert has_signal(one_each).tolist() == [True, True, True, True, False, False, False, False]
    with pytest.raises(UserError, match="the sum of 2 graders"):
        has_signal(groups)


def test_gdpo_normalizes_each_grader_in_the_groups_that_it_grades():
    """Sample std of 1, 0 is sqrt(1/2), so they are +-sqrt(1/2); so are 2, 0.5, and the 1, 0.5 of z with weight 2. Sums of
    +-3 sqrt(1/2) in two groups and 0 in the third, of mean 0 and sample std sqrt(4 * 4.5 / 5)."""
    objective = ObjectiveConfig(advantage=Gdpo(eps=0.0))
    credit = make_advantage(objective, [1.0, 1.0, 2.0])(step(), Scores())
    one = 3 * 0.5**0.5 / (18 / 5) ** 0.5
    np.testing.assert_allclose(credit.advantage[:, 0], [one, -one, one, -one, 0, 0, 0, 0], rtol=1e-6)


def test_other_advantages_read_the_reward_alone():
    groups, alone = step(), step()
    alone = alone.replace(components=alone.reward[:, None], graders=("x",))
    credits = [make_advantage(ObjectiveConfig(advantage=Grpo()), None)(g, Scores()).advantage for g in (groups, alone)]
    np.testing.assert_array_equal(*credits)


def mixture(*graders):
    part = {"kind": "arithmetic", "terms": 2, "held_out": 8}
    tasks = [{"name": "a", "task": part}, {"name": "b", "task": part}]
    return config(task=tasks, reward={"graders": list(graders)})


A, B = {"grader": "exact_match", "tasks": ["a"]}, {"grader": "numeric", "tasks": ["b"]}


@pytest.mark.parametrize(
    ("graders", "keep"),
    [
        # One grader for each task: by the reward, which is that grader's.
        ([A, B], [True, True, False, False]),
        # Two for the task a: by success, in which the last group differs.
        ([A, B, {"grader": "cut_off", "tasks": ["a"]}], [False, True, False, True]),
        # The first grader of all tasks decides.
        ([{"grader": "cut_off"}, A, B], [True, False, False, True]),
    ],
)
def test_the_automatic_filter_judges_each_task_by_its_graders(graders, keep):
    """Rewards differ in the first two groups, success in the second and the last, the first component in the first and the last."""
    groups = groups_of(np.array([[2.0, 0.5], [3.0, 1.0], [0.0, 0.0], [1.0, 1.0]]))
    components = np.float32([[0.2, N], [0, N], [N, 2], [N, 0.5], [0, N], [0, N], [1, N], [0, N]])
    if len(graders) == 3 and "tasks" not in graders[0]:
        components = np.float32([[0.2, N], [0, N], [1, 2], [1, 0.5], [0, N], [0, N], [1, N], [0, N]])
    labels = tuple(grader["grader"] for grader in graders)[: components.shape[1]]
    cfg = mixture(*graders)
    judged = filter_for(cfg, list).apply((), groups.replace(components=components, graders=labels))[1]
    assert judged.kept.tolist() == keep

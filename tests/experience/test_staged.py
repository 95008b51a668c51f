"""Stages with gates: by hand, against a plain implementation, and what does not fit."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_groups import groups_of

from jaxrl_llm.config.consistency import training_problems
from jaxrl_llm.config.loading import validate
from jaxrl_llm.experience.curricula import counted
from jaxrl_llm.experience.staged import RowsOfStage, Staged

many = settings(max_examples=100, deadline=None)
LEVELS = [{"level": level} for level in (1, 1, 1, 2, 2, 4)]
STAGES = (RowsOfStage(values=(1,)), RowsOfStage(at_least=2, at_most=3), RowsOfStage(at_least=3.5))


def rule(**changes) -> Staged:
    return Staged(**{"column": "level", "stages": STAGES, "reaches": 0.75, "groups": 2, "rehearsal": 0.25} | changes)


def seen(curriculum, state, step):
    """The state after a step of (row, rewards)."""
    rows = [row for row, _ in step]
    return curriculum.observe(state, groups_of([len(x) for _, x in step], [r for _, x in step for r in x], row=rows))


def test_by_hand():
    """Two groups at .5 and 1 reach .75, one at 1 does not, and a group of an earlier stage does not count."""
    curriculum = rule().over(LEVELS, 0)
    state, rng = curriculum.init(6), np.random.default_rng(0)
    state, rows = curriculum.choose(state, rng, 6)
    assert sorted(rows) == [0, 0, 1, 1, 2, 2], "there is no earlier stage yet"
    state = seen(curriculum, state, [(0, [1, 1])])
    assert state.stage == 0 and curriculum.describe(state, rows) == {
        "stage": 1, "window_filled": 0.5, "window_mean": 1, "share/stage_1": 1, "share/stage_2": 0, "share/stage_3": 0
    }  # fmt: skip
    state = seen(curriculum, state, [(1, [0, 1]), (2, [np.nan, np.nan])])
    assert state.stage == 1 and state.steps == 0 and np.isnan(state.window).all()
    # A quarter of eight from stage 1, the others from both rows of stage 2.
    state, rows = curriculum.choose(state, rng, 8)
    assert np.bincount(rows, minlength=6)[3:].tolist() == [3, 3, 0] and (rows < 3).sum() == 2
    state = seen(curriculum, state, [(0, [1, 1]), (1, [1, 1]), (3, [1, 1])])
    assert state.stage == 1 and state.steps == 1
    # The mean is over the last two of three: 1, then 0 and 1.
    state = seen(curriculum, state, [(3, [0, 0]), (4, [1, 1])])
    assert state.stage == 1 and curriculum.describe(state, rows)["window_mean"] == 0.5
    state = seen(curriculum, state, [(4, [1, 1])])
    assert state.stage == 2
    state = seen(curriculum, state, [(5, [1]), (5, [1])])
    assert state.stage == 2 and state.window.tolist() == [1, 1], "the last stage stays"
    # A quarter of 20 is 5, of which the three rows of stage 1 have three and the two of stage 2 two.
    assert np.bincount(curriculum.choose(state, rng, 20)[1]).tolist() == [1, 1, 1, 1, 1, 15]


def test_a_stage_opens_after_so_many_steps_in_any_case():
    curriculum = rule(after=3).over(LEVELS, 0)
    state, stages = curriculum.init(6), []
    for _ in range(8):
        state = seen(curriculum, state, [(0, [0, 0])])
        stages.append(int(state.stage))
    assert stages == [0, 0, 1, 1, 1, 2, 2, 2]


def plain_stages(cfg: Staged, stage_of: list[int], steps: list) -> list[int]:
    """The stage after each step of (row, rewards), with lists."""
    stage, window, waited, found = 0, [], 0, []
    for step in steps:
        window += [sum(x) / len(x) for row, x in step if stage_of[row] == stage]
        waited += 1
        last = window[-cfg.groups :]
        reached = len(last) == cfg.groups and math.fsum(last) / len(last) >= cfg.reaches - 1e-9
        if stage < 2 and (reached or (cfg.after and waited >= cfg.after)):
            stage, window, waited = stage + 1, [], 0
        found.append(stage)
    return found


GROUP = st.tuples(st.integers(0, 5), st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=3))


@many
@given(
    st.lists(st.lists(GROUP, min_size=1, max_size=4), min_size=1, max_size=10),
    st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    st.integers(1, 5),
    st.integers(0, 4),
)
def test_stages_are_those_of_a_plain_implementation_and_only_open_rows_come(steps, reaches, groups, after):
    cfg, stage_of = rule(reaches=reaches, groups=groups, after=after), [0, 0, 0, 1, 1, 2]
    curriculum = counted(cfg.over(LEVELS, 0))
    state, rng, found = curriculum.init(6), np.random.default_rng(0), []
    for step in steps:
        now = int(state.curriculum.stage)
        state, rows = curriculum.choose(state, rng, 4)
        assert max(stage_of[row] for row in rows) == now
        state = seen(curriculum, state, step)
        found.append(int(state.curriculum.stage))
    assert found == plain_stages(cfg, stage_of, steps)
    # Checkpoints fix shapes and dtypes.
    first = cfg.over(LEVELS, 0).init(6)
    assert [x.dtype for x in state.curriculum[1:]] == [x.dtype for x in first[1:]]
    assert state.curriculum.window.shape == first.window.shape


def test_a_row_belongs_to_the_first_stage_that_has_it():
    whole = rule(stages=(RowsOfStage(values=("1", 2)), RowsOfStage(at_least=0)))
    assert whole.over(LEVELS, 0).stage.tolist() == [0, 0, 0, 0, 0, 1] and whole.misfits(LEVELS) == []
    assert rule(stages=(RowsOfStage(values=("",)), RowsOfStage(at_most=2))).misfits([{"level": 1}, {}]) == []


@pytest.mark.parametrize(
    "stages, columns, want",
    [
        (STAGES, [{"lvl": 1}], ["column: got 'level', want a column of the task: lvl"]),
        (
            STAGES[:2],
            LEVELS,
            ["stages: got 1 rows in no stage, the first with level 4, want each row in one"],
        ),
        (
            (*STAGES, RowsOfStage(values=(2, 7))),
            LEVELS,
            ["stages.3: got no row that is in no earlier stage, want one or more"],
        ),
        (
            STAGES[2:], [{"level": "hard"}, {"level": 9}, {}],
            ["stages: got 2 rows in no stage, the first with level 'hard', want each row in one"],
        ),
        (STAGES, LEVELS, []),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit(stages, columns, want):
    assert rule(stages=stages).misfits(columns) == [f"experience.curriculum.{line}" for line in want]


def test_in_a_config():
    of = lambda **more: validate(  # noqa: E731
        {"experience": {"curriculum": {"kind": "stages", "column": "level", "stages": [[1], {"at_least": 2}]} | more}},
        "c",
    )
    assert of().experience.curriculum == Staged(
        column="level", stages=(RowsOfStage(values=(1,)), RowsOfStage(at_least=2))
    )
    assert training_problems(of()) == training_problems(of(by="reward", reaches=3)) == []
    where = "experience.curriculum"
    assert training_problems(of(reaches=1.5)) == [
        f"{where}.reaches: got 1.5, want 0 to 1: it is a share of right responses"
    ]
    stages = [{}, {"values": [1], "at_most": 2}, {"at_least": 3, "at_most": 2}]
    assert training_problems(of(stages=stages)) == [
        f"{where}.stages.0: got neither, want values, or a range (at_least, at_most)",
        f"{where}.stages.1: got both, want values, or a range (at_least, at_most)",
        f"{where}.stages.2: got at_least 3, want at most at_most (2)",
    ]

"""Stratified curricula: shares of each batch, rows of each stratum, and the state that a run resumes from."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_groups import groups_of

from jaxrl_llm.config.loading import validate
from jaxrl_llm.errors import UserError
from jaxrl_llm.experience.curricula import counted
from jaxrl_llm.experience.strata import Drawn, StratifiedByColumn, StratifiedByDifficulty, draw

many = settings(max_examples=200, deadline=None)
LEVELS = [{"level": level} for level in ["easy"] * 6 + ["hard"] * 3 + ["odd"]]


def fresh(rows: int, strata: int) -> Drawn:
    return Drawn(np.zeros(rows, np.int32), np.zeros(strata))


def plain_strata(share: list[int], sizes: list[int], n: int) -> list[int]:
    """Strata of n draws one by one, in exact fractions: the one with the largest debt, the first of equals."""
    share = [s if size else 0 for s, size in zip(share, sizes, strict=True)]
    share = share if any(share) else sizes
    debt, found = [Fraction(0)] * len(share), []
    for _ in range(n):
        debt = [d + Fraction(s, sum(share)) for d, s in zip(debt, share, strict=True)]
        found.append(max((i for i in range(len(share)) if share[i]), key=lambda i: (debt[i], -i)))
        debt[found[-1]] -= 1
    return found


@many
@given(st.lists(st.tuples(st.sampled_from([0, 1, 2, 4]), st.integers(0, 5)), min_size=1, max_size=5), st.data())
def test_strata_come_in_their_shares_however_the_draws_are_split(strata, data):
    """The strata are those of the same rule in exact fractions, and never two rows away from their share."""
    share, sizes = [s for s, _ in strata], [size for _, size in strata]
    if not sum(sizes):
        return
    stratum = np.repeat(np.arange(len(sizes)), sizes)
    parts = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    state, found = fresh(len(stratum), len(sizes)), []
    for n in parts:
        state, rows = draw(state, stratum, np.array(share, float), np.random.default_rng(0), n)
        found += stratum[rows].tolist()
    want = plain_strata(share, sizes, sum(parts))
    weights = [s if size else 0 for s, size in zip(share, sizes, strict=True)]
    weights = weights if any(weights) else sizes
    for i, weight in enumerate(weights):
        away = abs(found.count(i) - sum(parts) * weight / sum(weights))
        assert away < 2 and (weight or not found.count(i))
    assert found == want and state.times.sum() == sum(parts)
    assert abs(state.owed.sum()) < 1e-9 and (np.abs(state.owed) < 2).all()


def test_by_hand():
    """Weights 3 and 1 of strata of two rows and one: debts .75 .25 | .5 .5 | .25 .75 | 1 0, so strata 0 0 1 0."""
    stratum, rng = np.array([0, 1, 0]), np.random.default_rng(0)
    state, rows = draw(fresh(3, 2), stratum, np.array([3.0, 1.0]), rng, 4)
    assert stratum[rows].tolist() == [0, 0, 1, 0]
    # Both rows of stratum 0 before one of them again.
    assert {*rows[:2]} == {0, 2} and state.times.tolist() in ([2, 1, 1], [1, 1, 2])
    np.testing.assert_allclose(state.owed, 0, atol=1e-12)


def test_every_batch_has_the_pools_shares_and_every_row_comes_once_per_epoch():
    curriculum = StratifiedByColumn(column="level").over(LEVELS, 0)
    state, rng = curriculum.init(10), np.random.default_rng(1)
    for epoch in range(1, 4):
        seen = []
        for _ in range(2):
            state, rows = curriculum.choose(state, rng, 5)
            seen += rows.tolist()
            levels = Counter(LEVELS[row]["level"] for row in rows)
            assert levels["easy"] == 3 and levels["hard"] in (1, 2) and levels["odd"] in (0, 1)
        assert sorted(seen) == list(range(10)) and (state.times == epoch).all()


def test_named_shares():
    """Twice as many hard ones as odd ones, none that are easy: of 6 rows 4 hard ones of 3, and the odd one twice."""
    curriculum = StratifiedByColumn(column="level", shares={"hard": 2, "odd": 1}).over(LEVELS, 0)
    rows = curriculum.choose(curriculum.init(10), np.random.default_rng(0), 6)[1]
    assert Counter(rows.tolist())[9] == 2 and sorted(Counter(rows[rows != 9].tolist()).values()) == [1, 1, 2]


def test_the_order_within_a_stratum_is_random_and_repeatable():
    curriculum = StratifiedByColumn(column="level").over(LEVELS, 0)
    drawn = [curriculum.choose(curriculum.init(10), np.random.default_rng(seed), 10)[1].tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_difficulty_by_hand():
    """Rows 0, 1, 2 with pass rates 0, 1/2, 1; row 3 never visited. Edges at .25 and .5: a rate on an edge is above it."""
    curriculum = StratifiedByDifficulty(edges=(0.25, 0.5))
    state = curriculum.observe(curriculum.init(4), groups_of([2, 2, 2], [0, 0, 0, 1, 1, 1]))
    assert curriculum.strata(state.rates).tolist() == [1, 3, 3, 0]
    # Equal weights; stratum 2 has no row: strata 0, 1, 3 in turn.
    after, rows = curriculum.choose(state, np.random.default_rng(0), 6)
    assert curriculum.strata(state.rates)[rows].tolist() == [0, 1, 3, 0, 1, 3]
    assert after.drawn.times.tolist() == [2, 1, 1, 2]


def test_all_prompts_are_drawn_while_none_has_been_visited_whatever_the_shares():
    curriculum = StratifiedByDifficulty(shares=(0, 0, 1, 0))
    state, rows = curriculum.choose(curriculum.init(6), np.random.default_rng(0), 6)
    assert sorted(rows.tolist()) == list(range(6))
    # Then those of medium difficulty alone: row 1.
    state = curriculum.observe(state, groups_of([2, 2, 2], [0, 0, 0, 1, 1, 1]))
    assert curriculum.choose(state, np.random.default_rng(0), 3)[1].tolist() == [1, 1, 1]


def test_a_stratum_that_was_empty_is_not_made_up_for():
    """What its share would have been went to the others for good."""
    curriculum = StratifiedByDifficulty(shares=(1, 1, 1, 1))
    state, rng = curriculum.init(4), np.random.default_rng(0)
    for _ in range(5):
        state, _ = curriculum.choose(state, rng, 4)
    state = curriculum.observe(state, groups_of([2], [0, 0]))
    _, rows = curriculum.choose(state, rng, 8)
    assert np.count_nonzero(rows == 0) == 4


def test_a_group_that_could_not_be_graded_changes_no_stratum():
    curriculum = StratifiedByDifficulty()
    state = curriculum.observe(curriculum.init(2), groups_of([2, 2], [0, np.nan, 1, 1]))
    assert curriculum.strata(state.rates).tolist() == [0, 3]


def test_counted_visits_give_each_its_own_noise():
    curriculum = counted(StratifiedByColumn(column="level").over(LEVELS, 0))
    state, _ = curriculum.choose(curriculum.init(10), np.random.default_rng(0), 7)
    assert state.visits == 7 and state.curriculum.times.sum() == 7


@pytest.mark.parametrize(
    "column, shares, want",
    [
        ("lvel", None, ["experience.curriculum.column: got 'lvel', want a column of the task: level"]),
        (
            "level",
            {"hard": 1, "hrad": 1},
            [
                "experience.curriculum.shares.hrad: got no row whose column level has this value, want one of: easy, hard, odd"
            ],
        ),
        ("level", {"hard": 0}, ["experience.curriculum.shares: got no weight above 0, want one or more"]),
        ("level", {"hard": 1}, []),
        ("level", None, []),
    ],
)
def test_problems_of_a_column(column, shares, want):
    assert StratifiedByColumn(column=column, shares=shares).misfits(LEVELS) == want


def test_problems_of_difficulty():
    found = StratifiedByDifficulty(edges=(0.5, 0.5), shares=(1, 1)).problems
    assert found == [
        "experience.curriculum.edges: got [0.5, 0.5], want rising numbers",
        "experience.curriculum.shares: got 2 numbers, want 4: for rows never visited, and for 3 strata",
    ]
    assert StratifiedByDifficulty(shares=(0, 0, 0, 0)).problems == [
        "experience.curriculum.shares: got no weight above 0, want one or more"
    ]


def test_in_a_config():
    cfg = validate(
        {"experience": {"curriculum": {"kind": "stratified", "column": "level", "shares": {"1": 1, "2": 0.5}}}}, "c"
    )
    assert cfg.experience.curriculum == StratifiedByColumn(column="level", shares={"1": 1.0, "2": 0.5})
    with pytest.raises(UserError, match=r"curriculum\.kind: got 'stratifed', want one of .*perhaps you meant"):
        validate({"experience": {"curriculum": {"kind": "stratifed"}}}, "c")

"""Curricula that aim: weights by hand, against implementations of their own, and in the proportions that they say."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_groups import groups_of
from scipy.stats import chisquare

from jaxrl_llm.config.consistency import training_problems
from jaxrl_llm.config.loading import validate
from jaxrl_llm.experience.pass_rates import PassRates
from jaxrl_llm.experience.targeted import AdaRft, DifficultyTargeted, Learnability, Sec, Unsolved, drawn

many = settings(max_examples=150, deadline=None)
MANY = 20_000
RATES = np.array([0.0, 0.25, 0.5, 0.9, 1.0])
LEVELS = [{"level": level} for level in (1, 1, 1, 2, 2, 4)]


def rates(p, samples=1e9) -> PassRates:
    """Estimates so sure that a prior does not show."""
    return PassRates(np.array(p) * samples, np.full(len(p), samples))


@pytest.mark.parametrize(
    "rule, want",
    [
        (Unsolved(), [1, 0.75, 0.5, 0.1, 0]),
        (Learnability(), [0, 3 / 16, 1 / 4, 0.09, 0]),
        # Difficulties 1, .75, .5, .1, 0 are .3, .05, .2, .6 and .7 away from .7; the closest has weight 1.
        (
            DifficultyTargeted(target=0.7, tau=0.5),
            [math.exp(-0.5), 1, math.exp(-0.3), math.exp(-1.1), math.exp(-1.3)],
        ),
    ],
)
def test_weights_by_hand_and_rows_in_their_proportions(rule, want):
    np.testing.assert_allclose(rule.weight(RATES), want, rtol=1e-12, atol=1e-15)
    rng, want = np.random.default_rng(0), np.array(want)
    rows = [int(rule.choose(rates(RATES), rng, 1)[1][0]) for _ in range(MANY)]
    counts, some = np.bincount(rows, minlength=5), want > 0
    assert not counts[~some].any()
    assert chisquare(counts[some], MANY * want[some] / want.sum()).pvalue > 1e-3


def test_a_sharp_target_far_from_every_row_takes_the_closest():
    """exp(-0.5 / 0.001) is 0 in floats for all of them."""
    assert DifficultyTargeted(target=1, tau=1e-3).weight(np.array([0.9, 0.5, 0.8])).round(9).tolist() == [
        0,
        1,
        0,
    ]


@pytest.mark.parametrize("rule", [Unsolved(), Learnability(), DifficultyTargeted()])
def test_a_prior_keeps_every_row_in_play_and_visits_count(rule):
    """Row 0 always right, row 1 never, row 2 half of the time, row 3 never visited: its estimate is 0.5."""
    state = rule.observe(rule.init(4), groups_of([2, 2, 2], [1, 1, 0, 0, 0, 1]))
    # With a prior of one sample at 0.5: 2.5 / 3, 0.5 / 3, 1.5 / 3.
    weight = rule.weight(np.array([2.5 / 3, 0.5 / 3, 0.5, 0.5]))
    rng, twin = np.random.default_rng(3), np.random.default_rng(3)
    after, rows = rule.choose(state, rng, 3)
    assert (weight > 0).all() and after is state
    np.testing.assert_array_equal(rows, drawn(weight, twin, 3))


@many
@given(st.lists(st.sampled_from([0.0, 0.5, 2.0]), min_size=1, max_size=6), st.integers(1, 20), st.integers(0, 99))
def test_no_row_comes_twice_while_others_have_a_weight(weight, n, seed):
    found = drawn(np.array(weight), np.random.default_rng(seed), n)
    some = [i for i, w in enumerate(weight) if w] or list(range(len(weight)))
    assert len(found) == n and set(found) <= set(some)
    for start in range(0, n, len(some)):
        part = found[start : start + len(some)].tolist()
        assert len(set(part)) == len(part)


def plain_target(rule: AdaRft, rewards: list[list[float]]) -> list[float]:
    """The paper's algorithm, number by number."""
    target, found = rule.start, []
    for step in rewards:
        mean = sum(step) / len(step)
        target = min(max(target + rule.step * math.tanh(rule.sensitivity * (mean - rule.wanted)), rule.low), rule.high)
        found.append(target)
    return found


@many
@given(
    st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=4, max_size=4), min_size=1, max_size=8),
    st.floats(0.1, 60),
    st.floats(0.1, 4),
    st.floats(0, 1),
    st.floats(0, 3),
)
def test_the_target_of_adarft(rewards, size, sensitivity, wanted, start):
    rule = AdaRft(column="level", start=start, step=size, sensitivity=sensitivity, wanted=wanted, low=0.5, high=3.5)
    curriculum, found = rule.over(LEVELS, 0), []
    state = curriculum.init(6)
    for step in rewards:
        state = curriculum.observe(state, groups_of([2, 2], step))
        found.append(float(state.difficulty))
    np.testing.assert_allclose(found, plain_target(rule, rewards), rtol=1e-6, atol=1e-6)


def test_adarft_takes_the_closest_rows_least_chosen_first():
    """Levels 1 1 1 2 2 4, target 1.9: 2 is closest, then 1, then 4."""
    curriculum = AdaRft(column="level", start=1.9).over(LEVELS, 0)
    state, rng = curriculum.init(6), np.random.default_rng(0)
    state, first = curriculum.choose(state, rng, 3)
    assert sorted(first[:2]) == [3, 4] and first[2] in (0, 1, 2)
    state, second = curriculum.choose(state, rng, 4)
    assert sorted(second[:2]) == [3, 4] and {*second[2:]} == {0, 1, 2} - {first[2]}
    state, all_twice = curriculum.choose(state, rng, 12)
    assert sorted(all_twice) == sorted([*range(6)] * 2)
    nothing = groups_of([2], [np.nan, np.nan])
    assert curriculum.observe(state, nothing) is state, "no grade moves nothing"


def plain_gains(rule: Sec, rows: list[str], steps: list[list[tuple[int, list[float]]]]) -> dict[str, float]:
    """Q of each value after steps of groups (row, rewards)."""
    gain = dict.fromkeys(sorted(set(rows)), 0.0)
    for step in steps:
        each: dict[str, list[float]] = {}
        for row, x in step:
            mean = sum(x) / len(x)
            std = math.sqrt(sum((r - mean) ** 2 for r in x) / (len(x) - 1)) if len(x) > 1 else 0.0
            each.setdefault(rows[row], []).append(sum(abs(r - mean) / (std + 1e-4) for r in x) / len(x))
        for value, sizes in each.items():
            gain[value] += rule.rate * (sum(sizes) / len(sizes) - gain[value])
    return gain


GROUP = st.tuples(st.integers(0, 5), st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=4))
"""A row of LEVELS, and the rewards of its samples."""


@many
@given(st.lists(st.lists(GROUP, min_size=1, max_size=4), min_size=1, max_size=5), st.floats(0, 1))
def test_the_gains_of_sec(steps, rate):
    rule = Sec(column="level", rate=rate)
    curriculum = rule.over(LEVELS, 0)
    state = curriculum.init(6)
    for step in steps:
        groups = groups_of([len(x) for _, x in step], [r for _, x in step for r in x], rows=20)
        prompts = groups.rollouts.prompts.replace(row=np.array([row for row, _ in step], np.int32))
        state = curriculum.observe(state, groups.replace(rollouts=groups.rollouts.replace(prompts=prompts)))
    want = plain_gains(rule, [str(row["level"]) for row in LEVELS], steps)
    np.testing.assert_allclose(state.gain, list(want.values()), rtol=1e-9, atol=1e-12)


def test_sec_draws_values_by_their_softmax_and_rows_in_turn():
    """Gains .9, .3, 0 at tau .3: weights e^3, e^1, 1."""
    curriculum = Sec(column="level", tau=0.3).over(LEVELS, 0)
    state, rng = curriculum.init(6)._replace(gain=np.array([0.9, 0.3, 0.0])), np.random.default_rng(0)
    state, rows = curriculum.choose(state, rng, MANY)
    counts = np.bincount(curriculum.value[rows], minlength=3)
    want = np.exp([3, 1, 0])
    assert chisquare(counts, MANY * want / want.sum()).pvalue > 1e-3
    times = np.bincount(rows, minlength=6)
    assert np.ptp(times[:3]) <= 1 and np.ptp(times[3:5]) <= 1 and (state.times == times).all()


@pytest.mark.parametrize(
    "rule, columns, want",
    [
        (AdaRft(column="lvl"), LEVELS, ["experience.curriculum.column: got 'lvl', want a column of the task: level"]),
        (Sec(column="lvl"), LEVELS, ["experience.curriculum.column: got 'lvl', want a column of the task: level"]),
        (
            AdaRft(column="level"),
            [{"level": 1}, {"level": "two"}, {}],
            ["experience.curriculum.column: got 'two' as a row's level, want a number in each"],
        ),
        (
            AdaRft(column="level"),
            [{"level": 1.5}, {}],
            ["experience.curriculum.column: got None as a row's level, want a number in each"],
        ),
        (AdaRft(column="level"), LEVELS, []),
        (Sec(column="level"), [{"level": "a"}, {}], []),
    ],
)
def test_columns_that_do_not_fit(rule, columns, want):
    assert rule.misfits(columns) == want


def test_in_a_config():
    of = lambda value: validate({"experience": {"curriculum": value}}, "c")  # noqa: E731
    assert of("learnability").experience.curriculum == Learnability()
    assert of({"kind": "sec", "column": "level"}).experience.curriculum == Sec(column="level")
    [problem] = training_problems(of({"kind": "unsolved", "by": "reward"}))
    assert problem.startswith(
        "experience.curriculum unsolved.by: got reward, want success or a grader whose rewards are from 0"
    )
    assert training_problems(of({"kind": "ada_rft", "column": "x", "by": "reward"})) == []
    assert training_problems(of({"kind": "ada_rft", "column": "x", "low": 5, "high": 2})) == [
        "experience.curriculum.low: got 5.0, want at most high (2.0)"
    ]

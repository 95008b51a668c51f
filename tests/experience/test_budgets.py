"""Budgets against all allocations, against their closed forms, and round by round by hand."""

import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_groups import by_prompt, graded, groups_of, ragged

from jaxrl_llm.errors import UserError
from jaxrl_llm.experience.budgets import Knapsack, ReinforceAda, Rounds, Screening, UniformBudget, Vip
from jaxrl_llm.experience.pass_rates import PassRates, estimated, observed, unvisited

many = settings(max_examples=80, deadline=None, derandomize=True, database=None)
RATES = st.lists(st.sampled_from([0.0, 0.02, 0.1, 0.3, 0.5, 0.9, 1.0]), min_size=1, max_size=5)


def rates(p) -> PassRates:
    """Pass rates that many samples say."""
    p = np.array(p, float)
    return PassRates(1e9 * p, np.full(len(p), 1e9))


def allocated(budget, p, left):
    _, samples = budget.allocate(rates(p), np.arange(len(p)), None, left)
    assert samples.dtype.kind == "i" and samples.shape == (len(p),) and samples.sum() <= left
    return samples.tolist()


def best(value, num: int, low: int, high: int, total: int) -> float:
    """Largest sum of value(i, n) over all allocations: dynamic programming."""

    @cache
    def from_(i: int, left: int) -> float:
        if i == num:
            return 0.0 if left == 0 else -math.inf
        return max((value(i, n) + from_(i + 1, left - n) for n in range(low, min(high, left) + 1)), default=-math.inf)

    return from_(0, total)


@many
@given(RATES, st.integers(2, 4), st.integers(4, 9), st.integers(2, 30))
def test_vip_has_the_least_variance(p, low, high, more):
    total = min(low * len(p) + more, high * len(p))
    found = allocated(Vip(low=low, high=high, prior=0.0), p, total)
    variance = lambda i, n: p[i] * (1 - p[i]) / (n - 1)  # noqa: E731
    assert sum(found) == total and min(found) >= low and max(found) <= high
    want = -best(lambda i, n: -variance(i, n), len(p), low, high, total)
    assert sum(map(variance, range(len(p)), found)) == pytest.approx(want, abs=1e-9)


@many
@given(st.lists(st.sampled_from([0.05, 0.1, 0.3, 0.5, 0.8]), min_size=2, max_size=6), st.integers(2, 12))
def test_vip_is_its_closed_form_in_whole_numbers(p, samples):
    """n = clip(1 + sqrt(a / lambda), low, high), with lambda by bisection; each within one of it."""
    low, high, total = 2, 24, samples * len(p)
    a = np.array(p) * (1 - np.array(p))
    real = lambda lam: np.clip(1 + np.sqrt(a / lam), low, high)  # noqa: E731
    small, large = 1e-12, 1e3
    for _ in range(200):
        middle = math.sqrt(small * large)
        small, large = (middle, large) if real(middle).sum() > total else (small, middle)
    assert np.abs(np.array(allocated(Vip(low=low, high=high, prior=0.0), p, total)) - real(large)).max() < 1 + 1e-6


@many
@given(RATES, st.integers(2, 3), st.integers(4, 9), st.integers(1, 25))
def test_knapsack_has_the_most_value(p, low, high, more):
    total = min(low * len(p) + more, high * len(p))
    found = allocated(Knapsack(low=low, high=high), p, total)
    value = lambda i, n: (1 - p[i] ** n - (1 - p[i]) ** n) * p[i] * (1 - p[i]) ** 2  # noqa: E731
    assert sum(found) == total and min(found) >= low and max(found) <= high
    assert sum(map(value, range(len(p)), found)) == pytest.approx(best(value, len(p), low, high, total), abs=1e-12)


def test_what_knapsack_has_left_goes_to_what_was_never_solved():
    assert allocated(Knapsack(low=2, high=8), [1.0, 0.0, 1.0, 0.0], 16) == [2, 6, 2, 6]


def test_a_prompt_that_was_never_visited_counts_as_half_right():
    state = unvisited(3)
    for budget in (Vip(), Knapsack()):
        assert budget.allocate(budget.init(3), np.arange(3), None, 12)[1].tolist() == [4, 4, 4]
    assert estimated(state, np.arange(3), 0.0).tolist() == [0.5] * 3


def test_too_little_for_the_least_is_shared_equally_and_too_much_is_left():
    assert allocated(Vip(low=4, high=8), [0.5, 0.5], 5) == [3, 2]
    assert allocated(Vip(low=2, high=3), [0.5, 0.1], 20) == [3, 3]


@given(st.integers(1, 9), st.integers(0, 40))
def test_uniform(n, left):
    _, samples = UniformBudget().allocate((), np.arange(n), None, left)
    assert samples.sum() == left and np.ptp(samples) <= 1 and (np.diff(samples) <= 0).all()
    assert UniformBudget().most(n, left) == max(samples)


@many
@given(ragged(binary=True), st.sampled_from([0.0, 0.5, 1.0]))
def test_pass_rates_are_counts_of_which_earlier_ones_fade(groups, memory):
    """Two visits of the same rows, the first of all groups twice as one row."""
    row = np.arange(len(groups.failure)) // 2
    groups = groups.replace(
        rollouts=groups.rollouts.replace(prompts=groups.rollouts.prompts.replace(row=row.astype(np.int32)))
    )
    right, samples = np.zeros(8), np.zeros(8)
    state = unvisited(8)
    for _ in range(2):
        before = state.right.copy()
        after = observed(state, groups, "success", memory)
        np.testing.assert_array_equal(state.right, before)
        state = after
        for p, rows in enumerate(by_prompt(groups)):
            if graded(rows):
                right[row[p]] = memory * right[row[p]] + sum(x.right for x in rows)
                samples[row[p]] = memory * samples[row[p]] + len(rows)
    np.testing.assert_allclose(state.right, right)
    np.testing.assert_allclose(state.samples, samples)
    want = [(r + 0.5) / (n + 1) for r, n in zip(right, samples, strict=True)]
    np.testing.assert_allclose(estimated(state, np.arange(8), 1.0), want)


@pytest.mark.parametrize("budget", [Vip(by="style"), Knapsack(by="style")])
@pytest.mark.parametrize("outside", [-0.5, 1.5])
def test_a_measure_that_is_no_rate_is_refused(budget, outside):
    """p (1 - p) is less than 0 on both sides. A group that could not be graded has none, and fillers do not count."""
    state = budget.init(2)
    groups = groups_of([2, 2], [0, 1, np.nan, np.nan], style=[0, 1, outside, outside], rows=6)
    components = groups.components.copy()
    components[4:] = outside
    state = budget.observe(state, groups.replace(components=components))
    assert estimated(state, np.arange(2), 0.0).tolist() == [0.5, 0.5]
    with pytest.raises(
        UserError, match=rf"got pass rates by style, which gave a response {outside}, want .* from 0 to 1"
    ):
        budget.observe(state, groups_of([2, 2], [0, 1, 0, 1], style=[0, 1, 1, outside]))


def in_rounds(budget, right, left):
    """Play a budget: right[p] are the results of prompt p's samples, in order. Returns samples per prompt, by round."""
    state, seen, size, rounds = budget.init(9), None, np.zeros(len(right), int), []
    while True:
        state, samples = budget.allocate(state, np.arange(len(right)), seen, left)
        assert samples.sum() <= left and (samples >= 0).all()
        if not samples.any():
            return rounds
        rounds.append(samples.tolist())
        size, left = size + samples, left - samples.sum()
        seen = groups_of(size, [x for p, n in enumerate(size) for x in right[p][:n]])


def test_rounds_end_for_a_prompt_with_a_right_answer():
    """AR3PO: the first is solved at once, the second in the third round, the third never, the fourth cannot be graded."""
    right = [[1] * 9, [0, 0, 0, 0, 1, 0] + [0] * 9, [0] * 20, [math.nan] * 20]
    budget = Rounds(per_round=2, rounds=4)
    assert in_rounds(budget, right, 99) == [[2, 2, 2, 2], [0, 2, 2, 0], [0, 2, 2, 0], [0, 0, 2, 0]]
    assert budget.most(4, 99) == 8
    # Never more than there is.
    assert in_rounds(budget, right, 11) == [[2, 2, 2, 2], [0, 2, 1, 0]]


def test_reinforce_ada_goes_on_until_both_kinds_are_there():
    right = [[1, 1, 1, 0, 0, 0, 1, 1], [0] * 8, [1, 0, 1, 0] + [1] * 9]
    balanced = ReinforceAda(per_round=2, rounds=4, keep=4)
    assert in_rounds(balanced, right, 99) == [[2, 2, 2], [2, 2, 2], [2, 2, 0], [0, 2, 0]]
    assert in_rounds(ReinforceAda(per_round=2, rounds=4, until="positive"), right, 99) == [
        [2] * 3,
        [0, 2, 0],
        [0, 2, 0],
        [0, 2, 0],
    ]


def test_screening_gives_the_rest_to_what_teaches():
    right = [[0, 1] + [0] * 20, [0, 0], [1, 0] + [1] * 20, [1, 1], [math.nan] * 2]
    assert in_rounds(Screening(initial=2, high=64), right, 20) == [[2] * 5, [5, 0, 5, 0, 0]]
    assert in_rounds(Screening(initial=2, high=5), right, 20) == [[2] * 5, [3, 0, 3, 0, 0]]
    assert in_rounds(Screening(initial=2), [[1, 1], [0, 0]], 20) == [[2, 2]]


def test_too_little_is_shared():
    assert in_rounds(Rounds(per_round=4, rounds=1), [[0] * 9] * 3, 7) == [[3, 2, 2]]
    assert in_rounds(Rounds(per_round=4, rounds=1), [[0] * 9] * 3, 2) == [[1, 1, 0]]

"""Draws: weights of stored groups, and what is drawn by them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from jaxrl_llm.config.loading import validate
from jaxrl_llm.errors import UserError
from jaxrl_llm.experience.config import OwnDraw
from jaxrl_llm.experience.draws import BySuccessesDraw, Candidates, PrioritizedDraw, RecencyDraw, UniformDraw
from jaxrl_llm.experience.replay import draw

MANY = 20_000


def known(age) -> Candidates:
    n, zeros = len(age), np.zeros(len(age))
    return Candidates(np.array(age), np.ones(n, int), zeros, zeros, zeros, zeros, np.ones(n, int), np.arange(n))


def by_ages(groups: Candidates, power: float = 1.0) -> np.ndarray:
    return groups.age.astype(float) ** power


@pytest.mark.parametrize(
    "rule, want",
    [
        (UniformDraw(), [1, 1, 1, 1]),
        # Ages 9, 5, 2, 1 at a half-life of 2: from the youngest on 8, 4, 1, 0 updates.
        (RecencyDraw(half_life=2), [1 / 16, 1 / 4, 2**-0.5, 1]),
        (OwnDraw("test_draws:by_ages", options={"power": 2.0}), [81, 25, 4, 1]),
    ],
)
def test_weights_by_hand_and_draws_in_their_proportions(rule, want):
    groups = known([9, 5, 2, 1])
    weight = rule(groups)
    np.testing.assert_allclose(weight, want, rtol=1e-12)
    rng = np.random.default_rng(0)
    counts = np.bincount([draw(groups, weight, rng, 1)[0] for _ in range(MANY)], minlength=4)
    assert chisquare(counts, MANY * np.array(want) / sum(want)).pvalue > 1e-3


def drawn_in_proportion(rule, groups, want):
    weight, rng = rule(groups), np.random.default_rng(0)
    np.testing.assert_allclose(weight / weight.sum(), np.array(want) / sum(want), rtol=1e-12)
    counts = np.bincount([draw(groups, weight, rng, 1)[0] for _ in range(MANY)], minlength=len(want))
    some = np.array(want) > 0
    assert counts[~some].sum() == 0
    assert chisquare(counts[some], MANY * np.array(want)[some] / sum(want)).pvalue > 1e-3


@pytest.mark.parametrize("alpha, want", [(1.0, [0, 0.25, 0.5]), (0.5, [0, 0.5, 0.5**0.5]), (0.0, [1, 1, 1])])
def test_prioritized_by_the_mean_size_of_the_advantages(alpha, want):
    groups = known([1, 1, 1])._replace(signal=np.array([0, 0.25, 0.5]))
    drawn_in_proportion(PrioritizedDraw(alpha=alpha), groups, want)


def test_by_successes_draws_a_bucket_then_one_of_its_groups():
    """Of 4 responses 0, 1, 2, 2, 2, 3, 4 are right. Buckets 1, 2, 3 have exp(-1/2), 1, exp(-1/2); 2 is shared by three."""
    k, side = np.array([0, 1, 2, 2, 2, 3, 4]), np.exp(-0.5)
    groups = known(k)._replace(success=(k / 4).astype(np.float32), size=np.full(7, 4))
    drawn_in_proportion(BySuccessesDraw(), groups, [0, side, 1 / 3, 1 / 3, 1 / 3, side, 0])


def test_by_successes_with_none_that_may_come_back_draws_nothing():
    groups = known([1, 1])._replace(success=np.array([0.0, 1.0]), size=np.array([4, 4]))
    assert BySuccessesDraw()(groups).tolist() == [0, 0]
    # Far from half, too: 1 of 1,000 right, at a sigma of one response.
    groups = groups._replace(success=np.array([0.001, 1.0]), size=np.array([1000, 1000]))
    assert BySuccessesDraw()(groups).tolist() == [1, 0]


def test_several_are_drawn_one_by_one_without_the_ones_before():
    """Two of weights 3, 2, 1: first i then j with chance w_i / 6 * w_j / (6 - w_i)."""
    groups, rng, weight = known([1, 1, 1]), np.random.default_rng(0), np.array([3.0, 2.0, 1.0])
    pairs = [tuple(draw(groups, weight, rng, 2).tolist()) for _ in range(MANY)]
    want = {(i, j): weight[i] / 6 * weight[j] / (6 - weight[i]) for i in range(3) for j in range(3) if i != j}
    assert set(pairs) == set(want)
    found = {pair: pairs.count(pair) for pair in want}
    # The order within a draw is not part of the contract: which groups are drawn is.
    for i, j in ((0, 1), (0, 2), (1, 2)):
        share = want[i, j] + want[j, i]
        assert abs(found[i, j] + found[j, i] - MANY * share) < 4 * np.sqrt(MANY * share * (1 - share))


def test_very_old_groups_do_not_lose_all_weights():
    """The youngest group is 40,000 updates old, at a half-life of one: 2^-40000 is 0 in floats."""
    assert RecencyDraw(half_life=1)(known([50_000, 40_001, 40_000])).tolist() == [0, 0.5, 1]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.0, 1.0, 1e-300, 5.0]), max_size=9), st.integers(0, 12), st.integers(0, 99))
def test_a_weight_of_0_is_never_drawn_and_no_group_twice(weight, n, seed):
    found = draw(known([1] * len(weight)), np.array(weight), np.random.default_rng(seed), n).tolist()
    some = [i for i, w in enumerate(weight) if w]
    assert len(set(found)) == len(found) == min(n, len(some)) and set(found) <= set(some)


@pytest.mark.parametrize(
    "weight", [[1, 2], [1, 2, -1], [1, 2, np.nan], [1, 2, np.inf], [[1], [2], [3]], ["a", "b", "c"]]
)
def test_weights_of_ones_own_are_checked(weight):
    with pytest.raises(
        UserError, match=r"experience\.replay\.draw: got .*, want a finite weight, 0 or more, for each of 3"
    ):
        draw(known([1, 1, 1]), np.array(weight), np.random.default_rng(0), 2)


def test_in_a_config():
    of = lambda value: validate({"experience": {"replay": {"capacity": 4, "draw": value}}}, "c").experience.replay.draw  # noqa: E731
    assert of("recency") == RecencyDraw() and of({"kind": "recency", "half_life": 2}) == RecencyDraw(half_life=2.0)
    assert of("test_draws:by_ages") == OwnDraw("test_draws:by_ages")


def test_weights_of_any_size_are_drawn_from():
    """The sum of the first overflows; the share of the smallest of the others rounds to 0, so that it is never drawn."""
    rng, groups = np.random.default_rng(0), known([1, 1, 1])
    assert sorted(draw(groups, np.full(3, 1.7e308), rng, 3)) == [0, 1, 2]
    assert sorted(draw(groups, np.array([1.0, 1.0, 5e-324]), rng, 3)) == [0, 1]
    assert sorted(draw(groups, np.full(3, 5e-324), rng, 3)) == [0, 1, 2]

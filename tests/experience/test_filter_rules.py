"""Rules for groups and rows against a second implementation in plain Python, on groups of any size, or against all choices."""

import itertools
import math
import typing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_groups import Row, by_prompt, graded, groups_of, measured, ragged

from jaxrl_llm.errors import UserError
from jaxrl_llm.experience import config, filters
from jaxrl_llm.experience.group_filters import DifficultyBand, KeepAll, Signal
from jaxrl_llm.experience.row_filters import (
    BestBy,
    FirstSamples,
    MaxVariance,
    NoDuplicates,
    NoRepetition,
    NotCutOff,
    NotStale,
    RewardBetween,
    repeated,
)
from jaxrl_llm.metrics.estimates import correct
from jaxrl_llm.types import Finish, Groups, select_groups

many = settings(max_examples=80, deadline=None, derandomize=True, database=None)
BY = st.sampled_from(["success", "reward", "right", "style"])


def kept(rule, groups: Groups) -> set[int]:
    """Rows that a rule keeps; only rows of prompts count."""
    keep = rule(groups)
    assert keep.dtype == bool and keep.shape == groups.keep.shape
    return set(np.flatnonzero(keep & (groups.rollouts.prompt >= 0)).tolist())


def kept_rows(groups: Groups) -> list[list[Row]]:
    """Rows that no filter has dropped; they are graded."""
    return [[row for row in rows if groups.keep[row.index]] for rows in by_prompt(groups)]


def whole(groups: Groups, teaches) -> set[int]:
    return {row.index for rows in by_prompt(groups) if graded(rows) and teaches(rows) for row in rows}


@many
@given(ragged(), BY)
def test_signal(groups, by):
    want = whole(groups, lambda rows: len({measured(row, by) for row in rows}) > 1)
    assert kept(Signal(by=by), groups) == want


@many
@given(ragged(), BY, st.sampled_from([(0.0, 1.0), (0.2, 0.8), (0.5, 0.5), (0.0, 0.0)]))
def test_difficulty_band(groups, by, band):
    low, high = band
    mean = lambda rows: math.fsum(measured(row, by) for row in rows) / len(rows)  # noqa: E731
    # The numbers are multiples of 1/4 and 0.1: no mean is nearer to a bound than this but by being on it.
    want = whole(groups, lambda rows: low - 1e-9 <= mean(rows) <= high + 1e-9)
    assert kept(DifficultyBand(by=by, low=low - 1e-9, high=high + 1e-9), groups) == want


def test_a_band_has_both_its_ends():
    groups = groups_of([4, 4, 4], [0, 0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1])
    assert kept(DifficultyBand(low=0.25, high=0.75), groups) == set(range(8))
    assert kept(DifficultyBand(low=0.26, high=1.0), groups) == set(range(4, 12))


@many
@given(ragged(), BY, st.integers(2, 8))
def test_max_variance_is_the_best_of_all_choices(groups, by, keep):
    """PODS: by brute force over all subsets of that size."""
    found = kept(MaxVariance(by=by, keep=keep), groups)
    for rows in kept_rows(groups):
        mine = [measured(row, by) for row in rows if row.index in found]
        assert len(mine) == min(keep, len(rows))
        if not mine:
            continue
        best = max(np.var(chosen) for chosen in itertools.combinations([measured(row, by) for row in rows], len(mine)))
        assert np.var(mine) == pytest.approx(best, abs=1e-12)


def test_max_variance_of_right_and_wrong_is_half_and_half():
    """The first samples of equal numbers, from the lowest and the highest; the mutant that keeps the best alone has no variance."""
    groups = groups_of([8], [0, 1, 0, 0, 1, 1, 0, 1])
    assert kept(MaxVariance(keep=4, by="right"), groups) == {0, 1, 2, 4}
    best_alone = np.argsort(-groups.reward, kind="stable")[:4]
    assert np.var(groups.reward[best_alone]) == 0


@many
@given(ragged(), st.integers(2, 8), st.randoms())
def test_choices_within_a_group_do_not_depend_on_the_order_of_rows(groups, keep, random):
    size = groups.rollouts.size
    order, start = [], 0
    for n in size:
        rows = list(range(start, start + n))
        random.shuffle(rows)
        order += rows
        start += n
    order += list(range(start, len(groups.keep)))
    r = groups.rollouts
    take = {name: getattr(r, name)[order] for name in ("sample", "tokens", "length", "sampled", "version", "finish")}
    mixed = groups.replace(
        rollouts=r.replace(**take),
        reward=groups.reward[order],
        components=groups.components[order],
        keep=groups.keep[order],
    )
    for rule in (
        MaxVariance(keep=keep),
        FirstSamples(keep=keep),
        BestBy(keep=keep),
        NoDuplicates(),
        BestBy(keep=keep, score="efficiency"),
    ):
        np.testing.assert_array_equal(rule(mixed), rule(groups)[order])


@many
@given(ragged(), st.integers(1, 8))
def test_first_samples_and_gfpo(groups, keep):
    of = {
        FirstSamples(keep=keep): lambda row: row.sample,
        BestBy(keep=keep): lambda row: (row.length, row.sample),
        BestBy(keep=keep, score="efficiency"): lambda row: (-row.reward / row.length, row.sample),
    }
    for rule, key in of.items():
        want = {row.index for rows in kept_rows(groups) for row in sorted(rows, key=key)[:keep]}
        assert kept(rule, groups) == want


@many
@given(ragged(), BY, st.sampled_from([None, 0.0, 0.25, 1.0]), st.sampled_from([None, 0.25, 1.0]))
def test_rewards_between(groups, by, low, high):
    rows = [row for rows in by_prompt(groups) for row in rows]
    want = {
        row.index
        for row in rows
        if (x := measured(row, by)) == x and (low is None or x >= low) and (high is None or x <= high)
    }
    assert kept(RewardBetween(by=by, at_least=low, at_most=high), groups) == want


@many
@given(ragged())
def test_rules_of_single_rows(groups):
    rows = [row for rows in by_prompt(groups) for row in rows]
    assert kept(NotCutOff(), groups) == {row.index for row in rows if row.finish != Finish.LENGTH}
    first = {}
    for p, mine in enumerate(kept_rows(groups)):
        for row in sorted(mine, key=lambda row: row.sample):
            first.setdefault((p, row.tokens), row.index)
    assert kept(NoDuplicates(), groups) == set(first.values())
    # Versions are as far as 8 apart; the newest is that of any token.
    newest = int(groups.rollouts.version.max())
    # A refill, which sees only some of the groups at a time, may have any rule but this one.
    assert kept(NotStale(max_age=2), groups) == {row.index for row in rows if newest - row.oldest <= 2}


def share(tokens: tuple, n: int) -> float:
    grams, seen, again = [tokens[i : i + n] for i in range(len(tokens) - n + 1)], set(), 0
    for gram in grams:
        again += gram in seen
        seen.add(gram)
    return again / len(grams) if grams else 0.0


@many
@given(ragged(), st.integers(1, 4), st.sampled_from([0.0, 0.3, 0.5]))
def test_no_repetition(groups, ngram, most):
    rows = [row for rows in by_prompt(groups) for row in rows]
    want = {row.index for row in rows if share(row.tokens, ngram) <= most + 1e-12}
    assert kept(NoRepetition(ngram=ngram, most=most), groups) == want


def test_repetition_by_hand():
    assert repeated(np.int32([1, 2, 1, 2, 1, 2]), 2) == pytest.approx(3 / 5)
    assert repeated(np.int32([7] * 9), 4) == pytest.approx(5 / 6)
    assert repeated(np.int32([1, 2, 3]), 4) == repeated(np.int32([1, 2, 3, 4]), 4) == 0


# --- mutants: each is a bug of the past, and these tests are against it --------------------------------------------------


def test_all_wrong_groups_with_different_style_teach_only_by_the_sum():
    """arXiv 2609.13866: the filter by the shaped sum keeps them."""
    groups = groups_of([2, 2], [0, 0, 0, 1], [0, 1, 0, 0])
    assert kept(Signal(), groups) == {2, 3} and kept(Signal(by="reward"), groups) == {0, 1, 2, 3}


def test_a_group_of_one_has_no_signal_and_no_warning():
    """slime: the unbiased std of one number is NaN, and `std() > 0` dropped the group by luck."""
    groups = groups_of([1, 2], [1, 0, 1])
    with np.errstate(all="raise"):
        assert kept(Signal(), groups) == {1, 2} and kept(MaxVariance(keep=2), groups) == {0, 1, 2}


def test_what_could_not_be_graded_is_no_zero():
    """TRL #7364: as zeros, the first group would be too hard, and the second would teach."""
    groups = groups_of([2, 2], [np.nan, np.nan, np.nan, 1])
    for rule in (
        Signal(),
        DifficultyBand(low=0, high=1),
        MaxVariance(keep=2),
        FirstSamples(keep=2),
        BestBy(keep=2),
        RewardBetween(),
    ):
        assert not kept(rule, groups) & {0, 1, 2}
    assert KeepAll()(groups).tolist() == groups.keep.tolist()


def test_fillers_are_nobodys():
    alone, filled = groups_of([2, 1], [0, 1, 1]), groups_of([2, 1], [0, 1, 1], rows=6)
    for rule in (
        Signal(),
        DifficultyBand(),
        MaxVariance(keep=2),
        FirstSamples(keep=1),
        BestBy(keep=1),
        RewardBetween(at_most=0.5),
    ):
        assert rule(filled)[:3].tolist() == rule(alone).tolist() and not rule(filled)[3:].any()


def test_a_measure_that_does_not_exist_is_named():
    with pytest.raises(
        UserError, match=r"by: got 'sytle', want success, reward, or the name of a grader: right, style"
    ):
        Signal(by="sytle")(groups_of([2], [0, 1]))


def test_a_rule_chooses_among_what_the_one_before_left():
    """Both ends were cut off: the largest variance of the others. And the copy of a response that was dropped stays."""
    groups = groups_of([5], [0, 0.25, 0.5, 0.75, 1], finish=[1, 0, 0, 0, 1])
    assert filters.chain(NotCutOff(), MaxVariance(keep=2))(groups).keep.tolist() == [False, True, False, True, False]
    assert filters.chain(NotCutOff(), FirstSamples(keep=1))(groups).keep.tolist() == [False, True, False, False, False]
    same = groups_of([2], [0, 1], tokens=[5], finish=[1, 0])
    assert filters.chain(NotCutOff(), NoDuplicates())(same).keep.tolist() == [False, True]


def test_a_reward_that_is_the_bound_is_within_it():
    """In float32, 0.7 is 0.69999999: compared in float64, training would call wrong what the evaluation calls right."""
    for x in (0.1, 0.3, 0.7, 0.8, 0.9):
        groups = groups_of([2], [x, 0.0]).replace(threshold=x)
        assert groups.measure("success").tolist() == [1, 0] == correct(groups.components[:, 0], x).tolist()
        assert kept(RewardBetween(by="right", at_least=x, at_most=x), groups) == {0}
        assert kept(DifficultyBand(by="right", low=x, high=x), groups_of([3], [x] * 3)) == {0, 1, 2}


ALONE = [rule() for rule in typing.get_args(config.Rule) if rule not in (NotStale, config.OwnFilter)]


@many
@given(ragged())
def test_rules_of_a_refill_judge_each_group_on_its_own(groups):
    """Groups finish in an order that no rule may see."""
    size = groups.rollouts.size
    start, some = np.cumsum(size) - size, np.flatnonzero(size)
    for rule in ALONE:
        each = [{start[p] + b for b in kept(rule, select_groups(groups, np.array([p])))} for p in some]
        assert set().union(*each) == kept(rule, groups), rule

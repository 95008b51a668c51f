"""avg@k, pass@k and maj@k against enumeration, and their intervals against simulation."""

import itertools
import math

import numpy as np
import pytest

from jaxrl_llm.metrics.estimates import Estimate, avg_at_k, correct, maj_at_k, pass_at_k

NAN = math.nan


def test_avg_at_k_by_hand():
    estimate = avg_at_k(np.array([[1, 0, 1, 1], [0, 0, 0, 1]]))
    assert (estimate.value, estimate.n, estimate.left_out) == (0.5, 2, 0)  # (3/4 + 1/4) / 2
    assert 0 <= estimate.low < 0.5 < estimate.high <= 1


def test_rewards_on_another_scale_get_students_interval():
    # Means of the prompts 1, 3, 5: mean 3, standard error 2 / sqrt 3; t with 2 degrees of freedom is 4.302653.
    estimate = avg_at_k(np.array([[0, 2], [3, 3], [4, 6]]))
    assert estimate.value == 3
    np.testing.assert_allclose([3 - estimate.low, estimate.high - 3], 4.302653 * 2 / math.sqrt(3), rtol=1e-6)


# The 97.5 % quantiles of a printed table.
STUDENT = {1: 12.706205, 2: 4.302653, 5: 2.570582, 10: 2.228139, 30: 2.042272, 1000: 1.962339}


@pytest.mark.parametrize("df", STUDENT)
def test_students_quantile_is_that_of_the_tables(df):
    """As many values of 8 as of 12, and one of 10 where their number is odd: the squares add up to 4 for each but that one."""
    n = df + 1
    values = np.full(n, 10.0)
    values[: n // 2], values[n - n // 2 :] = 8.0, 12.0
    error = math.sqrt(4 * (n - n % 2) / df / n)
    estimate = avg_at_k(values[:, None])
    np.testing.assert_allclose([10 - estimate.low, estimate.high - 10], STUDENT[df] * error, rtol=1e-6)


def test_two_prompts_that_are_right_say_little():
    # As if 2 (z / t)^2 = 2 (1.959964 / 12.706205)^2 = 0.0475873 prompts, all right: Wilson's low end is n / (n + z^2).
    estimate = avg_at_k(np.ones((2, 4)))
    assert (estimate.value, estimate.high) == (1.0, 1.0)
    assert estimate.low == pytest.approx(0.0475873 / (0.0475873 + 1.959964**2), rel=1e-5)


@pytest.mark.parametrize("right", range(6))
@pytest.mark.parametrize("k", range(1, 6))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(right, k):
    row = [1] * right + [0] * (5 - right)
    subsets = list(itertools.combinations(row, k))
    want = sum(any(subset) for subset in subsets) / len(subsets)
    assert pass_at_k(np.array([row]), k).value == pytest.approx(want, abs=1e-12)


def test_pass_at_1_is_avg_at_k_and_pass_at_all_is_any():
    grades = np.random.default_rng(0).integers(0, 2, (20, 7))
    assert pass_at_k(grades, 1).value == pytest.approx(avg_at_k(grades).value, abs=1e-12)
    assert pass_at_k(grades, 7).value == grades.any(axis=1).mean()


def test_pass_at_k_of_many_samples_neither_overflows_nor_rounds_to_one():
    grades = np.zeros((1, 5000))
    grades[0, :2] = 1
    # 1 - C(4998, 2500) / C(5000, 2500) = 1 - (2500 * 2499) / (5000 * 4999)
    assert pass_at_k(grades, 2500).value == pytest.approx(1 - 2500 * 2499 / (5000 * 4999), abs=1e-12)


def majority_by_enumeration(votes, grades):
    """Mean, over all orders of the samples, of the grade of the first answer that reaches the highest count."""
    found = []
    for order in itertools.permutations(range(len(votes))):
        said = [votes[i] for i in order if votes[i]]
        if not said:
            found.append(0.0)
            continue
        winner = max(said, key=said.count)  # max keeps the first among equals
        found.append(np.mean([grades[i] for i in order if votes[i] == winner]))
    return np.mean(found)


@pytest.mark.parametrize(
    ("votes", "right", "want"),
    [
        ("aab", "a", 1.0),
        ("aab", "b", 0.0),
        ("ab", "a", 1 / 2),
        ("aabbc", "b", 1 / 2),
        ("abc", "c", 1 / 3),
        ("abcd", "", 0.0),
        ("a__", "a", 1.0),  # "_": no answer, which is no vote
        ("a___bb", "a", 0.0),
        ("___", "a", 0.0),
    ],
)
def test_maj_at_k_breaks_ties_at_random(votes, right, want):
    grades = np.array([float(vote in right) for vote in votes])
    answers = [vote.replace("_", "") for vote in votes]
    assert maj_at_k(grades[None], [answers]).value == pytest.approx(want, abs=1e-12)
    assert majority_by_enumeration(answers, grades) == pytest.approx(want, abs=1e-12)


def test_one_answer_with_different_grades_counts_with_their_mean():
    assert maj_at_k(np.array([[1, 0, 0, 1]]), [["a", "a", "b", "a"]]).value == pytest.approx(2 / 3)


def test_prompts_that_were_not_graded_are_left_out_and_counted():
    grades = np.array([[1, 1], [NAN, NAN], [0, 0], [1, NAN]])
    votes = [["a", "a"], ["", ""], ["b", "c"], ["", ""]]
    for estimate in avg_at_k(grades), pass_at_k(grades, 2), maj_at_k(grades, votes):
        assert (estimate.value, estimate.n, estimate.left_out) == (0.5, 2, 2)
    nothing = avg_at_k(grades[1:2])
    assert (nothing.n, nothing.left_out) == (0, 1) and np.isnan(nothing[:3]).all()


def test_correct_keeps_what_was_not_graded():
    np.testing.assert_array_equal(correct(np.array([[1.0, 0.99], [NAN, NAN]])), [[1, 0], [NAN, NAN]])
    np.testing.assert_array_equal(correct(np.array([[0.5, 0.4]]), at_least=0.5), [[1, 0]])


def test_no_spread_is_no_certainty():
    # Wilson's interval for 30 of 30 is (30 / (30 + z^2), 1); few degrees of freedom make it a little wider.
    every = avg_at_k(np.ones((30, 8)))
    assert every.value == every.high == 1.0
    effective = 30 * (1.95996 / 2.04523) ** 2  # t with 29 degrees of freedom
    assert every.low == pytest.approx(effective / (effective + 1.95996**2), abs=1e-4)
    none = pass_at_k(np.zeros((30, 8)), 4)
    assert none.low == 0.0 and none.high == pytest.approx(1 - every.low)
    # All prompts at one half: as if n * k tosses, no narrower.
    half = avg_at_k(np.tile([1, 0], (30, 4)))
    assert half.low < 0.5 < half.high and half.high - half.low > 1.9 * 1.96 * math.sqrt(0.25 / 240)
    assert avg_at_k(np.ones((1, 8))) == Estimate(1.0, 0.0, 1.0, 1, 0)
    assert avg_at_k(np.full((1, 8), 2.0))[1:3] == (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("prompts", "samples", "a", "b"), [(40, 8, 0.5, 0.5), (40, 8, 2, 2), (30, 4, 0.3, 3), (100, 2, 1, 1)]
)
def test_the_intervals_cover_the_truth_nineteen_times_in_twenty(prompts, samples, a, b):
    """Prompts whose chance of a right sample is Beta(a, b); the truth is its moments. The seed is fixed, so the count is."""
    rng = np.random.default_rng(0)
    k, trials, hits = samples // 2, 1000, np.zeros(3)
    mean = a / (a + b)
    some = 1 - math.prod((b + i) / (a + b + i) for i in range(k))  # 1 - E (1 - p)^k
    for _ in range(trials):
        chance = rng.beta(a, b, (prompts, 1))
        grades = (rng.random((prompts, samples)) < chance).astype(float)
        spread = rng.normal(1, 1, (prompts, 1)) + rng.normal(0, 1, (prompts, samples))
        for i, (estimate, truth) in enumerate(
            [(avg_at_k(grades), mean), (pass_at_k(grades, k), some), (avg_at_k(spread), 1)]
        ):
            hits[i] += estimate.low <= truth <= estimate.high
    # The standard error of a count of 950 in 1000 is 0.7 %; 2.5 % is more than three of them.
    assert (np.abs(hits / trials - 0.95) < 0.025).all(), hits


def test_an_interval_that_took_samples_for_independent_would_fail_that_test():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        grades = (rng.random((40, 8)) < rng.beta(0.5, 0.5, (40, 1))).astype(float)
        mean = grades.mean()
        hits += abs(mean - 0.5) <= 1.96 * math.sqrt(mean * (1 - mean) / grades.size)
    assert hits / 300 < 0.8


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: pass_at_k(np.ones((2, 4)), 5), "got 5, want 1 to 4"),
        (lambda: pass_at_k(np.ones((2, 4)), 0), "got 0"),
        (lambda: pass_at_k(np.full((2, 4), 0.5), 1), "0.5, want 0 and 1"),
        (lambda: avg_at_k(np.ones(4)), r"shape \(4,\)"),
        (lambda: avg_at_k(np.ones((4, 0))), r"shape \(4, 0\)"),
        (lambda: maj_at_k(np.ones((2, 2)), [["a", "b"]]), "2 rows of 2"),
    ],
)
def test_wrong_arguments_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()

"""ExGRPO's choice of prompts: buckets, their draws in proportion, retirement, and the order of the rest."""

import math
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from random_groups import groups_of
from scipy.stats import chisquare

from jaxrl_llm.config.loading import validate
from jaxrl_llm.experience.by_successes import BySuccesses, LastVisits
from jaxrl_llm.experience.curricula import make_order

many = settings(max_examples=100, deadline=None)
MANY = 20_000
RIGHT = [0, 1, 1, 2, 3, 4, 4]
"""Right responses of four: rows 0, 5 and 6 are in no bucket."""


def state_of(right, samples=4, owed=0.0) -> LastVisits:
    return LastVisits(np.array(0), np.array(owed), np.int32(right), np.full(len(right), samples, np.int32))


def plain_density(k: int, n: int, sigma: float) -> float:
    return math.exp(-((k - n / 2) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))


def plain_shares(right: list[int], n: int, sigma: float) -> list[float]:
    """Probability of each row: that of its bucket, shared by the bucket's rows."""
    buckets = Counter(k for k in right if 0 < k < n)
    whole = sum(plain_density(k, n, sigma) for k in buckets)
    return [plain_density(k, n, sigma) / whole / buckets[k] if 0 < k < n else 0.0 for k in right]


def test_rows_in_the_proportions_of_a_plain_implementation():
    """At sigma 1 buckets 1, 2 and 3 of 4 have e^-.5, 1 and e^-.5: .27407 .45186 .27407, the first shared by two rows."""
    want = np.array(plain_shares(RIGHT, 4, 1.0))
    np.testing.assert_allclose(want, [0, 0.13703, 0.13703, 0.45186, 0.27407, 0, 0], atol=1e-5)
    curriculum, rng = BySuccesses(share=1.0).over([{}] * 7, 0), np.random.default_rng(0)
    rows = [int(curriculum.choose(state_of(RIGHT), rng, 1)[1][0]) for _ in range(MANY)]
    counts = np.bincount(rows, minlength=7)
    assert not counts[[0, 5, 6]].any()
    assert chisquare(counts[1:5], MANY * want[1:5]).pvalue > 1e-3


def test_a_narrow_density_far_from_every_bucket_takes_the_closest():
    """exp(-50) and exp(-72) at sigma 1e-3 would both be 0."""
    curriculum = BySuccesses(share=1.0, sigma=1e-3).over([{}] * 2, 0)
    assert curriculum.choose(state_of([1, 15], 16), np.random.default_rng(0), 1)[1].tolist() in ([0], [1])
    assert curriculum.choose(state_of([1, 13], 16), np.random.default_rng(0), 1)[1].tolist() == [1]


def test_by_hand():
    """Half of the prompts from the buckets, as far as they go; the others in shuffled order."""
    curriculum, order, rng = BySuccesses().over([{}] * 4, 3), make_order(4, 3), np.random.default_rng(0)
    state, rows = curriculum.choose(curriculum.init(4), rng, 4)
    assert rows.tolist() == [order(i) for i in range(4)], "nothing was visited yet"
    # Row 0 none of two, row 1 one, row 2 both; row 3 could not be graded.
    state = curriculum.observe(state, groups_of([2, 2, 2, 2], [0, 0, 1, 0, 1, 1, np.nan, np.nan]))
    assert state.right.tolist() == [0, 1, 2, 0] and state.samples.tolist() == [2, 2, 2, 0]
    state, rows = curriculum.choose(state, rng, 4)
    assert rows.tolist() == [1, *(order(i) for i in (4, 5, 6))], "one candidate for two places"
    assert curriculum.describe(state, np.array([1, 2, 3])) == {"candidates": 1, "retired": 1, "expected_success": 0.75}
    # Solved at the next visit: retired. Lost again later: a candidate.
    solved = curriculum.observe(state, groups_of([2], [1, 1], row=[1]))
    assert not solved.candidates.any()
    assert curriculum.observe(solved, groups_of([3], [1, 1, 0], row=[2])).candidates.tolist() == [
        False,
        False,
        True,
        False,
    ]


@many
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=8),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.lists(st.integers(1, 7), min_size=1, max_size=5),
)
def test_the_share_holds_however_the_draws_are_split(right, share, parts):
    """Rows from buckets: as many as are due and are there; none twice in a batch, none retired. The rest is the order, no place
    left out."""
    curriculum, order, rng = (
        BySuccesses(share=share).over([{}] * len(right), 1),
        make_order(len(right), 1),
        np.random.default_rng(0),
    )
    state, position, due = state_of(right), 0, 0.0
    there = {i for i, k in enumerate(right) if 0 < k < 4}
    for n in parts:
        due += share * n
        wanted = min(math.floor(due + 1e-9), n)
        due -= wanted
        state, rows = curriculum.choose(state, rng, n)
        num = min(wanted, len(there))
        revisited, rest = rows[:num].tolist(), rows[num:].tolist()
        assert set(revisited) <= there and len(set(revisited)) == num
        assert rest == [order(position + i) for i in range(n - num)]
        position += n - num
        assert state.position == position and 0 <= state.owed < 1


def test_in_a_config():
    found = validate({"experience": {"curriculum": {"kind": "by_successes", "share": 0.25, "sigma": 2}}}, "c")
    assert found.experience.curriculum == BySuccesses(share=0.25, sigma=2)

"""Credit of groups of any size: against the oracle, and what must not change it."""

import tracemalloc

import numpy as np
import pytest
from estimator_inputs import some_rows, to_groups
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ragged import SLOTS, WEIGHTS, credit_by_oracle, ragged_groups
from variants import ORACLES, VARIANTS

from jaxrl_llm.errors import AdvantageError
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.credit import estimator_credit, make_advantage
from jaxrl_llm.objective.group_estimators import BestWorst, Grpo, MeanOnly, Rloo
from jaxrl_llm.objective.reward_kl import RewardKl
from jaxrl_llm.objective.token_estimators import Gae, GrpoSteps, ReinforcePlusPlus
from jaxrl_llm.objective.tree_estimators import TreeEstimator
from jaxrl_llm.types import Scores

pytestmark = pytest.mark.filterwarnings("error")

OVER = "sampled", "kept"
for_each = pytest.mark.parametrize("cfg", VARIANTS, ids=repr)
few = settings(max_examples=20, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
batches = st.builds(
    lambda seed, size, fillers: ragged_groups(np.random.default_rng(seed), size, fillers),
    st.integers(0, 999),
    st.lists(st.integers(0, 6), min_size=1, max_size=5),
    st.integers(0, 3),
)
NO_KL = RewardKl()
KL = RewardKl(weight=0.1), RewardKl(weight=0.1, to="advantage"), NO_KL


def credit_of(cfg, groups, scores, baseline_over="sampled", reward_kl=NO_KL):
    """By the function of a run."""
    objective = ObjectiveConfig(advantage=cfg, reward_kl=reward_kl, baseline_over=baseline_over)
    return make_advantage(objective, WEIGHTS)(groups, scores)


def some_scores(scores: Scores, rows) -> Scores:
    given = {name: getattr(scores, name) for name in ("values", "reference_logprobs")}
    return Scores(**{name: x if x is None else x[rows] for name, x in given.items()})


def same(got, want, rows=slice(None)) -> None:
    """To the bit, the credit of these rows."""
    for name in ("advantage", "returns", "keep"):
        a, b = getattr(got, name), getattr(want, name)
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_array_equal(a[rows], b, err_msg=name, strict=True)


def with_reference(scores: Scores, seed: int) -> Scores:
    rng = np.random.default_rng(seed)
    return scores.replace(reference_logprobs=rng.normal(0, 1, scores.values.shape).astype(np.float32))


@for_each
@few
@given(batch=batches, over=st.sampled_from(OVER))
def test_the_credit_is_the_oracles(cfg, batch, over):
    """In float32, whose rounding error is 6e-8. The oracle's means of numbers near 1 have errors of 1e-16, which a whitening of
    equal numbers divides by 1e-4, the root of an eps of 1e-8, or by an eps of 1e-8 itself: 1e-8."""
    got = credit_of(cfg, *batch, over)
    for a, b in zip((got.advantage, got.returns), credit_by_oracle(ORACLES[cfg], *batch, over), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == np.float32
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@for_each
@few
@given(batch=batches, over=st.sampled_from(OVER), kl=st.sampled_from(KL), seed=st.integers(0, 99))
def test_filler_rows_and_groups_that_were_not_graded_change_nothing(cfg, batch, over, kl, seed):
    """To the bit; and they get 0."""
    groups, scores = batch[0], with_reference(batch[1], seed)
    prompt = groups.rollouts.prompt
    graded = (prompt >= 0) & (groups.failure[prompt] == 0)
    got = credit_of(cfg, groups, scores, over, kl)
    same(got, credit_of(cfg, some_rows(groups, graded), some_scores(scores, graded), over, kl), graded)
    assert not got.advantage[~graded].any()


@for_each
@few
@given(batch=batches, kl=st.sampled_from(KL), seed=st.integers(0, 99))
def test_a_baseline_over_kept_rows_knows_no_others(cfg, batch, kl, seed):
    groups, scores = batch[0], with_reference(batch[1], seed)
    got = credit_of(cfg, groups, scores, "kept", kl)
    alone = some_rows(groups, groups.keep), some_scores(scores, groups.keep)
    same(got, credit_of(cfg, *alone, "kept", kl), groups.keep)
    same(got, credit_of(cfg, *alone, "sampled", kl), groups.keep)
    assert not got.advantage[~groups.keep].any()


@for_each
@few
@given(batch=batches, over=st.sampled_from(OVER), seed=st.integers(0, 99))
def test_rows_in_another_order_have_their_own_credit(cfg, batch, over, seed):
    """Within a group, and of whole groups; to the bit."""
    if isinstance(cfg, BestWorst):
        pytest.skip("the first of equal ones is the best: test_estimator_properties.py")
    groups, scores = batch
    rng, prompt = np.random.default_rng(seed), groups.rollouts.prompt
    new = rng.permutation(len(groups.failure))
    number = np.where(prompt >= 0, new[prompt], len(new))
    order = np.lexsort((rng.random(len(prompt)), number))
    moved = some_rows(groups, order)
    moved = moved.replace(rollouts=moved.rollouts.replace(prompt=np.where(prompt >= 0, number, -1)[order]))
    want = credit_of(cfg, groups, scores, over)
    want = type(want)(*(x if x is None else x[order] for x in (want.advantage, want.returns, want.keep)))
    same(credit_of(cfg, moved, some_scores(scores, order), over), want)


# --- by hand ------------------------------------------------------------------------------------------------------------------

# Groups of three rows and of one, a prompt without rows, a group of two, and a filler row.
HAND = [[3, 0, 0], [5], [], [1, 2]]


def first(credit) -> list[float]:
    return credit.advantage[:, 0].tolist()


def test_ragged_groups_by_hand():
    groups = to_groups(HAND, fillers=1)
    assert groups.rollouts.size.tolist() == [3, 1, 0, 2]
    assert first(MeanOnly()(groups)) == [2, -1, -1, 0, -0.5, 0.5, 0]
    assert first(Rloo()(groups)) == [3, -1.5, -1.5, 0, -1, 1, 0]
    # Two numbers 1 apart have a sample std of sqrt(1/2), three of 3, 0, 0 one of sqrt(3).
    want = [2 / 3**0.5, -1 / 3**0.5, -1 / 3**0.5, 0, -(2**-0.5), 2**-0.5, 0]
    np.testing.assert_allclose(first(Grpo(eps=0)(groups)), want, rtol=1e-6)


def test_a_row_alone_in_its_group_counts_in_a_whitening_as_one_at_its_baseline():
    """1 and -1 of the group of two, 0 of the other: mean 0, std 1 by n - 1 = 2. Without it the std were sqrt(2)."""
    found = first(Rloo(whiten=True)(to_groups([[1, 0], [5]])))
    np.testing.assert_allclose(found, [1 / 1.0001, -1 / 1.0001, 0], rtol=1e-6)


def test_baseline_over_sampled_or_kept_rows_by_hand():
    """PODS: of four rewards the highest and a lowest are kept. Less the mean of all, 1: 3, -1. Less that of the two, 2: 2, -2."""
    groups = to_groups([[4, 0, 0, 0]]).replace(keep=np.array([True, False, False, True]))
    assert first(credit_of(MeanOnly(), groups, Scores(), "sampled")) == [3, -1, -1, -1]
    assert first(credit_of(MeanOnly(), groups, Scores(), "kept")) == [2, 0, 0, -2]
    assert first(MeanOnly()(groups)) == first(estimator_credit(MeanOnly(), groups)) == [3, -1, -1, -1]
    one = groups.replace(keep=np.array([True, False, False, False]))
    assert first(credit_of(Rloo(), one, Scores(), "kept")) == [0, 0, 0, 0]


def test_a_kept_row_without_a_reward_is_reported():
    """Never taken for one that could not be graded; a row that was dropped is."""
    groups = to_groups([[1, np.nan, 0]])
    with pytest.raises(AdvantageError, match="got rewards of nan"):
        Rloo()(groups)
    dropped = groups.replace(keep=np.array([True, False, True]))
    for over in OVER:
        assert first(credit_of(Rloo(), dropped, Scores(), over)) == [1, 0, -1]


@pytest.mark.parametrize("fillers", [0, 3])
@pytest.mark.parametrize("over", OVER)
@for_each
def test_nothing_kept_is_worth_nothing(cfg, over, fillers):
    groups = to_groups([[1, 0], [2]], np.ones((3 + fillers, 2)), fillers)
    groups = groups.replace(keep=np.zeros(3 + fillers, bool))
    found = credit_of(cfg, groups, Scores(values=np.ones((3 + fillers, SLOTS), np.float32)), over)
    assert found.advantage.shape == (3 + fillers, SLOTS) and not found.advantage.any()
    assert (found.returns is not None) == isinstance(cfg, Gae)


@pytest.mark.parametrize(
    "cfg",
    [cfg for cfg in VARIANTS if not isinstance(cfg, Gae | GrpoSteps | ReinforcePlusPlus | TreeEstimator)],
    ids=repr,
)
@pytest.mark.parametrize("kept", [1.0, 0.5])
def test_one_advantage_per_sequence_makes_no_float64_per_token(cfg, kept):
    """At the peak there are the result, 4 bytes per token, and at most two masks of 1 byte."""
    rng, rows, slots = np.random.default_rng(0), 256, 2048
    groups = to_groups(rng.random((rows // 8, 8)))
    rollouts = groups.rollouts.replace(sampled=np.ones((rows, slots), bool))
    groups = groups.replace(rollouts=rollouts, keep=np.repeat(rng.random(rows // 8) < kept, 8))
    tracemalloc.start()
    try:
        found = cfg(groups)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.advantage.shape == (rows, slots)
    assert peak < 6.5 * rows * slots

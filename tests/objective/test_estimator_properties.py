"""Properties of every advantage estimator, for any rewards, without NumPy warnings."""

import itertools
from typing import NamedTuple, get_args

import numpy as np
import pytest
from estimator_inputs import single_tokens
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from jaxrl_llm.errors import AdvantageError
from jaxrl_llm.objective.advantages import Published, bound, estimate
from jaxrl_llm.objective.estimator import EstimatorInputs, sequence_rewards
from jaxrl_llm.objective.group_estimators import (
    BestWorst,
    Gdpo,
    Gpg,
    Grpo,
    LeaveOneOut,
    MaxRl,
    MeanOnly,
    Opo,
    PassAtK,
    Raw,
    Rloo,
)
from jaxrl_llm.objective.token_estimators import Gae, ReinforcePlusPlus

pytestmark = pytest.mark.filterwarnings("error")

MAX = float(np.finfo(np.float32).max)
OVER = "group", "batch"
VARIANTS = [
    *(
        Grpo(std=std, eps=eps, mean_over=mean_over, std_over=std_over)
        for std, eps, mean_over, std_over in itertools.product(("sample", "population"), (1e-4, 0.0), OVER, OVER)
    ),
    MeanOnly(),
    Rloo(),
    Rloo(whiten=True),
    LeaveOneOut(),
    LeaveOneOut(eps=0),
    MaxRl(),
    MaxRl(eps=1e-6),
    PassAtK(),
    PassAtK(eps=0),
    PassAtK(scale=False),
    Opo(),
    Gpg(),
    Gdpo(),
    Gdpo(eps=0),
    Raw(),
    BestWorst(),
    *(
        ReinforcePlusPlus(baseline=baseline, variance=variance, eps_beside=beside)
        for baseline, variance, beside in itertools.product(
            (False, True), ("sample", "population"), ("variance", "std")
        )
    ),
    ReinforcePlusPlus(gamma=0.9),
    Gae(),
    Gae(gamma=0.9, whiten=False),
]
assert {type(cfg) for cfg in VARIANTS} == set(get_args(Published))
PER_BATCH = [cfg for cfg in VARIANTS if isinstance(cfg, ReinforcePlusPlus) and not cfg.baseline and cfg.gamma == 1] + [
    cfg for cfg in VARIANTS if isinstance(cfg, Grpo) and cfg.mean_over == "batch"
]
PER_GROUP = [
    cfg
    for cfg in VARIANTS
    if cfg not in PER_BATCH and not isinstance(cfg, Raw | Gae) and cfg != ReinforcePlusPlus(gamma=0.9)
]
# How often a reward is 0, and the mean reward, are parts of the formula.
SHIFTING = [cfg for cfg in PER_GROUP + PER_BATCH if not isinstance(cfg, Gpg | MaxRl)]
for_each = lambda variants: pytest.mark.parametrize("cfg", variants, ids=repr)  # noqa: E731

FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-MAX / 8, max_value=MAX / 8)
REWARDS = {
    "binary": st.sampled_from([0.0, 1.0]),
    "graded": st.sampled_from([-1.0, 0.0, 0.1, 0.2, 0.3, 1 / 3, 1.0]),
    "unit": st.floats(0, 1, width=32),
    "nearly equal": st.integers(0, 3).map(lambda ulps: 0.1 + ulps * 2.0**-27),
    "far from 0": st.integers(0, 3).map(lambda n: 1e6 + n / 16),
    "farther from 0": st.sampled_from([1e30, 1.1e30]),
    "subnormal": st.integers(-3, 3).map(lambda n: n * 2.0**-149),
    "huge": st.sampled_from([MAX / 8, -MAX / 8, 0.0, 1.0]),
    "any": FLOAT32,
}


@st.composite
def estimator_inputs(draw) -> EstimatorInputs:
    """One to three groups of two to six ragged sequences, with tokens that the policy did not sample between the others, rewards
    per token or none, one or two graders, and groups that do not count."""
    groups, samples, slots = draw(st.integers(1, 3)), draw(st.integers(2, 6)), 4
    graders, size = draw(st.integers(1, 2)), groups * samples
    element = REWARDS[draw(st.sampled_from(sorted(REWARDS)))]
    parts = np.float32(draw(st.lists(element, min_size=size * graders, max_size=size * graders)))
    parts = parts.reshape(groups, samples, graders)
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    mask = np.arange(slots) < rng.integers(1, slots + 1, (size, 1))
    mask[:, 1] &= rng.random(size) < 0.5
    weights = np.array([1.0, 0.5])[:graders]
    return EstimatorInputs(
        reward=(parts.astype(np.float64) @ weights).astype(np.float32),
        reward_components=parts,
        component_weights=weights,
        used=rng.random(groups) < 0.8,
        mask=mask,
        token_reward=rng.normal(0, 1, mask.shape) * draw(st.sampled_from([0, 0.01, 1e-8])),
        values=rng.normal(0, 1, mask.shape).astype(np.float32),
    )


def few(examples):
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


class Found(NamedTuple):
    advantage: np.ndarray
    """[P G C]"""
    returns: np.ndarray | None


def found(cfg, inputs: EstimatorInputs) -> Found:
    """By group. Skipped where the formula itself overflows float32: that error has another test."""
    try:
        result = estimate(cfg, inputs)
    except AdvantageError as error:
        if "float32 holds" in str(error) and bound(cfg, inputs) > MAX:
            reject()
        raise
    shape = (*inputs.reward.shape, -1)
    return Found(*(None if x is None else x.reshape(shape) for x in result))


def taken(inputs: EstimatorInputs, groups: np.ndarray, order: np.ndarray) -> EstimatorInputs:
    """The groups, each with its rows in an order."""
    shape = (*inputs.reward.shape, -1)
    per_row = {name: getattr(inputs, name) for name in ("mask", "token_reward", "values")}
    rows = {name: x.reshape(shape)[groups][:, order] for name, x in per_row.items()}
    return inputs._replace(
        reward=inputs.reward[groups][:, order],
        reward_components=inputs.reward_components[groups][:, order],
        used=inputs.used[groups],
        **{name: x.reshape(-1, x.shape[-1]) for name, x in rows.items()},
    )


def same(got: Found, want: Found) -> None:
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_array_equal(a, b)


@for_each(VARIANTS)
@few(20)
@given(inputs=estimator_inputs(), seed=st.integers(0, 99))
def test_rows_and_groups_in_another_order_have_their_own_advantages_to_the_bit(cfg, inputs, seed):
    rng = np.random.default_rng(seed)
    groups, order = rng.permutation(len(inputs.used)), rng.permutation(inputs.reward.shape[1])
    got, want = found(cfg, taken(inputs, groups, order)), found(cfg, inputs)
    if isinstance(cfg, BestWorst):
        # The first of equal ones is the best or the worst: another row, the same reward.
        pairs = lambda found, score: np.sort(score + 1j * found.advantage[..., 0], axis=1)  # noqa: E731
        score = sequence_rewards(inputs)
        np.testing.assert_array_equal(pairs(got, score[groups][:, order]), pairs(want, score)[groups])
        return
    same(got, Found(*(None if x is None else x[groups][:, order] for x in want)))


@for_each(VARIANTS)
@few(20)
@given(inputs=estimator_inputs())
def test_groups_that_do_not_count_get_nothing_and_change_nothing(cfg, inputs):
    """Whatever stands there."""
    counts = inputs.used
    rows = np.repeat(counts, inputs.reward.shape[1])[:, None]
    gone = inputs._replace(
        reward=np.where(counts[:, None], inputs.reward, np.nan),
        reward_components=np.where(counts[:, None, None], inputs.reward_components, np.nan),
        token_reward=np.where(rows, inputs.token_reward, np.nan),
        values=np.where(rows, inputs.values, np.nan),
    )
    got = found(cfg, gone)
    assert not got.advantage[~counts].any()
    if counts.any():
        alone = found(cfg, taken(inputs, np.flatnonzero(counts), np.arange(inputs.reward.shape[1])))
        same(Found(*(None if x is None else x[counts] for x in got)), alone)


@for_each(PER_GROUP + PER_BATCH)
@few(20)
@given(inputs=estimator_inputs(), values=st.lists(FLOAT32, min_size=3, max_size=3))
def test_equal_rewards_give_exactly_nothing(cfg, inputs, values):
    """Each group its own reward where the baseline is the group's."""
    levels = np.float32(values[: len(inputs.used)])[:, None]
    if cfg in PER_BATCH:
        levels = np.full_like(levels, values[0])
    equal = inputs._replace(
        reward=np.broadcast_to(levels, inputs.reward.shape),
        reward_components=np.broadcast_to(levels[..., None], inputs.reward_components.shape),
        token_reward=np.zeros(inputs.mask.shape),
    )
    assert not found(cfg, equal).advantage.any()


@for_each(SHIFTING)
@few(15)
@given(inputs=estimator_inputs(), seed=st.integers(0, 99), shift=st.sampled_from([1.0, -7.5, 1024.125, 2.0**20]))
def test_a_shift_of_all_rewards_changes_nothing(cfg, inputs, seed, shift):
    """In multiples of 1/8 below 2^21 all is exact in float32, so to the bit."""
    parts = np.random.default_rng(seed).integers(-8, 9, inputs.reward_components.shape) / np.float32(8)
    weights = np.ones(parts.shape[2])
    base = inputs._replace(reward_components=parts, component_weights=weights, reward=parts.sum(axis=2))
    base = base._replace(token_reward=np.zeros(base.mask.shape))
    moved = base._replace(reward_components=parts + np.float32(shift), reward=base.reward + np.float32(shift))
    np.testing.assert_array_equal(found(cfg, moved).advantage, found(cfg, base).advantage)


@for_each(VARIANTS)
@few(20)
@given(inputs=estimator_inputs())
def test_no_advantage_is_above_the_bound_of_its_formula(cfg, inputs):
    largest = np.abs(found(cfg, inputs).advantage).max()
    assert largest <= bound(cfg, inputs) * (1 + 1e-7)


@for_each(VARIANTS)
def test_with_no_group_that_counts_there_is_nothing(cfg):
    found = estimate(cfg, single_tokens([[1.0, 0.0], [np.nan, np.nan]], used=np.zeros(2, bool)))
    assert not found.advantage.any() and found.advantage.shape == (4, 1)


@pytest.mark.parametrize(
    ("cfg", "want"),
    [
        (Raw(), 0.5),
        (Gae(), 0.5),
        (ReinforcePlusPlus(), 0.5),
        (Grpo(mean_over="batch", std_over="batch"), 0.0),
    ],
    ids=repr,
)
def test_one_sequence_of_one_token_has_no_spread(cfg, want):
    """Estimators that compare nothing within a group allow one sample per prompt."""
    assert estimate(cfg, single_tokens([[0.5], [9.0]], used=np.array([True, False]))).advantage.tolist() == [
        [want],
        [0],
    ]

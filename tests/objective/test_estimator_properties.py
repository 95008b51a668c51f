"""Properties of every advantage estimator, for any rewards, without NumPy warnings."""

from typing import NamedTuple

import numpy as np
import pytest
from estimator_inputs import grouping, single_tokens
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from variants import VARIANTS

from jaxrl_llm.errors import AdvantageError
from jaxrl_llm.objective.advantages import bound, estimate
from jaxrl_llm.objective.estimator import EstimatorInputs, at_tokens, sequence_rewards
from jaxrl_llm.objective.group_estimators import BestWorst, Gpg, Grpo, MaxRl, Raw
from jaxrl_llm.objective.token_estimators import Gae, ReinforcePlusPlus

pytestmark = pytest.mark.filterwarnings("error")

MAX = float(np.finfo(np.float32).max)
PER_BATCH = [cfg for cfg in VARIANTS if isinstance(cfg, ReinforcePlusPlus) and not cfg.baseline and cfg.gamma == 1] + [
    cfg for cfg in VARIANTS if isinstance(cfg, Grpo) and cfg.mean_over == "batch"
]
PER_GROUP = [
    cfg
    for cfg in VARIANTS
    if cfg not in PER_BATCH and not isinstance(cfg, Raw | Gae) and cfg != ReinforcePlusPlus(gamma=0.9)
]
# Of a group alone: no statistic of the batch.
ALONE = [cfg for cfg in VARIANTS if not cfg.uses_batch_statistics and not isinstance(cfg, Gpg)]
ALONE = [cfg for cfg in ALONE if cfg not in PER_BATCH and not getattr(cfg, "whiten", False)]
COMPARING = [cfg for cfg in PER_GROUP if cfg.compares_within_group]
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
    """One to three groups of one to six ragged sequences, often equally many, with tokens that the policy did not sample between
    the others, rewards per token or none, of steps or none, one or two graders."""
    groups, slots = draw(st.integers(1, 3)), 4
    unequal = st.lists(st.integers(1, 6), min_size=groups, max_size=groups).filter(lambda sizes: sum(sizes) > 1)
    sizes = draw(st.integers(2, 6).map(lambda n: [n] * groups) | unequal)
    graders = draw(st.integers(1, 2))
    size = sum(sizes)
    element = REWARDS[draw(st.sampled_from(sorted(REWARDS)))]
    parts = np.float32(draw(st.lists(element, min_size=size * graders, max_size=size * graders)))
    parts = parts.reshape(size, graders)
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    mask = np.arange(slots) < rng.integers(1, slots + 1, (size, 1))
    mask[:, 1] &= rng.random(size) < 0.5
    weights = np.array([1.0, 0.5])[:graders]
    scale = draw(st.sampled_from([None, 0.01, 1e-8]))
    of_steps = np.where(rng.random(mask.shape) < 0.5, rng.choice(parts.ravel(), mask.shape), np.float32(np.nan))
    return EstimatorInputs(
        reward=(parts.astype(np.float64) @ weights).astype(np.float32),
        reward_components=parts,
        component_weights=weights,
        groups=grouping(*sizes),
        mask=mask,
        token_reward=None if scale is None else rng.normal(0, scale, mask.shape),
        values=rng.normal(0, 1, mask.shape).astype(np.float32),
        step_reward=draw(st.sampled_from([None, of_steps])),
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
    """[B C]"""
    returns: np.ndarray | None


def found(cfg, inputs: EstimatorInputs) -> Found:
    """Skipped where the formula itself overflows float32: that error has another test."""
    try:
        result = estimate(cfg, inputs)
    except AdvantageError as error:
        if "float32 holds" in str(error) and bound(cfg, inputs) > MAX:
            reject()
        raise
    return Found(at_tokens(result.advantage, inputs.mask), result.returns)


def rows_of(inputs: EstimatorInputs) -> list[np.ndarray]:
    """Rows of each group."""
    return np.split(np.arange(len(inputs.reward)), inputs.groups.start[1:])


def taken(inputs: EstimatorInputs, groups: list[np.ndarray]) -> EstimatorInputs:
    """Other groups of these rows."""
    names = ("reward", "reward_components", "mask", "token_reward", "values", "step_reward")
    given = {name: getattr(inputs, name) for name in names}
    rows = np.concatenate(groups)
    return inputs._replace(
        groups=grouping(*map(len, groups)), **{name: x if x is None else x[rows] for name, x in given.items()}
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
    own = rows_of(inputs)
    groups = [rng.permutation(own[p]) for p in rng.permutation(len(own))]
    got, want = found(cfg, taken(inputs, groups)), found(cfg, inputs)
    if isinstance(cfg, BestWorst):
        # The first of equal ones is the best or the worst: another row, the same reward.
        score = sequence_rewards(inputs)
        for now, rows in zip(rows_of(taken(inputs, groups)), groups, strict=True):
            pairs = [np.sort(score[rows] + 1j * x) for x in (got.advantage[now, 0], want.advantage[rows, 0])]
            np.testing.assert_array_equal(*pairs)
        return
    rows = np.concatenate(groups)
    same(got, Found(*(None if x is None else x[rows] for x in want)))


@for_each(ALONE)
@few(20)
@given(inputs=estimator_inputs())
def test_groups_do_not_mix(cfg, inputs):
    """Each group's advantages are those that it has alone, to the bit."""
    each = [found(cfg, taken(inputs, [rows])) for rows in rows_of(inputs)]
    parts = [None if x[0] is None else np.concatenate(x) for x in zip(*each, strict=True)]
    same(found(cfg, inputs), Found(*parts))


@for_each(COMPARING)
@few(20)
@given(inputs=estimator_inputs())
def test_a_row_alone_in_its_group_is_at_its_baseline(cfg, inputs):
    """It gets 0: exactly where no whitening follows. A whitening takes it as a row that is 0 from the baseline, as those of a group
    of equal rewards are. Without steps, which may differ from each other."""
    inputs = inputs._replace(step_reward=None)
    alone = inputs.groups.rows == 1
    equal = inputs._replace(reward=np.where(alone, np.float32(0.25), inputs.reward))
    equal = equal._replace(reward_components=np.where(alone[:, None], np.float32(0.25), inputs.reward_components))
    if cfg in ALONE:
        assert not found(cfg, inputs).advantage[alone].any()
    if not isinstance(cfg, Gpg | Grpo):
        # Whatever its reward is, which is no part of any statistic.
        np.testing.assert_array_equal(found(cfg, equal).advantage, found(cfg, inputs).advantage)


@for_each(PER_GROUP + PER_BATCH)
@few(20)
@given(inputs=estimator_inputs(), values=st.lists(FLOAT32, min_size=3, max_size=3))
def test_equal_rewards_give_exactly_nothing(cfg, inputs, values):
    """Each group its own reward where the baseline is the group's."""
    levels = np.float32(values[: len(inputs.groups.size)])
    if cfg in PER_BATCH:
        levels = np.full_like(levels, values[0])
    reward = inputs.groups.per_row(levels)
    equal = inputs._replace(
        reward=reward,
        reward_components=np.broadcast_to(reward[:, None], inputs.reward_components.shape),
        token_reward=None,
        step_reward=None,
    )
    assert not found(cfg, equal).advantage.any()


@for_each(SHIFTING)
@few(15)
@given(inputs=estimator_inputs(), seed=st.integers(0, 99), shift=st.sampled_from([1.0, -7.5, 1024.125, 2.0**20]))
def test_a_shift_of_all_rewards_changes_nothing(cfg, inputs, seed, shift):
    """In multiples of 1/8 below 2^21 all is exact in float32, so to the bit."""
    parts = np.random.default_rng(seed).integers(-8, 9, inputs.reward_components.shape) / np.float32(8)
    weights = np.ones(parts.shape[1])
    base = inputs._replace(reward_components=parts, component_weights=weights, reward=parts.sum(axis=1))
    base = base._replace(token_reward=None, step_reward=None)
    moved = base._replace(reward_components=parts + np.float32(shift), reward=base.reward + np.float32(shift))
    np.testing.assert_array_equal(found(cfg, moved).advantage, found(cfg, base).advantage)


@for_each(VARIANTS)
@few(20)
@given(inputs=estimator_inputs())
def test_no_advantage_is_above_the_bound_of_its_formula(cfg, inputs):
    largest = np.abs(found(cfg, inputs).advantage).max()
    assert largest <= bound(cfg, inputs) * (1 + 1e-7)


@for_each(VARIANTS)
@few(10)
@given(inputs=estimator_inputs())
def test_token_rewards_of_zero_are_as_none(cfg, inputs):
    zeros, none = np.zeros(inputs.mask.shape), inputs._replace(token_reward=None)
    same(found(cfg, inputs._replace(token_reward=zeros)), found(cfg, none))


@for_each(VARIANTS)
def test_with_no_row_there_is_nothing(cfg):
    inputs = single_tokens([[1.0, 0.0]])
    none = taken(inputs, [np.zeros(0, int)])
    assert at_tokens(estimate(cfg, none).advantage, none.mask).shape == (0, 1)
    assert bound(cfg, none) == 0


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
    inputs = single_tokens([[0.5]])
    assert at_tokens(estimate(cfg, inputs).advantage, inputs.mask).tolist() == [[want]]

"""Packed groups: bit for bit what was packed, in the bytes of what was sampled, whatever could have been."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.experience.composition import widened
from jaxrl_llm.experience.packed_groups import Packing
from jaxrl_llm.experience.replay import blank_groups
from jaxrl_llm.types import Groups, check, number_rows, select_groups

PAD = 3
FEATURES = ("truncation", "raw_logprobs", "control", "steps", "hints")


def groups_of(size, length, kept, slots=(3, 9), most=20, uses=FEATURES, seed=0) -> Groups:
    """Random groups of these sizes. `length`: tokens per row; `kept`: kept tokens of each token, cycled."""
    rng, num, rows = np.random.default_rng(seed), len(size), int(np.sum(size))
    prompt, sample = number_rows(size)
    blank = blank_groups(num, 1, slots, 2, uses, most)
    length = np.resize(np.array(length, np.int32), rows)
    inside = np.arange(slots[1]) < length[:, None]
    real = lambda: np.where(inside, rng.random(inside.shape), 0).astype(np.float32)  # noqa: E731
    whole = lambda low, high: np.where(inside, rng.integers(low, high, inside.shape), 0).astype(np.int32)  # noqa: E731
    sampled = inside & (rng.random(inside.shape) < 0.8)
    of_prompt = rng.integers(1, slots[0] + 1, num).astype(np.int32)
    tokens = np.where(np.arange(slots[0]) < of_prompt[:, None], rng.integers(4, 99, (num, slots[0])), PAD)
    more = {}
    if "truncation" in uses:
        counts = np.where(sampled, np.resize(kept, inside.shape), 0)[..., None]
        ids = rng.integers(0, 99, (*inside.shape, most))
        more["kept_tokens"] = np.where(np.arange(most) < counts, ids, -1).astype(np.int32)
    if "raw_logprobs" in uses:
        more["raw_logprobs"] = real()
    if "control" in uses:
        more["control_state"] = np.where(inside, rng.integers(0, 9, inside.shape), 0).astype(np.int32)
    rollouts = blank.rollouts.replace(
        prompts=blank.rollouts.prompts.replace(
            tokens=tokens.astype(np.int32),
            length=of_prompt,
            uid=rng.integers(0, 2**31 - 1, num).astype(np.int32),
            row=rng.integers(0, 99, num).astype(np.int32),
        ),
        prompt=prompt,
        sample=sample + 5,
        tokens=np.where(inside, whole(4, 99), PAD).astype(np.int32),
        length=length,
        sampled=sampled,
        behavior_logprobs=np.where(inside, -real(), 0).astype(np.float32),
        entropy=real(),
        temperature=rng.random(rows).astype(np.float32),
        version=whole(0, 9),
        finish=rng.integers(0, 3, rows).astype(np.int32),
        **more,
    )
    steps = np.where(inside & (rng.random(inside.shape) < 0.3), real(), np.float32(np.nan))
    groups = Groups(
        rollouts,
        reward=rng.random(rows).astype(np.float32),
        components=rng.random((rows, 2)).astype(np.float32),
        failure=rng.integers(0, 3, num).astype(np.int32),
        failed_by=rng.integers(-1, 2, num).astype(np.int32),
        vote=rng.integers(0, 9, rows).astype(np.int32),
        keep=rng.random(rows) < 0.5,
        graders=("a", "b"),
        step_reward=steps if "steps" in uses else None,
        hint=rng.integers(0, 3, rows).astype(np.int32) if "hints" in uses else None,
        taught=inside & ~sampled if "hints" in uses else None,
    )
    return check(groups)


def same(got: Groups, want: Groups) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype) and x.tobytes() == y.tobytes()


@settings(max_examples=150, deadline=None)
@given(
    size=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    length=st.lists(st.integers(0, 9), min_size=1, max_size=7),
    kept=st.lists(st.integers(0, 20), min_size=1, max_size=11),
    uses=st.sets(st.sampled_from(FEATURES)),
    fillers=st.integers(0, 3),
    data=st.data(),
)
def test_any_groups_come_back_bit_for_bit_in_any_order(size, length, kept, uses, fillers, data):
    """More kept tokens than are handled at once, rows without a token, groups without a row, and filler rows."""
    groups = groups_of(size, length, kept, uses=tuple(uses))
    packing = Packing(groups, PAD)
    packed = packing.pack(select_groups(groups, np.arange(len(size)), len(groups.keep) + fillers))
    order = data.draw(st.permutations(range(len(size))))
    same(widened(packing.unpack([packed[p] for p in order]), groups, PAD), select_groups(groups, np.array(order)))


def test_bytes_do_not_depend_on_what_could_have_been():
    """By hand for a group of rows with 2 and 3 tokens that keep 1 to 5 tokens, without the other columns."""
    small = groups_of([2], [2, 3], [1, 2, 3, 4, 5], uses=("truncation",))
    wide = groups_of([2], [2, 3], [1, 2, 3, 4, 5], slots=(3, 9), most=200, uses=("truncation",))
    kept = int((small.rollouts.kept_tokens >= 0).sum())
    [one] = Packing(small, PAD).pack(small)
    prompt = int(small.rollouts.prompts.length[0])
    of_rows = 2 * (
        4 * 8 + 1
    )  # sample, length, temperature, finish, reward, two components and the vote; whether it is kept
    of_tokens = 5 * (4 * 4 + 1) + 1  # id, log-prob, entropy, version and the count of kept tokens; five bits
    of_group = 4 * 5  # prompt length, uid, row, failure, failed_by
    assert one.nbytes == 16 + 4 * prompt + of_rows + of_tokens + 4 * kept + of_group
    [other] = Packing(wide, PAD).pack(wide)
    assert other.nbytes - 4 * int((wide.rollouts.kept_tokens >= 0).sum()) == one.nbytes - 4 * kept


def test_counts_of_more_than_255_kept_tokens():
    groups = groups_of([3, 2], [4, 9], [300, 17, 256], most=400)
    packing = Packing(groups, PAD)
    same(widened(packing.unpack(packing.pack(groups)), groups, PAD), groups)


def test_counts_of_more_than_65535_kept_tokens():
    groups = groups_of([1], [1], [2**16 + 3], slots=(1, 1), most=2**16 + 8, uses=("truncation",))
    groups = groups.replace(rollouts=groups.rollouts.replace(sampled=np.ones((1, 1), bool)))
    kept = groups.rollouts.replace(
        kept_tokens=np.where(np.arange(2**16 + 8) < 2**16 + 3, 7, -1)[None, None].astype(np.int32)
    )
    packing = Packing(groups, PAD)
    back = packing.unpack(packing.pack(groups.replace(rollouts=kept)))
    assert np.count_nonzero(back.rollouts.kept_tokens == 7) == 2**16 + 3


def test_a_packed_group_is_wider_in_a_wider_run():
    """What a run with fewer slots packed, in the slots of a run with more."""
    groups, other = groups_of([2, 1], [4, 9], [3, 18]), groups_of([1], [1], [1], slots=(7, 12), most=33)
    narrow = Packing(other, PAD).unpack(Packing(groups, PAD).pack(groups))
    assert narrow.rollouts.tokens.shape == (3, 9) and narrow.rollouts.kept_tokens.shape == (3, 9, 18)
    wide = widened(narrow, other, PAD)
    assert wide.rollouts.tokens.shape == (3, 12) and wide.rollouts.kept_tokens.shape == (3, 12, 33)
    np.testing.assert_array_equal(wide.rollouts.tokens[:, :9], groups.rollouts.tokens)
    np.testing.assert_array_equal(wide.rollouts.kept_tokens[:, :9, :20], groups.rollouts.kept_tokens)
    assert (wide.rollouts.tokens[:, 9:] == PAD).all() and (wide.rollouts.kept_tokens[:, :, 20:] == -1).all()
    assert np.isnan(wide.step_reward[:, 9:]).all() and (wide.rollouts.prompts.tokens[:, 3:] == PAD).all()


@pytest.mark.parametrize("column", ["behavior_logprobs", "version", "kept_tokens", "sampled"])
def test_every_column_counts(column):
    """A flipped bit in a column is a flipped bit in the bytes: nothing is computed from something else."""
    groups = groups_of([2], [9], [20])
    x = getattr(groups.rollouts, column).copy()
    x[1, 2] = ~x[1, 2] if x.dtype == bool else x[1, 2] + 1
    changed = groups.replace(rollouts=groups.rollouts.replace(**{column: x}))
    packing = Packing(groups, PAD)
    assert packing.pack(groups)[0].tobytes() != packing.pack(changed)[0].tobytes()

"""Batches by hand: what is joined where, what the loss sees, and minibatches of whole groups."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.experience.batch import make_batch, minibatches, rows_of
from jaxrl_llm.types import Experience, Finish, Prompts, Rollouts, check

PAD, EOS = 0, 9


def i32(values) -> np.ndarray:
    return np.array(values, np.int32)


def f32(values) -> np.ndarray:
    return np.array(values, np.float32)


def tiny() -> Experience:
    """Prompts 4 and 5 6 7, two samples each, S = 3 and C = 3; the last row was not ended."""
    rollouts = Rollouts(
        prompts=Prompts(tokens=i32([[4, 0, 0], [5, 6, 7]]), length=i32([1, 3]), uid=i32([0, 1]), row=i32([0, 1])),
        tokens=i32([[1, EOS, 0], [EOS, 0, 0], [2, 3, EOS], [1, 1, 2]]),
        length=i32([2, 1, 3, 3]),
        sampled=np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]], bool),
        behavior_logprobs=f32([[-0.1, -0.2, 0], [-0.3, 0, 0], [-0.4, -0.5, -0.6], [-0.7, -0.8, -0.9]]),
        entropy=np.zeros((4, 3), np.float32),
        temperature=f32([0.5, 0.5, 2.0, 2.0]),
        version=np.zeros((4, 3), np.int32),
        finish=i32([Finish.EOS, Finish.EOS, Finish.EOS, Finish.LENGTH]),
    )
    return check(Experience(rollouts, reward=f32([1, 0, 1, 0]), advantage=f32([2, -2, 3, -3])))


def test_make_batch_by_hand():
    batch = check(make_batch(tiny(), np.array([True, True]), PAD))
    np.testing.assert_array_equal(
        batch.tokens, [[4, 1, 9, 0, 0, 0], [4, 9, 0, 0, 0, 0], [5, 6, 7, 2, 3, 9], [5, 6, 7, 1, 1, 2]]
    )
    np.testing.assert_array_equal(batch.segment, [[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1] * 6, [1] * 6])
    np.testing.assert_array_equal(batch.position, [[0, 1, 2, 0, 0, 0], [0, 1, 0, 0, 0, 0], range(6), range(6)])
    mask = [[0, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1]]
    np.testing.assert_array_equal(batch.loss_mask, np.array(mask, bool))
    np.testing.assert_array_equal(
        batch.behavior_logprobs,
        f32(
            [[0, -0.1, -0.2, 0, 0, 0], [0, -0.3, 0, 0, 0, 0], [0, 0, 0, -0.4, -0.5, -0.6], [0, 0, 0, -0.7, -0.8, -0.9]]
        ),
    )
    np.testing.assert_array_equal(batch.advantage, np.array(mask) * [[2], [-2], [3], [-3]])
    np.testing.assert_array_equal(batch.temperature, np.repeat([0.5, 2.0], 2)[:, None] * np.ones(6))
    assert batch.reference_logprobs is None


def test_support_and_bars_go_where_their_tokens_go():
    """Two tokens kept at most; -1 in prompts and padding, where nothing was drawn."""
    experience = tiny()
    support = np.full((4, 3, 2), -1, np.int32)
    support[0, :2], support[1, 0], support[3] = [[1, 5], [9, -1]], [9, 2], [[1, 3], [1, 4], [2, 8]]
    barred = np.array([[1, 0, 0], [0, 0, 0], [1, 1, 0], [1, 0, 0]], bool)
    rollouts = check(experience.rollouts.replace(support=support, barred=barred))
    batch = check(make_batch(experience.replace(rollouts=rollouts), np.array([True, True]), PAD))
    none = [-1, -1]
    np.testing.assert_array_equal(batch.support[0], [none, [1, 5], [9, -1], none, none, none])
    np.testing.assert_array_equal(batch.support[1], [none, [9, 2], none, none, none, none])
    np.testing.assert_array_equal(batch.support[2], [none] * 6)
    np.testing.assert_array_equal(batch.support[3], [none, none, none, [1, 3], [1, 4], [2, 8]])
    want = [[0, 1, 0, 0, 0, 0], [0] * 6, [0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0]]
    np.testing.assert_array_equal(batch.barred, np.array(want, bool))
    (part,) = minibatches(batch, 2, 1, np.random.default_rng(0))
    np.testing.assert_array_equal(part.support, batch.support)


def test_a_dropped_group_has_no_loss_tokens_and_no_nan():
    experience = tiny()
    experience = experience.replace(advantage=f32([np.nan, np.nan, 3, -3]))
    batch = check(make_batch(experience, np.array([False, True]), PAD))
    assert not batch.loss_mask[:2].any() and batch.loss_mask[2:].sum() == 6
    np.testing.assert_array_equal(batch.advantage[:2], 0.0)
    np.testing.assert_array_equal(batch.tokens, make_batch(tiny(), np.array([True, True]), PAD).tokens)


def test_a_token_that_the_policy_did_not_draw_is_not_learnt():
    experience = tiny()
    forced = experience.rollouts.sampled.copy()
    forced[2, 1] = False
    batch = make_batch(
        experience.replace(rollouts=experience.rollouts.replace(sampled=forced)), np.array([True, True]), PAD
    )
    np.testing.assert_array_equal(batch.loss_mask[2], [False, False, False, True, False, True])
    assert batch.segment[2].all() and batch.advantage[2, 4] == 0


def test_rows_of_makes_a_supervised_batch():
    batch, into = rows_of(i32([[4, 0], [5, 6]]), i32([1, 2]), i32([[7, 9, 0], [9, 0, 0]]), i32([2, 1]), PAD)
    check(batch)
    np.testing.assert_array_equal(into, [[1, 2, 3], [2, 3, 4]])
    np.testing.assert_array_equal(batch.tokens, [[4, 7, 9, 0, 0], [5, 6, 9, 0, 0]])
    np.testing.assert_array_equal(batch.loss_mask, np.array([[0, 1, 1, 0, 0], [0, 0, 1, 0, 0]], bool))
    np.testing.assert_array_equal(batch.temperature, 1.0)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_whatever_the_lengths_the_loss_sees_completions_whole_and_prompts_never(data):
    p, g, s, c = (data.draw(st.integers(1, 4)) for _ in range(4))
    prompt_length = i32([data.draw(st.integers(1, s)) for _ in range(p)])
    length = i32([data.draw(st.integers(1, c)) for _ in range(p * g)])
    counts = np.array([data.draw(st.booleans()) for _ in range(p)])
    sampled = np.arange(c) < length[:, None]
    prompt = i32(np.where(np.arange(s) < prompt_length[:, None], 1 + np.arange(s) % 2, PAD))
    # Completion tokens are numbered from 100, so that each is found again; prompt tokens are 1 and 2.
    tokens = np.where(sampled, 100 + np.arange(p * g * c).reshape(p * g, c), PAD).astype(np.int32)
    rollouts = Rollouts(
        prompts=Prompts(prompt, prompt_length, i32(range(p)), i32(range(p))),
        tokens=tokens, length=length, sampled=sampled, behavior_logprobs=np.where(sampled, -tokens / 3, 0).astype(np.float32),
        entropy=np.zeros((p * g, c), np.float32), temperature=np.ones(p * g, np.float32), version=np.zeros((p * g, c), np.int32),
        finish=np.zeros(p * g, np.int32),
    )  # fmt: skip
    ones = np.ones(p * g, np.float32)
    batch = check(make_batch(Experience(rollouts, ones, ones), counts, PAD))
    for b in range(p * g):
        start, end = prompt_length[b // g], prompt_length[b // g] + length[b]
        want = np.zeros(s + c, bool)
        want[start:end] = counts[b // g]
        np.testing.assert_array_equal(batch.loss_mask[b], want)
        np.testing.assert_array_equal(batch.tokens[b, start:end], tokens[b, : length[b]])
        np.testing.assert_array_equal(batch.behavior_logprobs[b, start:end], rollouts.behavior_logprobs[b, : length[b]])
        assert not batch.behavior_logprobs[b, :start].any() and not batch.behavior_logprobs[b, end:].any()
        assert (batch.tokens[b, end:] == PAD).all() and (batch.tokens[b, :start] > 0).all()


def numbered(groups: int, samples: int):
    """A batch whose every slot holds the number of its row."""
    rows = groups * samples
    rollouts = Rollouts(
        prompts=Prompts(np.ones((groups, 1), np.int32), *(np.ones(groups, np.int32) for _ in range(3))),
        tokens=np.arange(rows, dtype=np.int32)[:, None], length=np.ones(rows, np.int32), sampled=np.ones((rows, 1), bool),
        behavior_logprobs=-np.arange(rows, dtype=np.float32)[:, None], entropy=np.zeros((rows, 1), np.float32),
        temperature=np.ones(rows, np.float32), version=np.zeros((rows, 1), np.int32), finish=np.zeros(rows, np.int32),
    )  # fmt: skip
    return make_batch(
        Experience(rollouts, np.ones(rows, np.float32), np.ones(rows, np.float32)), np.ones(groups, bool), PAD
    )


@pytest.mark.parametrize("num", [1, 2, 4, 8])
def test_minibatches_keep_groups_whole_and_cover_each_row_once(num):
    samples, batch = 3, numbered(8, 3)
    parts = list(minibatches(batch, samples, num, np.random.default_rng(0)))
    assert len(parts) == num and all(len(part.tokens) == 24 // num for part in parts)
    rows = np.concatenate([part.tokens[:, 1] for part in parts])
    np.testing.assert_array_equal(np.sort(rows), np.arange(24))
    np.testing.assert_array_equal(rows.reshape(-1, samples) % samples, np.tile(np.arange(samples), (8, 1)))
    assert (rows.reshape(-1, samples) // samples == rows.reshape(-1, samples)[:, :1] // samples).all()
    # Every field goes with its row.
    for part in parts:
        np.testing.assert_array_equal(part.behavior_logprobs[:, 1], -part.tokens[:, 1])


def test_minibatches_have_a_new_order_each_epoch_and_the_same_for_the_same_seed():
    batch, rng = numbered(8, 2), np.random.default_rng(1)

    def order(rng):
        return np.concatenate([part.tokens[:, 1] for part in minibatches(batch, 2, 4, rng)]).tolist()

    first, second = order(rng), order(rng)
    assert first != second
    assert [first, second] == [order(again := np.random.default_rng(1)), order(again)]


def test_a_single_minibatch_is_the_batch():
    batch = numbered(4, 2)
    (part,) = minibatches(batch, 2, 1, np.random.default_rng(0))
    jax.tree.map(np.testing.assert_array_equal, part, batch)

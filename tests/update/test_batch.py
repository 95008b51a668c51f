"""Batches by hand: what is joined where, what the loss sees and weighs, and minibatches of whole groups."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.types import (
    Credit,
    Experience,
    Finish,
    Groups,
    Prompts,
    Rollouts,
    Scores,
    check,
    join_groups,
    number_rows,
    select_groups,
)
from jaxrl_llm.update.batch import fill_batch, minibatches, supervised, to_completions, token_weights
from jaxrl_llm.update.packing import BatchShape, GroupSizes, batch_shape, equal_groups, share

PAD, EOS = 0, 9


def i32(values) -> np.ndarray:
    return np.array(values, np.int32)


def f32(values) -> np.ndarray:
    return np.array(values, np.float32)


def tiny(**changes) -> Groups:
    """Prompts 4 and 5 6 7, two samples each, S = 3 and C = 3; the last row was not ended."""
    rollouts = Rollouts(
        prompts=Prompts(tokens=i32([[4, 0, 0], [5, 6, 7]]), length=i32([1, 3]), uid=i32([0, 1]), row=i32([0, 1])),
        prompt=i32([0, 0, 1, 1]),
        sample=i32([0, 1, 0, 1]),
        tokens=i32([[1, EOS, 0], [EOS, 0, 0], [2, 3, EOS], [1, 1, 2]]),
        length=i32([2, 1, 3, 3]),
        sampled=np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]], bool),
        behavior_logprobs=f32([[-0.1, -0.2, 0], [-0.3, 0, 0], [-0.4, -0.5, -0.6], [-0.7, -0.8, -0.9]]),
        entropy=np.zeros((4, 3), np.float32),
        temperature=f32([0.5, 0.5, 2.0, 2.0]),
        version=np.zeros((4, 3), np.int32),
        finish=i32([Finish.EOS, Finish.EOS, Finish.EOS, Finish.LENGTH]),
    )
    groups = Groups(
        rollouts=rollouts.replace(**changes),
        reward=f32([1, 0, 1, 0]),
        components=f32([[1], [0], [1], [0]]),
        failure=i32([0, 0]),
        failed_by=i32([-1, -1]),
        vote=i32([1, 2, 1, 2]),
        keep=np.ones(4, bool),
    )
    return check(groups)


def experience(groups: Groups, keep=(True, True, True, True), **scores) -> Experience:
    """Advantages 2, -2, 3, -3 of the four."""
    advantage = np.where(groups.rollouts.sampled, f32([[2], [-2], [3], [-3]]), 0).astype(np.float32)
    return Experience(groups.replace(keep=np.array(keep)), check(Scores(**scores)), check(Credit(advantage)))


def one_a_row(found: Experience):
    rollouts = found.groups.rollouts
    slots = rollouts.prompts.tokens.shape[1] + rollouts.tokens.shape[1]
    return fill_batch(found, BatchShape("none", len(rollouts.length), slots, 1), PAD)


def test_one_sequence_a_row_by_hand():
    batch, where = one_a_row(experience(tiny()))
    check(batch)
    np.testing.assert_array_equal(
        batch.tokens, [[4, 1, 9, 0, 0, 0], [4, 9, 0, 0, 0, 0], [5, 6, 7, 2, 3, 9], [5, 6, 7, 1, 1, 2]]
    )
    np.testing.assert_array_equal(batch.position, [[0, 1, 2, 0, 0, 0], [0, 1, 0, 0, 0, 0], range(6), range(6)])
    np.testing.assert_array_equal(batch.until, [[3, 3, 3, 3, 4, 5], [2, 2, 2, 3, 4, 5], [6] * 6, [6] * 6])
    np.testing.assert_array_equal(batch.before, [[0, 0, 1, 3, 4, 5], [0, 0, 2, 3, 4, 5], *[[0, 0, 1, 2, 3, 4]] * 2])
    mask = [[0, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1]]
    np.testing.assert_array_equal(batch.segment, mask)
    np.testing.assert_array_equal(batch.group, [[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1] * 6, [1] * 6])
    np.testing.assert_array_equal(batch.loss_mask, np.array(mask, bool))
    np.testing.assert_allclose(batch.weight, np.array(mask) / 9, rtol=1e-7)
    behavior = f32(
        [[0, -0.1, -0.2, 0, 0, 0], [0, -0.3, 0, 0, 0, 0], [0, 0, 0, -0.4, -0.5, -0.6], [0, 0, 0, -0.7, -0.8, -0.9]]
    )
    np.testing.assert_array_equal(batch.behavior_logprobs, behavior)
    np.testing.assert_array_equal(batch.advantage, np.array(mask) * [[2], [-2], [3], [-3]])
    temperature = np.where(batch.segment > 0, np.repeat([0.5, 2.0], 2)[:, None], 1.0)
    np.testing.assert_array_equal(batch.temperature, temperature)
    assert batch.reference_logprobs is None
    np.testing.assert_array_equal(
        to_completions(batch.behavior_logprobs, where, tiny().rollouts), tiny().rollouts.behavior_logprobs
    )


def test_a_prompt_that_is_shared_by_hand():
    """A group a row: its prompt once, its two completions behind it."""
    values = f32([[1, 2, 0], [3, 0, 0], [4, 5, 6], [7, 8, 9]])
    found = experience(tiny(), values=values)
    batch, where = fill_batch(found, BatchShape("shared_prefix", 2, 10, 1), PAD)
    check(batch)
    # The longest first.
    np.testing.assert_array_equal(batch.tokens, [[5, 6, 7, 2, 3, 9, 1, 1, 2, 0], [4, 1, 9, 9, 0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.position, [[0, 1, 2, 3, 4, 5, 3, 4, 5, 0], [0, 1, 2, 1, 0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.until, [[9, 9, 9, 6, 6, 6, 9, 9, 9, 9], [4, 3, 3, 4, 4, 5, 6, 7, 8, 9]])
    np.testing.assert_array_equal(batch.before, [[0, 0, 1, 2, 3, 4, 2, 6, 7, 9], [0, 0, 1, 0, 4, 5, 6, 7, 8, 9]])
    np.testing.assert_array_equal(batch.segment, [[0, 0, 0, 1, 1, 1, 2, 2, 2, 0], [0, 1, 1, 2, 0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.group, [[1] * 9 + [0], [1] * 4 + [0] * 6])
    np.testing.assert_array_equal(batch.loss_mask, batch.segment > 0)
    np.testing.assert_array_equal(batch.advantage[0], [0, 0, 0, 3, 3, 3, -3, -3, -3, 0])
    np.testing.assert_array_equal(batch.values, [[0, 0, 0, 4, 5, 6, 7, 8, 9, 0], [0, 1, 2, 3, 0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(to_completions(batch.values, where, tiny().rollouts), values)


def test_sequences_one_behind_another_by_hand():
    """Rows of 8 slots: lengths 6 and 2, 6, 3; each has its own prompt."""
    batch, _ = fill_batch(experience(tiny()), BatchShape("plain", 3, 8, 1), PAD)
    check(batch)
    want = [[5, 6, 7, 2, 3, 9, 4, 9], [5, 6, 7, 1, 1, 2, 0, 0], [4, 1, 9, 0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(batch.tokens, want)
    np.testing.assert_array_equal(batch.until, [[6] * 6 + [8] * 2, [6] * 6 + [6, 7], [3, 3, 3, 3, 4, 5, 6, 7]])
    np.testing.assert_array_equal(batch.before[0], [0, 0, 1, 2, 3, 4, 6, 6])
    np.testing.assert_array_equal(batch.segment[0], [0, 0, 0, 1, 1, 1, 0, 2])
    np.testing.assert_array_equal(batch.group[0], [1, 1, 1, 1, 1, 1, 2, 2])
    np.testing.assert_array_equal(batch.temperature[0], [1, 1, 1, 2, 2, 2, 1, 0.5])


def test_micro_batches_are_filled_one_after_another():
    """Micro-batch i has rows i, i + M, ...: three sequences in four rows leave the last row of the last one empty."""
    found = experience(tiny(), (True, False, True, True))
    batch, where = fill_batch(found, BatchShape("none", 4, 6, 2), PAD)
    np.testing.assert_array_equal(where.row, [0, -1, 2, 1])
    np.testing.assert_array_equal(batch.tokens[:, :4], [[4, 1, 9, 0], [5, 6, 7, 1], [5, 6, 7, 2], [0, 0, 0, 0]])
    assert not batch.group[3].any() and (batch.tokens[3] == PAD).all()


def test_support_and_bars_go_where_their_tokens_go():
    """At most two kept tokens; -1 in prompts and padding, where nothing was sampled."""
    kept_tokens = np.full((4, 3, 2), -1, np.int32)
    kept_tokens[0, :2], kept_tokens[1, 0], kept_tokens[3] = [[1, 5], [9, -1]], [9, 2], [[1, 3], [1, 4], [2, 8]]
    codes = np.array([[7, 0, 0], [0, 0, 0], [8, 9, 0], [5, 0, 0]], np.int32)
    found = experience(tiny(kept_tokens=kept_tokens, control_state=codes))
    batch = check(one_a_row(found)[0])
    none = [-1, -1]
    np.testing.assert_array_equal(batch.kept_tokens[0], [none, [1, 5], [9, -1], none, none, none])
    np.testing.assert_array_equal(batch.kept_tokens[1], [none, [9, 2], none, none, none, none])
    np.testing.assert_array_equal(batch.kept_tokens[2], [none] * 6)
    np.testing.assert_array_equal(batch.kept_tokens[3], [none, none, none, [1, 3], [1, 4], [2, 8]])
    want = [[0, 7, 0, 0, 0, 0], [0] * 6, [0, 0, 0, 8, 9, 0], [0, 0, 0, 5, 0, 0]]
    np.testing.assert_array_equal(batch.control_state, want)
    (part,) = minibatches(found, 1, np.random.default_rng(0))
    np.testing.assert_array_equal(part.groups.rollouts.kept_tokens, kept_tokens)


def test_a_dropped_group_is_left_out():
    """Its advantages may be NaN; the others keep their numbers, and the mean counts them alone."""
    found = experience(tiny(), (False, False, True, True))
    batch, where = one_a_row(found)
    check(batch)
    np.testing.assert_array_equal(where.row, [-1, -1, 0, 1])
    np.testing.assert_array_equal(batch.tokens[:2], [[5, 6, 7, 2, 3, 9], [5, 6, 7, 1, 1, 2]])
    assert not batch.loss_mask[2:].any() and batch.loss_mask[:2].sum() == 6
    np.testing.assert_allclose(batch.weight[:2, 3:], 1 / 6, rtol=1e-6)
    np.testing.assert_array_equal(
        to_completions(np.ones((4, 6), np.float32), where, tiny().rollouts), [[0] * 3] * 2 + [[1] * 3] * 2
    )


def test_a_token_that_the_policy_did_not_draw_is_not_learned():
    forced = tiny().rollouts.sampled.copy()
    forced[2, 1] = False
    batch, _ = one_a_row(experience(tiny(sampled=forced)))
    np.testing.assert_array_equal(batch.loss_mask[2], [False, False, False, True, False, True])
    # It is read all the same: a token of its sequence like the others.
    np.testing.assert_array_equal(batch.segment[2], [0, 0, 0, 1, 1, 1])
    assert batch.tokens[2, 4] == 3 and batch.advantage[2, 4] == batch.weight[2, 4] == 0
    np.testing.assert_allclose(batch.weight[2, 3], 1 / 8, rtol=1e-6)


def test_supervised_sequences_by_hand():
    prompts = Prompts(i32([[4, 0], [5, 6]]), i32([1, 2]), i32([0, 1]), i32([0, 1]))
    found = supervised(prompts, i32([[7, 9, 0], [9, 0, 0]]), i32([2, 1]))
    check(found.groups)
    batch, where = one_a_row(found)
    check(batch)
    np.testing.assert_array_equal(where.start, [1, 2])
    np.testing.assert_array_equal(batch.tokens, [[4, 7, 9, 0, 0], [5, 6, 9, 0, 0]])
    np.testing.assert_array_equal(batch.loss_mask, np.array([[0, 1, 1, 0, 0], [0, 0, 1, 0, 0]], bool))
    np.testing.assert_array_equal(batch.temperature, 1.0)
    warm = supervised(prompts, i32([[7, 9, 0], [9, 0, 0]]), i32([2, 1]), 0.7)
    np.testing.assert_array_equal(warm.groups.rollouts.temperature, np.float32([0.7, 0.7]))


# --- weights -------------------------------------------------------------------------------------------------------------

LOSS = f32([[1, 2, 0, 0], [1, 1, 1, 5]])
MASK = np.array([[1, 1, 0, 0], [1, 1, 1, 1]], bool)
MEANS = {"token": 11 / 6, "sequence": 1.75, "constant": 0.6875, "sequence_sum": 5.5, "token_sum": 11, "prompt": 11 / 6}


@pytest.mark.parametrize("aggregation", MEANS)
def test_token_weights(aggregation):
    """The reference's token losses [[1, 2], [1, 1, 1, 5]]; constant length 8; both of one prompt."""
    weights = token_weights(MASK, i32([0, 0]), aggregation, 8)
    np.testing.assert_allclose((weights * LOSS).sum(), MEANS[aggregation], rtol=1e-6)
    assert weights.dtype == np.float32 and not weights[~MASK].any()


def test_a_mean_over_prompts_by_hand():
    """Groups of 2 + 4 and of 3 tokens: 11 / 6 and 9 / 3, each half."""
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]], bool)
    loss = np.concatenate([LOSS, f32([[2, 3, 4, 0], [0, 0, 0, 0]])])
    weights = token_weights(mask, i32([0, 0, 1, 1]), "prompt", 8)
    np.testing.assert_allclose((weights * loss).sum(), (11 / 6 + 3) / 2, rtol=1e-6)


@pytest.mark.parametrize("aggregation", MEANS)
def test_sequences_without_a_token_do_not_count_and_nothing_at_all_weighs_nothing(aggregation):
    more = np.concatenate([MASK, np.zeros((3, 4), bool)])
    weights = token_weights(more, i32([0, 0, 1, 1, 2]), aggregation, 8)
    np.testing.assert_allclose(weights[:2], token_weights(MASK, i32([0, 0]), aggregation, 8), rtol=1e-6)
    assert not weights[2:].any()
    np.testing.assert_array_equal(token_weights(np.zeros((2, 4), bool), i32([0, 1]), aggregation, 8), 0)


# --- minibatches ---------------------------------------------------------------------------------------------------------


def numbered(groups: int, samples: int) -> Experience:
    """Rows whose every entry holds its number, in groups that hold theirs."""
    number, group = np.arange(groups * samples, dtype=np.int32), np.arange(groups, dtype=np.int32)
    found = supervised(Prompts(group[:, None], group * 0 + 1, group, group), number[:, None], number * 0 + 1)
    rollouts = found.groups.rollouts.replace(behavior_logprobs=-number.astype(np.float32)[:, None])
    of = found.groups.replace(rollouts=rollouts, failure=group, failed_by=group)
    return found._replace(groups=of, credit=Credit(2 * number.astype(np.float32)[:, None]))


def numbers(part: Experience) -> np.ndarray:
    return part.groups.rollouts.tokens[:, 0]


@pytest.mark.parametrize("num", [1, 2, 4, 8])
def test_minibatches_keep_groups_whole_and_cover_each_row_once(num):
    samples, whole = 3, numbered(8, 3)
    parts = list(minibatches(whole, num, np.random.default_rng(0)))
    assert len(parts) == num and all(len(numbers(part)) == 24 // num for part in parts)
    rows = np.concatenate([numbers(part) for part in parts])
    np.testing.assert_array_equal(np.sort(rows), np.arange(24))
    np.testing.assert_array_equal(rows.reshape(-1, samples) % samples, np.tile(np.arange(samples), (8, 1)))
    assert (rows.reshape(-1, samples) // samples == rows.reshape(-1, samples)[:, :1] // samples).all()
    # Every field goes with its row, and those of a group with the group.
    for part in parts:
        np.testing.assert_array_equal(part.groups.rollouts.behavior_logprobs[:, 0], -numbers(part))
        np.testing.assert_array_equal(part.credit.advantage[:, 0], 2 * numbers(part))
        np.testing.assert_array_equal(part.groups.failure, numbers(part)[::samples] // samples)
        np.testing.assert_array_equal(part.groups.rollouts.prompts.uid, numbers(part)[::samples] // samples)


def resized(whole: Experience, size, rows: int | None = None) -> Experience:
    """The experience with other groups' sizes, and fillers up to `rows`."""
    prompt, sample = number_rows(size, rows)
    groups = whole.groups
    return whole._replace(groups=groups.replace(rollouts=groups.rollouts.replace(prompt=prompt, sample=sample)))


@pytest.mark.parametrize("num", [1, 2, 3, 4])
def test_minibatches_of_groups_of_any_size(num):
    """Whole groups, each row once, no filler; a minibatch has its share of the rows, and up to a group more."""
    size, rows = np.array([3, 1, 0, 7, 2, 1, 5, 1]), 24
    whole = resized(numbered(8, 3), size, rows)
    first = np.cumsum(size) - size
    parts = list(minibatches(whole, num, np.random.default_rng(0)))
    np.testing.assert_array_equal(np.sort(np.concatenate([numbers(part) for part in parts])), np.arange(size.sum()))
    assert sorted(np.concatenate([part.groups.failure for part in parts])) == list(range(8))
    for part in parts:
        taken = part.groups.failure
        want = [first[p] + i for p in taken for i in range(size[p])]
        assert (
            numbers(part).tolist() == want
            and part.groups.rollouts.prompt.tolist() == np.repeat(np.arange(len(taken)), size[taken]).tolist()
        )
        assert len(want) < size.sum() / num + size.max()


def test_groups_are_selected_in_any_order_and_filled_up():
    whole = resized(numbered(3, 2), [1, 3, 2])
    part = select_groups(whole, np.array([2, 1]), rows=7)
    rollouts = part.groups.rollouts
    assert numbers(part).tolist() == [4, 5, 1, 2, 3, 0, 0] and part.groups.failure.tolist() == [2, 1]
    assert rollouts.prompt.tolist() == [0, 0, 1, 1, 1, -1, -1] and rollouts.sample.tolist() == [0, 1, 0, 1, 2, -1, -1]
    assert rollouts.length.tolist() == [1] * 5 + [0] * 2 and not rollouts.sampled[5:].any()
    assert np.isnan(part.groups.reward[5:]).all() and np.isnan(part.groups.components[5:]).all()
    assert not part.groups.keep[5:].any() and part.groups.keep[:5].all() and rollouts.size.tolist() == [2, 3]
    again = join_groups(part.groups, select_groups(whole, np.array([0])).groups)
    assert again.rollouts.prompt.tolist() == [0, 0, 1, 1, 1, 2] and again.failure.tolist() == [2, 1, 0]
    assert again.rollouts.tokens[:, 0].tolist() == [4, 5, 1, 2, 3, 0]


def test_a_group_of_any_size_weighs_as_much_as_another_in_a_mean_over_prompts():
    mask = np.array([[1, 1], [1, 0], [1, 1], [0, 0], [1, 1]], bool)
    weights = token_weights(mask, i32([0, 0, 0, 1, 2]), "prompt", 1)
    np.testing.assert_allclose([weights[:3].sum(), weights[4:].sum()], 0.5, rtol=1e-6)
    # Filler rows are nobody's.
    more = token_weights(np.concatenate([mask, mask[:1] & False]), i32([0, 0, 0, 1, 2, -1]), "prompt", 1)
    np.testing.assert_array_equal(more[:5], weights)
    assert not more[5].any()


def test_a_rows_weight_multiplies_its_loss_terms_and_no_others():
    whole = numbered(2, 2)
    weight = np.array([1, 0.5, 0, 2], np.float32)
    shape = batch_shape("none", equal_groups(2, 2), (1, 1), 0, 1, 1)
    plain, where = fill_batch(whole, shape, PAD)
    scaled, _ = fill_batch(whole._replace(groups=whole.groups.replace(loss_weight=weight)), shape, PAD)
    np.testing.assert_array_equal(scaled.weight[where.row], plain.weight[where.row] * weight[:, None])
    # What a mean divides by stays: half the weight is half the gradient.
    jax.tree.map(np.testing.assert_array_equal, scaled.replace(weight=0), plain.replace(weight=0))


def test_minibatches_have_a_new_order_each_epoch_and_the_same_for_the_same_seed():
    whole, rng = numbered(8, 2), np.random.default_rng(1)

    def order(rng):
        return np.concatenate([numbers(part) for part in minibatches(whole, 4, rng)]).tolist()

    first, second = order(rng), order(rng)
    assert first != second
    assert [first, second] == [order(again := np.random.default_rng(1)), order(again)]


def test_a_single_minibatch_is_the_whole():
    whole = numbered(4, 2)
    (part,) = minibatches(whole, 1, np.random.default_rng(0))
    jax.tree.map(np.testing.assert_array_equal, part, whole)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_every_minibatch_fits_its_shape_whatever_the_sizes(data):
    """A step's rows are at most P * G, a group's at most `most`, also where that is G: then some are smaller all the same."""
    prompts, samples, num = data.draw(st.integers(2, 8)), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    most = data.draw(st.integers(samples, 2 * samples))
    size = np.array(data.draw(st.lists(st.integers(1, most), min_size=prompts, max_size=prompts)))
    while size.sum() > prompts * samples:
        size[size.argmax()] -= 1
    kind = data.draw(st.sampled_from(["none", "plain", "shared_prefix"]))
    whole = resized(numbered(prompts, samples), size, prompts * samples)
    sizes = share(GroupSizes(prompts, prompts * samples, most), num)
    shape = batch_shape(kind, sizes, (1, 1), data.draw(st.integers(0, 9)) and 9, 1, 1)
    for part in minibatches(whole, num, np.random.default_rng(data.draw(st.integers(0, 99)))):
        batch, where = fill_batch(part, shape, PAD)
        assert batch.tokens.shape == (shape.rows, shape.slots)
        assert (where.row >= 0).sum() == len(part.groups.keep)

"""Packing: rows against a brute-force reading, token by token, and enough rows for any lengths."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from setups import Sequences

from jaxrl_llm.types import Batch, check
from jaxrl_llm.update.batch import fill_batch, spread_rows, to_completions, token_weights
from jaxrl_llm.update.packing import BatchShape, GroupSizes, batch_shape, equal_groups, place_sequences

KINDS = ("none", "plain", "shared_prefix")
PAD = 0
EACH = ("segment", "group", "loss_mask", "weight", "behavior_logprobs", "advantage")
few = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@st.composite
def cases(draw):
    """Ragged groups, with some sequences and tokens outside the loss, and the shape of a run that packs them."""
    groups, most, s, c = (draw(st.integers(1, most)) for most in (4, 4, 5, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind, parts, shards = draw(st.sampled_from(KINDS)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    slots = draw(st.one_of(st.just(0), st.integers(s + c, s + c + 12)))
    longest = draw(st.sampled_from(["ragged", "longest", "shortest"]))
    size = rng.integers(1, most + 1, groups) if draw(st.booleans()) else np.full(groups, most)
    rows = int(size.sum())
    prompt_length, length = rng.integers(1, s + 1, groups), rng.integers(1, c + 1, rows)
    if longest != "ragged":
        prompt_length[:], length[:] = (s, c) if longest == "longest" else (1, 1)
    learn = (np.arange(c) < length[:, None]) & (rng.random((rows, c)) < 0.9)
    if draw(st.booleans()):
        learn &= rng.random(rows)[:, None] < 0.7
    shape = batch_shape(kind, GroupSizes(groups, rows, size.max()), (s, c), slots, parts, shards)
    return numbered(np.repeat(prompt_length, size), length, size, learn, (s, c)), shape


def numbered(prompt_length, length, size, learn, sizes) -> Sequences:
    """Completion tokens are numbered uniquely from 1000 on; prompt tokens encode group and position."""
    (s, c), rows = sizes, len(length)
    group = np.arange(rows) // size if np.ndim(size) == 0 else np.repeat(np.arange(len(size)), size)
    own = 1000 + np.arange(rows * c).reshape(rows, c)
    there = np.arange(c) < length[:, None]
    return Sequences(
        prompt=np.where(np.arange(s) < prompt_length[:, None], 1 + group[:, None] * s + np.arange(s), PAD).astype(
            np.int32
        ),
        prompt_length=prompt_length.astype(np.int32),
        tokens=np.where(there, own, PAD).astype(np.int32),
        length=length.astype(np.int32),
        group=group.astype(np.int32),
        loss_mask=learn,
        temperature=(1 + np.arange(rows) / 8).astype(np.float32),
        behavior_logprobs=np.where(there, -own, 0).astype(np.float32),
        advantage=np.where(learn, own / 2, 0).astype(np.float32),
    )


def slots_seen(batch: Batch, row: int, slot: int) -> set[int]:
    return {u for u in range(slot + 1) if slot < batch.until[row, u]}


def check_sequence(batch: Batch, q: Sequences, b: int, weights: np.ndarray) -> set[tuple[int, int]]:
    """Reads sequence b back from where its tokens are found; returns all slots that it takes, its prompt's too."""
    n, m = q.prompt_length[b], q.length[b]
    row, at = (x[0] for x in np.nonzero(batch.tokens == q.tokens[b, 0]))
    # From the first token of the completion back along `before`: the whole prompt.
    prompt = [int(batch.before[row, at])]
    while len(prompt) < n:
        prompt.insert(0, int(batch.before[row, prompt[0]]))
    own = list(range(at, at + m))
    line = prompt + own
    want = np.concatenate([q.prompt[b, :n], q.tokens[b, :m]])
    np.testing.assert_array_equal(batch.tokens[row, line], want)
    np.testing.assert_array_equal(batch.position[row, line], np.arange(n + m))
    np.testing.assert_array_equal(batch.before[row, line], [line[0], *line[:-1]])
    for k, slot in enumerate(line):
        assert slots_seen(batch, row, slot) == set(line[: k + 1])
    assert len(set(batch.segment[row, own])) == 1 and batch.segment[row, at] > 0
    assert (np.isin(np.nonzero(batch.segment[row] == batch.segment[row, at])[0], own)).all()
    assert len(set(batch.group[row, line])) == 1 and batch.group[row, at] > 0
    np.testing.assert_array_equal(batch.loss_mask[row, own], q.loss_mask[b, :m])
    np.testing.assert_array_equal(batch.weight[row, own], weights[b, :m])
    np.testing.assert_array_equal(batch.temperature[row, own], q.temperature[b])
    np.testing.assert_array_equal(batch.behavior_logprobs[row, own], q.behavior_logprobs[b, :m])
    np.testing.assert_array_equal(batch.advantage[row, own], q.advantage[b, :m])
    for name in EACH:
        if name != "group":
            assert not getattr(batch, name)[row, prompt].any(), name
    return {(int(row), slot) for slot in line}


def check_batch(q: Sequences, shape: BatchShape, aggregation: str = "token") -> Batch:
    batch, where = fill_batch(q.experience, shape, PAD, aggregation, 7)
    check(batch)
    assert batch.tokens.shape == (shape.rows, shape.slots)
    weights = token_weights(q.loss_mask, q.group, aggregation, 7)
    kept = np.flatnonzero(q.loss_mask.any(axis=1))
    np.testing.assert_array_equal(np.flatnonzero(where.row >= 0), kept)
    # No token twice: completions once, prompts once per sequence group.
    completions = batch.tokens[batch.tokens >= 1000]
    np.testing.assert_array_equal(np.sort(completions), np.sort(q.tokens[kept][q.tokens[kept] >= 1000]))
    assert (batch.tokens > 0).sum() == q.length[kept].sum() + q.prompt_length[where.first].sum()
    taken = [check_sequence(batch, q, b, weights) for b in kept]
    padding = np.ones(batch.tokens.shape, bool)
    for row, slot in set().union(*taken):
        padding[row, slot] = False
    slot = np.broadcast_to(np.arange(shape.slots), batch.tokens.shape)
    assert (batch.tokens[padding] == PAD).all() and (batch.until[padding] == slot[padding]).all()
    for name in EACH:
        assert not getattr(batch, name)[padding].any(), name
    scores = np.where(batch.tokens >= 1000, batch.tokens, -1).astype(np.float32)
    in_place = np.isin(np.arange(len(q.length)), kept)[:, None] & (q.tokens >= 1000)
    np.testing.assert_array_equal(to_completions(scores, where, q), np.where(in_place, q.tokens, 0))
    check_sharing(q, shape, where)
    return batch


def check_sharing(q: Sequences, shape: BatchShape, where) -> None:
    """A prompt occurs once per row for all of its group there; without sharing each completion has its own."""
    kept = np.flatnonzero(where.row >= 0)
    sequence_groups = {(int(where.row[b]), int(where.prompt[b])) for b in kept}
    assert where.first.sum() == len(sequence_groups)
    if shape.kind == "shared_prefix":
        assert all(
            q.group[b] == q.group[a] for a in kept for b in kept if placed_prompt(where, a) == placed_prompt(where, b)
        )
    else:
        assert len(sequence_groups) == len(kept)
    if shape.kind == "none":
        assert len({row for row, _ in sequence_groups}) == len(kept)


def placed_prompt(where, b: int) -> tuple[int, int]:
    return where.row[b], where.prompt[b]


@few
@given(cases(), st.sampled_from(["token", "sequence", "prompt", "constant"]))
def test_every_token_sees_its_own_prompt_and_its_own_earlier_tokens(case, aggregation):
    check_batch(*case, aggregation)


@few
@given(cases())
def test_the_first_micro_batches_are_filled_first(case):
    """An update's loop ends after the last micro-batch with a row: those before it are full."""
    q, shape = case
    _, where = fill_batch(q.experience, shape, PAD)
    used = {int(row) for row in where.row if row >= 0}
    by_part = [sum(row % shape.num_micro_batches == i for row in used) for i in range(shape.num_micro_batches)]
    each = shape.rows // shape.num_micro_batches
    assert by_part == [min(max(len(used) - i * each, 0), each) for i in range(shape.num_micro_batches)]


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_there_are_rows_enough_whatever_the_lengths(data):
    groups, samples, s, c = (data.draw(st.integers(1, most)) for most in (6, 6, 9, 9))
    size = data.draw(st.lists(st.integers(0, samples), min_size=groups, max_size=groups).filter(any))
    size = np.array(size if data.draw(st.booleans()) else [samples] * groups)
    kind, parts, shards = data.draw(st.sampled_from(KINDS)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    slots = data.draw(st.one_of(st.just(0), st.integers(s + c, 4 * (s + samples * c))))
    shape = batch_shape(kind, GroupSizes(groups, int(size.sum()), int(size.max())), (s, c), slots, parts, shards)
    assert shape.rows % (parts * shards) == 0
    rng, rows = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1))), size.sum()
    # Lengths at both ends are the worst for rows.
    low = data.draw(st.integers(1, c))
    length = np.where(rng.random(rows) < data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])), low, c)
    prompt_length = np.repeat(np.where(rng.random(groups) < 0.3, 1, s), size)
    learn = rng.random(rows) < data.draw(st.sampled_from([0.5, 1.0]))
    where = place_sequences(prompt_length, length, np.repeat(np.arange(groups), size), learn, shape)
    assert (where.row < shape.rows).all() and ((where.row >= 0) == learn).all()
    assert where.end.max(initial=0) <= shape.slots
    assert (where.start + length <= where.end)[learn].all()


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 9), st.integers(1, 9), st.data())
def test_there_are_rows_enough_for_the_worst_sizes(groups, most, s, c, data):
    """Many groups of one size at their longest, and the rest in groups as large as allowed: the worst for first fit."""
    alike = data.draw(st.integers(1, most))
    large = data.draw(st.integers(0, groups))
    size = np.array([most] * large + [alike] * (groups - large))
    slots = data.draw(st.integers(s + c, 3 * (s + most * c)))
    # The shape knows no more than the number of rows and the largest group.
    sizes = GroupSizes(groups, int(size.sum()), most)
    shape = batch_shape("shared_prefix", sizes, (s, c), slots, 1, 1)
    short = data.draw(st.integers(0, c - 1))
    length = np.where(np.arange(size.sum()) % data.draw(st.integers(1, 5)) == 0, c - short, c)
    group = np.repeat(np.arange(groups), size)
    where = place_sequences(np.full(len(group), s), length, group, np.ones(len(group), bool), shape)
    assert (where.row < shape.rows).all() and (where.row >= 0).all()


@pytest.mark.parametrize(
    ("args", "rows", "slots"),
    [
        # Six groups of 24 sequences in all, in rows of 4: 6 sequence groups of one, and 18 / 4 = 4 full ones, at most.
        (("shared_prefix", GroupSizes(6, 24, 8), (3, 5), 0, 1, 1), 10, 23),
        # 6 groups of 4 at 3 + 5 slots.
        (("none", equal_groups(6, 4), (3, 5), 0, 1, 1), 24, 8),
        (("none", equal_groups(6, 4), (3, 5), 99, 5, 1), 25, 8),
        (("plain", equal_groups(6, 4), (3, 5), 0, 1, 1), 24, 8),
        (("plain", equal_groups(6, 4), (3, 5), 17, 1, 1), 12, 17),
        (("plain", equal_groups(6, 4), (3, 5), 33, 1, 4), 8, 33),
        # A whole group: 3 + 4 * 5.
        (("shared_prefix", equal_groups(6, 4), (3, 5), 0, 1, 1), 6, 23),
        (("shared_prefix", equal_groups(6, 4), (3, 5), 0, 2, 2), 8, 23),
        (("shared_prefix", equal_groups(6, 4), (3, 5), 46, 1, 1), 3, 46),
        # Two per sequence group, so two sequence groups per prompt; one per sequence group.
        (("shared_prefix", equal_groups(6, 4), (3, 5), 13, 1, 1), 12, 13),
        (("shared_prefix", equal_groups(6, 4), (3, 5), 8, 1, 1), 24, 8),
    ],
)
def test_shapes_by_hand(args, rows, slots):
    shape = batch_shape(*args)
    assert (shape.rows, shape.slots) == (rows, slots)


@pytest.mark.parametrize("kind", ["plain", "shared_prefix"])
def test_slots_for_less_than_one_sequence_are_refused(kind):
    with pytest.raises(ValueError, match="got 7 slots, want at least the 8 of one sequence"):
        batch_shape(kind, equal_groups(2, 2), (3, 5), 7, 1, 1)


def test_what_does_not_fit_is_refused():
    length, learn = np.array([5, 5]), np.ones(2, bool)
    with pytest.raises(ValueError, match="got a sequence of 8 tokens, want at most the 7 slots of a row"):
        place_sequences(np.array([3, 2]), length, np.arange(2), learn, BatchShape("none", 2, 7, 1))
    for kind in KINDS:
        with pytest.raises(ValueError, match="got 2 rows, want at most 1"):
            place_sequences(np.array([3, 3]), length, np.arange(2), learn, BatchShape(kind, 1, 8, 1))


def test_a_group_that_no_row_holds_is_split_and_each_part_has_the_prompt():
    """Prompt of 3, completions of 4, 2, 4, 1 and 1 in rows of 9: 4 + 2, then 4 + 1 + 1. Of the second prompt, of 2, one counts."""
    length = np.array([4, 2, 4, 1, 1, 3, 1, 1, 1, 1])
    learn = (np.arange(4) < length[:, None]) & (np.arange(10) < 6)[:, None]
    q = numbered(np.array([3] * 5 + [2] * 5), length, 5, learn, (3, 4))
    shape = BatchShape("shared_prefix", 3, 9, 1)
    where = place_sequences(q.prompt_length, length, q.group, learn.any(axis=1), shape)
    np.testing.assert_array_equal(where.row, [0, 0, 1, 1, 1, 2, -1, -1, -1, -1])
    np.testing.assert_array_equal(where.start[:6], [3, 7, 3, 7, 8, 2])
    np.testing.assert_array_equal(where.end[:6], [9, 9, 9, 9, 9, 5])
    np.testing.assert_array_equal(where.segment[:6], [1, 2, 1, 2, 3, 1])
    np.testing.assert_array_equal(where.first, [True, False, True, False, False, True] + [False] * 4)
    batch = check_batch(q, shape)
    np.testing.assert_array_equal(batch.tokens[:2, :3], [[1, 2, 3], [1, 2, 3]])


def test_a_sequence_left_out_of_a_group_leaves_no_room_behind():
    length = np.array([2, 3, 1])
    learn = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 0]], bool)
    q = numbered(np.full(3, 2), length, 3, learn, (2, 3))
    batch = check_batch(q, BatchShape("shared_prefix", 1, 11, 1))
    np.testing.assert_array_equal(batch.tokens[0, :6], [1, 2, 1000, 1001, 1006, PAD])
    np.testing.assert_array_equal(batch.until[0, :6], [5, 5, 4, 4, 5, 5])


def test_nothing_to_learn_from_makes_a_batch_of_padding():
    q = numbered(np.full(4, 2), np.full(4, 3), 2, np.zeros((4, 3), bool), (2, 3))
    for kind in KINDS:
        batch, where = fill_batch(q.experience, batch_shape(kind, equal_groups(2, 2), (2, 3), 0, 2, 1), PAD)
        assert not batch.group.any() and (where.row == -1).all() and not where.first.any()


MUTANTS = {
    "completions see each other": lambda b: b.replace(
        until=np.where(b.segment > 0, b.until.max(axis=1, keepdims=True), b.until)
    ),
    "a completion's first token is scored from the slot before it": lambda b: b.replace(
        before=np.maximum(np.arange(b.tokens.shape[1]) - (b.group > 0), 0)
    ),
    "positions are slots": lambda b: b.replace(position=np.where(b.group > 0, np.arange(b.tokens.shape[1]), 0)),
}


@pytest.mark.parametrize("mutate", MUTANTS.values(), ids=MUTANTS)
def test_mutants_of_a_shared_prompt_are_read_wrong(mutate):
    q = numbered(np.full(2, 2), np.array([2, 2]), 2, np.ones((2, 2), bool), (2, 2))
    batch, _ = fill_batch(q.experience, BatchShape("shared_prefix", 1, 6, 1), PAD)
    weights = token_weights(q.loss_mask, q.group, "token", 1)
    check_sequence(batch, q, 1, weights)
    with pytest.raises(AssertionError):
        for b in range(2):
            check_sequence(mutate(batch), q, b, weights)


@few
@given(cases())
def test_a_batch_made_for_one_micro_batch_is_spread_over_several(case):
    """As if it had been made for them: the same rows at the same places, and empty ones as many."""
    q, whole = case
    one = whole._replace(rows=max(len(q.length), 1), num_micro_batches=1)
    rows = place_sequences(q.prompt_length, q.length, q.group, q.loss_mask.any(axis=1), one).row.max() + 1
    batch, _ = fill_batch(q.experience, one._replace(rows=max(rows, 1)), PAD)
    found = check(spread_rows(batch, whole.num_micro_batches, 2))
    least = -(-max(rows, 1) // (2 * whole.num_micro_batches)) * 2 * whole.num_micro_batches
    want, _ = fill_batch(q.experience, whole._replace(rows=least), PAD)
    for name, x in vars(want).items():
        np.testing.assert_array_equal(getattr(found, name), x, err_msg=name)

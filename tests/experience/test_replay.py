"""The ring: what goes in comes out as it was, only while it is young, and fresh groups come first."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.experience.config import ReplayConfig
from jaxrl_llm.experience.replay import blank_groups, by_group, by_row, empty_ring, exchange, make_replay
from jaxrl_llm.types import Groups, Prompts, Rollouts, check, map_groups, number_rows, select_groups

P, G, S, C = 3, 2, 2, 4


def experience(version: int, first: int, keep=(True, True, True)) -> Groups:
    """Groups first, first + 1, ...: every number in a group encodes the group, the row and the slot."""
    group = np.arange(first, first + P)
    row = np.arange(P * G) + first * G
    token = (row[:, None] * C + np.arange(C)).astype(np.int32)
    sampled = np.arange(C) < 1 + row[:, None] % C
    prompts = Prompts(*(x.astype(np.int32) for x in (group[:, None] * S + np.arange(S), group % S + 1, group, group)))
    rollouts = Rollouts(
        prompts=prompts, prompt=np.repeat(np.arange(P, dtype=np.int32), G), sample=np.tile(np.arange(G, dtype=np.int32), P),
        tokens=token, length=sampled.sum(axis=1).astype(np.int32), sampled=sampled,
        # Third parts have no short binary form: a copy through another dtype would change them.
        behavior_logprobs=np.where(sampled, -token / 3, 0).astype(np.float32), entropy=(token / 7).astype(np.float32),
        temperature=(row / 11).astype(np.float32),
        version=np.where(sampled, version, 0).astype(np.int32), finish=(row % 2).astype(np.int32),
        kept_tokens=np.where(sampled[..., None], token[..., None] + np.arange(3), -1).astype(np.int32),
        eos_masked=sampled & (token % 3 == 0),
    )  # fmt: skip
    groups = Groups(
        rollouts, reward=(row / 13).astype(np.float32), components=(row[:, None] / [17, 19]).astype(np.float32),
        failure=(group % 3).astype(np.int32), failed_by=(group % 5).astype(np.int32), vote=(row + 1).astype(np.int32),
        keep=np.repeat(keep, G),
    )  # fmt: skip
    return check(groups)


def group_of(whole: Groups, place: int) -> list[bytes]:
    return [x.tobytes() for x in jax.tree.leaves(select_groups(whole, np.array([place])))]


def ring(capacity: int):
    return empty_ring(experience(0, 0), capacity)


def step(replay, version, first, keep, max_age=100, seed=0):
    """The ring, the groups to train on, and which of them are kept."""
    replay, out, metrics = exchange(replay, experience(version, first, keep), np.random.default_rng(seed), max_age)
    counts = out.keep.reshape(P, G)
    assert (counts.all(axis=1) == counts.any(axis=1)).all()
    assert metrics == {"groups/replayed": counts[:, 0].sum() - sum(keep)}
    return replay, out, counts[:, 0]


def test_the_identity_form_passes_fresh_groups_through():
    fresh, replay = experience(0, 0, [True, False, True]), make_replay(ReplayConfig(capacity=0))
    state, out, metrics = replay.exchange(replay.init(fresh), fresh, np.random.default_rng(0))
    assert state == () and out is fresh and metrics == {"groups/replayed": 0.0}


def test_a_ring_has_the_shapes_of_the_runs_groups():
    """Columns of such a run: two of five kept tokens, masked end tokens, no raw log-probs."""
    blank = check(blank_groups(P, G, (S, C), 2, ("truncation", "min_new_tokens"), 3))
    of_run = make_replay(ReplayConfig(capacity=4)).init(blank)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert shapes(of_run) == shapes(ring(4))
    assert blank.rollouts.raw_logprobs is None and blank.rollouts.kept_tokens.shape == (P * G, C, 3)


def test_a_row_that_was_dropped_stays_dropped_in_the_ring():
    """A group of which one row is kept is a kept group, and comes back with that row alone."""
    fresh = experience(0, 0)
    fresh = fresh.replace(keep=np.array([True, False, False, False, False, False]))
    replay, _, _ = exchange(ring(4), fresh, np.random.default_rng(0), 100)
    np.testing.assert_array_equal(replay.version, [0, -1, -1, -1])
    _, out, _ = exchange(replay, experience(1, 10, [True, False, True]), np.random.default_rng(0), 100)
    np.testing.assert_array_equal(out.keep, [True, True, True, False, True, True])


def test_rows_and_groups_are_two_views_of_the_same():
    whole = experience(0, 5)
    groups = by_group(whole, G)
    assert groups.rollouts.tokens.shape == (P, G, C) and groups.rollouts.prompts.tokens.shape == (P, S)
    np.testing.assert_array_equal(groups.rollouts.tokens[1], whole.rollouts.tokens[2:4])
    jax.tree.map(np.testing.assert_array_equal, by_row(groups), whole)


def test_with_nothing_to_replace_fresh_groups_pass_unchanged():
    replay, _, _ = step(ring(4), 0, 0, [True, True, True])
    _, out, counts = step(replay, 1, 10, [True, True, True])
    jax.tree.map(np.testing.assert_array_equal, out, experience(1, 10))
    assert counts.all()


def test_an_empty_ring_replaces_nothing():
    replay, out, counts = step(ring(4), 0, 0, [False, True, False])
    np.testing.assert_array_equal(counts, [False, True, False])
    jax.tree.map(np.testing.assert_array_equal, out, experience(0, 0, [False, True, False]))
    np.testing.assert_array_equal(replay.version, [0, -1, -1, -1])


def test_a_dropped_group_gives_its_place_to_an_older_one_bit_for_bit():
    replay, _, _ = step(ring(4), 2, 0, [False, True, False])
    _, out, counts = step(replay, 5, 10, [True, False, True])
    assert counts.all()
    old, fresh = experience(2, 0), experience(5, 10)
    assert group_of(out, 1) == group_of(old, 1)
    assert group_of(out, 0) == group_of(fresh, 0) and group_of(out, 2) == group_of(fresh, 2)
    rollouts = check(out).rollouts
    assert set(rollouts.version[2:4][rollouts.sampled[2:4]]) == {2}
    np.testing.assert_array_equal(rollouts.behavior_logprobs[2:4], old.rollouts.behavior_logprobs[2:4])
    np.testing.assert_array_equal(rollouts.prompts.uid, [10, 1, 12])


def test_the_ring_wraps_and_the_oldest_goes_first():
    replay = ring(4)
    for version, first in ((0, 0), (1, 10)):
        replay, _, _ = step(replay, version, first, [True, True, True])
    # 0 1 2 -, then 10 in the last place and 11, 12 over 0 and 1.
    np.testing.assert_array_equal(replay.groups.rollouts.prompts.uid, [11, 12, 2, 10])
    np.testing.assert_array_equal(replay.version, [1, 1, 0, 1])
    assert replay.next == 2


def test_more_fresh_groups_than_places_leave_the_last():
    replay, _, _ = step(ring(2), 0, 0, [True, True, True])
    np.testing.assert_array_equal(np.sort(replay.groups.rollouts.prompts.uid), [1, 2])


@pytest.mark.parametrize("age, taken", [(1, True), (3, True), (4, False)])
def test_a_group_older_than_max_age_is_not_taken(age, taken):
    replay, _, _ = step(ring(4), 7, 0, [True, False, False])
    _, _, counts = step(replay, 7 + age, 10, [False, False, True], max_age=3)
    assert counts.tolist() == [taken, False, True]


def test_the_ring_that_was_passed_in_is_left_alone():
    before, _, _ = step(ring(4), 0, 0, [True, True, True])
    copy = jax.tree.map(np.copy, before)
    after, _, _ = step(before, 1, 10, [True, False, True])
    jax.tree.map(np.testing.assert_array_equal, before, copy)
    assert after.next != before.next


def test_equal_seeds_take_equal_groups():
    replay = ring(8)
    for version, first in ((0, 0), (1, 10)):
        replay, _, _ = step(replay, version, first, [True, True, True])
    taken = [
        tuple(step(replay, 2, 20, [False, True, False], seed=s)[1].rollouts.prompts.uid.tolist())
        for s in (0, 0, *range(9))
    ]
    assert taken[0] == taken[1] and len(set(taken)) > 1


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.lists(st.booleans(), min_size=P, max_size=P), st.integers(1, 3)), min_size=1, max_size=8
    ),
    capacity=st.integers(1, 7),
    max_age=st.integers(1, 4),
)
def test_every_group_that_counts_is_fresh_or_young_and_remembered(steps, capacity, max_age):
    """Against a list of the kept groups: the last `capacity` of them, those young enough sampled without replacement."""
    replay, kept, version = ring(capacity), [], 0
    for number, (keep, updates) in enumerate(steps):
        fresh = experience(version, first := 100 * number, keep)
        young = {uid: bits for uid, born, bits in kept[-capacity:] if version - born <= max_age}
        replay, out, counts = step(replay, version, first, keep, max_age)
        replayed = []
        for place in range(P):
            bits, uid = group_of(out, place), int(out.rollouts.prompts.uid[place])
            if keep[place] or not counts[place]:
                assert bits == group_of(fresh, place)
            else:
                assert bits == young[uid]
                replayed.append(uid)
        assert len(set(replayed)) == len(replayed) == min(len(young), P - sum(keep))
        assert counts.sum() == sum(keep) + len(replayed)
        kept += [(first + p, version, group_of(fresh, p)) for p in range(P) if keep[p]]
        assert (replay.version >= 0).sum() == min(len(kept), capacity)
        version += updates


B, MOST = 9, 4
"""Rows of a step of groups of any size, and of the largest group."""


def ragged(first: int, size, version: int, keep) -> Groups:
    """Groups first, first + 1, ... of these sizes, and fillers up to B rows."""
    whole = select_groups(experience(version, first), np.arange(P).repeat([3, 3, 3]))
    prompt, sample = number_rows(size)
    rows = np.arange(len(prompt))
    cut = map_groups(whole, lambda x: x[:P], lambda x, fill: x[rows])
    prompts = cut.rollouts.prompts.replace(uid=np.arange(first, first + P, dtype=np.int32))
    rollouts = cut.rollouts.replace(
        prompts=prompts, prompt=prompt, sample=sample, tokens=cut.rollouts.tokens + 1000 * (first + prompt)[:, None]
    )
    of = np.repeat(np.asarray(keep, bool), size)
    return check(select_groups(cut.replace(rollouts=rollouts, keep=of), np.arange(P), B))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_groups_of_any_size_come_back_whole_and_never_exceed_the_steps_rows(data):
    """Against a list. A group that does not fit stays away; none is cut, none is there twice."""
    sizes = st.lists(st.integers(0, MOST), min_size=P, max_size=P).filter(lambda size: 0 < sum(size) <= B)
    blank = select_groups(ragged(0, [MOST, MOST, 1], 0, [True] * P), np.arange(P), B)
    replay, remembered = empty_ring(blank, 5), {}
    for number in range(data.draw(st.integers(1, 6))):
        size, first = np.array(data.draw(sizes)), 100 * number
        keep = np.array(data.draw(st.lists(st.booleans(), min_size=P, max_size=P))) & (size > 0)
        fresh = ragged(first, size, number, keep)
        replay, out, metrics = exchange(replay, fresh, np.random.default_rng(number), 100)
        assert len(out.keep) == B and check(out).rollouts.size.sum() <= B
        uids = out.rollouts.prompts.uid
        assert len(set(uids.tolist())) == P
        old = [place for place in range(P) if uids[place] < first]
        for place in range(P):
            want = remembered[uids[place]] if place in old else group_of(fresh, place)
            assert group_of(out, place) == want and not (place in old and keep[place])
        assert metrics == {"groups/replayed": len(old)}
        remembered |= {first + p: group_of(fresh, p) for p in np.flatnonzero(keep)}
        there = replay.version >= 0
        stored = by_row(jax.tree.map(lambda x, there=there: x[there], replay.groups))
        for place, uid in enumerate(stored.rollouts.prompts.uid):
            assert group_of(stored, place) == remembered[uid]


def test_an_old_group_that_is_larger_than_the_room_left_is_not_taken():
    replay, _, _ = exchange(empty_ring(ragged(0, [4, 4, 1], 0, [True] * 3), 3), ragged(0, [4, 1, 4], 0, [1, 0, 0]),
                            np.random.default_rng(0), 100)  # fmt: skip
    for size, taken in (([1, 4, 4], 0), ([1, 4, 3], 0), ([1, 4, 1], 1), ([4, 4, 1], 1)):
        _, out, _ = exchange(replay, ragged(10, size, 1, [0, 1, 1]), np.random.default_rng(0), 100)
        assert (out.rollouts.prompts.uid[0] == 0) == bool(taken)

"""The replay: what goes in comes out as it was, only while it is young, and fresh groups come first."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.experience.buffer import empty_buffer
from jaxrl_llm.experience.composition import widened
from jaxrl_llm.experience.config import ReplayConfig
from jaxrl_llm.experience.draws import UniformDraw
from jaxrl_llm.experience.packed_groups import Packing
from jaxrl_llm.experience.replay import exchange, make_replay
from jaxrl_llm.types import Groups, Prompts, Rollouts, check, map_groups, number_rows, select_groups

P, G, S, C = 3, 2, 2, 4


def experience(version: int, first: int, keep=(True, True, True)) -> Groups:
    """Groups first, first + 1, ...: every number in a group encodes the group, the row and the slot."""
    group = np.arange(first, first + P)
    row = np.arange(P * G) + first * G
    token = (row[:, None] * C + np.arange(C)).astype(np.int32)
    sampled = np.arange(C) < 1 + row[:, None] % C
    few = sampled[..., None] & (np.arange(3) <= token[..., None] % 3)
    tokens = np.where(np.arange(S) < group[:, None] % S + 1, group[:, None] * S + np.arange(S), 0)
    prompts = Prompts(*(x.astype(np.int32) for x in (tokens, group % S + 1, group, group)))
    rollouts = Rollouts(
        prompts=prompts, prompt=np.repeat(np.arange(P, dtype=np.int32), G), sample=np.tile(np.arange(G, dtype=np.int32), P),
        tokens=np.where(sampled, token, 0).astype(np.int32), length=sampled.sum(axis=1).astype(np.int32), sampled=sampled,
        # Third parts have no short binary form: a copy through another dtype would change them.
        behavior_logprobs=np.where(sampled, -token / 3, 0).astype(np.float32),
        entropy=np.where(sampled, token / 7, 0).astype(np.float32),
        temperature=(row / 11).astype(np.float32),
        version=np.where(sampled, version, 0).astype(np.int32), finish=(row % 2).astype(np.int32),
        # One to three kept tokens of each.
        kept_tokens=np.where(few, token[..., None] + np.arange(3), -1).astype(np.int32),
        control_state=np.where(sampled, token % 3, 0).astype(np.int32),
    )  # fmt: skip
    groups = Groups(
        rollouts, reward=(row / 13).astype(np.float32), components=(row[:, None] / [17, 19]).astype(np.float32),
        failure=(group % 3).astype(np.int32), failed_by=(group % 5).astype(np.int32), vote=(row + 1).astype(np.int32),
        keep=np.repeat(keep, G),
    )  # fmt: skip
    return check(groups)


def group_of(whole: Groups, place: int) -> list[bytes]:
    one = select_groups(whole.replace(reused=None), np.array([place]))
    return [x.tobytes() for x in jax.tree.leaves(one)]


def uids(buffer) -> list[int]:
    """Uids of the groups in the buffer, oldest first: their rows of the task are equal."""
    return buffer.known.row[: len(buffer.stored)].tolist()


def config(capacity: int = 4, max_age: int = 100, **more) -> ReplayConfig:
    return ReplayConfig(capacity=capacity, max_age=max_age, **more)


def step(replay, version, first, keep, seed=0, **cfg):
    """The buffer, the groups to train on, and which of them are kept."""
    cfg = config(len(replay.known.number), **cfg)
    replay, out, metrics = exchange(replay, experience(version, first, keep), np.random.default_rng(seed), None, cfg)
    counts = out.keep.reshape(P, G)
    assert (counts.all(axis=1) == counts.any(axis=1)).all()
    assert metrics["groups/replayed"] == counts[:, 0].sum() - sum(keep)
    assert metrics["replay/groups"] == len(replay.stored) and metrics["replay/mib"] * 2**20 == replay.num_bytes
    return replay, out, counts[:, 0]


def test_the_identity_form_passes_fresh_groups_through():
    fresh, replay = experience(0, 0, [True, False, True]), make_replay(ReplayConfig(capacity=0))
    state, out, metrics = replay.exchange(replay.init(fresh), fresh, np.random.default_rng(0), None)
    assert state == () and out is fresh and metrics == {"groups/replayed": 0.0}


def test_a_row_that_was_dropped_stays_dropped_in_the_ring():
    """A group of which one row is kept is a kept group, and comes back with that row alone."""
    fresh = experience(0, 0)
    fresh = fresh.replace(keep=np.array([True, False, False, False, False, False]))
    replay, _, _ = exchange(empty_buffer(4), fresh, np.random.default_rng(0), None, config())
    assert uids(replay) == [0]
    _, out, _ = exchange(replay, experience(1, 10, [True, False, True]), np.random.default_rng(0), None, config())
    np.testing.assert_array_equal(out.keep, [True, True, True, False, True, True])


def test_with_nothing_to_replace_fresh_groups_pass_unchanged():
    replay, _, _ = step(empty_buffer(4), 0, 0, [True, True, True])
    _, out, counts = step(replay, 1, 10, [True, True, True])
    jax.tree.map(np.testing.assert_array_equal, out, experience(1, 10))
    assert counts.all()


def test_an_empty_ring_replaces_nothing():
    replay, out, counts = step(empty_buffer(4), 0, 0, [False, True, False])
    np.testing.assert_array_equal(counts, [False, True, False])
    jax.tree.map(np.testing.assert_array_equal, out, experience(0, 0, [False, True, False]))
    assert uids(replay) == [1] and replay.known.number.tolist() == [0, -1, -1, -1]


def test_a_dropped_group_gives_its_place_to_an_older_one_bit_for_bit():
    replay, _, _ = step(empty_buffer(4), 2, 0, [False, True, False])
    _, out, counts = step(replay, 5, 10, [True, False, True])
    assert counts.all()
    old, fresh = experience(2, 0), experience(5, 10)
    assert group_of(out, 1) == group_of(old, 1)
    assert group_of(out, 0) == group_of(fresh, 0) and group_of(out, 2) == group_of(fresh, 2)
    rollouts = check(out).rollouts
    assert set(rollouts.version[2:4][rollouts.sampled[2:4]]) == {2}
    np.testing.assert_array_equal(rollouts.behavior_logprobs[2:4], old.rollouts.behavior_logprobs[2:4])
    np.testing.assert_array_equal(rollouts.prompts.uid, [10, 1, 12])


def test_the_oldest_goes_first():
    replay = empty_buffer(4)
    for version, first in ((0, 0), (1, 10)):
        replay, _, _ = step(replay, version, first, [True, True, True])
    assert uids(replay) == [2, 10, 11, 12] and replay.known.version.tolist() == [0, 1, 1, 1]
    assert replay.known.number.tolist() == [2, 3, 4, 5] and replay.next == 6 and set(replay.packed) == {*"2345"}


def test_more_fresh_groups_than_places_leave_the_last():
    replay, _, _ = step(empty_buffer(2), 0, 0, [True, True, True])
    assert uids(replay) == [1, 2]


@pytest.mark.parametrize("age, taken", [(1, True), (3, True), (4, False)])
def test_a_group_older_than_max_age_is_not_taken(age, taken):
    replay, _, _ = step(empty_buffer(4), 7, 0, [True, False, False])
    _, _, counts = step(replay, 7 + age, 10, [False, False, True], max_age=3)
    assert counts.tolist() == [taken, False, True]


def test_the_buffer_that_was_passed_in_is_left_alone():
    before, _, _ = step(empty_buffer(4), 0, 0, [True, True, True])
    copy = jax.tree.map(np.copy, before)
    after, _, _ = step(before, 1, 10, [True, False, True])
    jax.tree.map(np.testing.assert_array_equal, before, copy)
    assert after.next != before.next


def test_equal_seeds_take_equal_groups():
    replay = empty_buffer(8)
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
    replay, kept, version = empty_buffer(capacity), [], 0
    for number, (keep, updates) in enumerate(steps):
        fresh = experience(version, first := 100 * number, keep)
        kept = [one for one in kept if version - one[1] <= max_age]
        young = {uid: bits for uid, _, bits in kept[-capacity:]}
        replay, out, counts = step(replay, version, first, keep, max_age=max_age)
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
        # What is too old has left.
        assert uids(replay) == [uid for uid, born, _ in kept if version - born <= max_age][-capacity:]
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
        prompts=prompts,
        prompt=prompt,
        sample=sample,
        tokens=np.where(cut.rollouts.sampled, cut.rollouts.tokens + 1000 * (first + prompt)[:, None], 0).astype(
            np.int32
        ),
    )
    of = np.repeat(np.asarray(keep, bool), size)
    return check(select_groups(cut.replace(rollouts=rollouts, keep=of), np.arange(P), B))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_groups_of_any_size_come_back_whole_and_never_exceed_the_steps_rows(data):
    """Against a list. A group that does not fit stays away; none is cut, none is there twice."""
    sizes = st.lists(st.integers(0, MOST), min_size=P, max_size=P).filter(lambda size: 0 < sum(size) <= B)
    replay, remembered = empty_buffer(5), {}
    for number in range(data.draw(st.integers(1, 6))):
        size, first = np.array(data.draw(sizes)), 100 * number
        keep = np.array(data.draw(st.lists(st.booleans(), min_size=P, max_size=P))) & (size > 0)
        fresh = ragged(first, size, number, keep)
        replay, out, metrics = exchange(replay, fresh, np.random.default_rng(number), None, config(5))
        assert len(out.keep) == B and check(out).rollouts.size.sum() <= B
        uids = out.rollouts.prompts.uid
        assert len(set(uids.tolist())) == P
        old = [place for place in range(P) if uids[place] < first]
        for place in range(P):
            want = remembered[uids[place]] if place in old else group_of(fresh, place)
            assert group_of(out, place) == want and not (place in old and keep[place])
        assert metrics["groups/replayed"] == len(old)
        remembered |= {first + p: group_of(fresh, p) for p in np.flatnonzero(keep)}
        if len(replay.stored):
            stored = widened(replay.groups(range(len(replay.stored)), Packing(fresh, 0)), fresh, 0)
            for place, uid in enumerate(stored.rollouts.prompts.uid):
                assert group_of(stored, place) == remembered[uid]


def test_an_old_group_that_is_larger_than_the_room_left_is_not_taken():
    first = ragged(0, [4, 1, 4], 0, [1, 0, 0])
    replay, _, _ = exchange(empty_buffer(3), first, np.random.default_rng(0), None, config(3))
    for size, taken in (([1, 4, 4], 0), ([1, 4, 3], 0), ([1, 4, 1], 1), ([4, 4, 1], 1)):
        _, out, _ = exchange(replay, ragged(10, size, 1, [0, 1, 1]), np.random.default_rng(0), None, config(3))
        assert (out.rollouts.prompts.uid[0] == 0) == bool(taken)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.booleans(), min_size=P, max_size=P), min_size=1, max_size=9),
    st.integers(1, 3),
    st.integers(0, 99),
)
def test_no_group_is_used_more_often_than_allowed(steps, most, seed):
    """`max_uses` steps train on a group, the one that sampled it included; it is drawn until then, if there is a place."""
    replay, uses, stored = empty_buffer(9), {}, []
    for version, keep in enumerate(steps):
        replay, out, counts = step(replay, version, first := 10 * version, keep, seed=seed, max_uses=most)
        taken = [int(uid) for uid, counted in zip(out.rollouts.prompts.uid, counts, strict=True) if counted]
        left = [uid for uid in stored if uses[uid] < most]
        assert len([uid for uid in taken if uid < first]) == min(len(left), P - sum(keep))
        for uid in taken:
            uses[uid] = uses.get(uid, 0) + 1
        assert max(uses.values(), default=0) <= most
        stored = [*left, *(first + p for p in range(P) if keep[p])][-9:]
        # What was used for the last time leaves before the next draw.
        assert uids(replay) == stored
        assert replay.known.uses[: len(stored)].tolist() == [uses[uid] for uid in stored]


def test_the_oldest_leave_when_memory_is_short_and_a_group_that_does_not_fit_is_not_stored():
    whole, _, _ = step(empty_buffer(9), 0, 0, [True] * P)
    sizes = [whole.packed[str(n)].nbytes for n in range(P)]
    for bound in range(0, sum(sizes) + 1, 7):
        cfg = config(9, memory_mib=(bound + 0.5) / 2**20)
        replay, _, metrics = exchange(empty_buffer(9), experience(0, 0), np.random.default_rng(0), None, cfg)
        # The newest that fit together.
        want = next(n for n in range(P + 1) if sum(sizes[n:]) <= bound)
        assert uids(replay) == list(range(want, P)) and replay.num_bytes <= bound
        assert metrics["replay/mib"] * 2**20 == replay.num_bytes


def test_a_draw_of_ones_own_sees_what_is_known_of_each_group(monkeypatch):
    """By hand: groups 0, 1, 2 of version 0, and 10 of version 3; rewards of rows 0 to 5 are row / 13."""
    seen = []
    monkeypatch.setattr(UniformDraw, "__call__", lambda self, groups: seen.append(groups) or np.ones(len(groups.age)))
    replay, _, _ = step(empty_buffer(9), 0, 0, [True, True, True])
    replay, _, _ = step(replay, 3, 10, [True, False, True])
    step(replay, 5, 20, [False, True, True])
    first, last = seen
    assert first.age.tolist() == [3, 3, 3] and first.uses.tolist() == [1, 1, 1] and first.row.tolist() == [0, 1, 2]
    np.testing.assert_allclose(first.reward, [0.5 / 13, 2.5 / 13, 4.5 / 13], rtol=1e-6)
    # Entropies are token / 7 at the sampled tokens; row r has 1 + r mod 4 of them, tokens 4 r to 4 r + r mod 4.
    means = [
        np.mean([t / 7 for r in rows for t in range(4 * r, 4 * r + 1 + r % 4)]) for rows in ((0, 1), (2, 3), (4, 5))
    ]
    np.testing.assert_allclose(first.entropy, means, rtol=1e-5)
    assert last.age.tolist() == [5, 5, 5, 2, 2] and sorted(last.uses.tolist()) == [1, 1, 1, 1, 2]
    assert last.size.tolist() == [2] * 5 and first.success.tolist() == [0, 0, 0]

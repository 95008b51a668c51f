"""Stored responses among fresh ones of the same prompt: which join, by each rule, and what becomes of the group."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.experience import joining
from jaxrl_llm.experience.buffer import empty_buffer
from jaxrl_llm.experience.config import JoinConfig, ReplayConfig
from jaxrl_llm.experience.draws import PrioritizedDraw
from jaxrl_llm.experience.joining import StoredRows
from jaxrl_llm.experience.replay import blank_groups, exchange
from jaxrl_llm.objective.credit import estimator_credit
from jaxrl_llm.objective.group_estimators import MeanOnly
from jaxrl_llm.types import Groups, check

P, G, S, C = 2, 3, 2, 4
PAD = 9


def groups_of(version: int, row, reward, first_uid: int = 0, keep=None) -> Groups:
    """Groups of these rows of the task. Every response is one token longer than its sample number, and its tokens name it."""
    reward = np.float32(reward)
    blank = blank_groups(P, G, (S, C), 1, ("truncation",), 3)
    b, uid = np.arange(P * G), first_uid + np.arange(P, dtype=np.int32)
    length = (1 + b % G).astype(np.int32)
    inside = np.arange(C) < length[:, None]
    token = 100 * uid.repeat(G)[:, None] + 10 * (b % G)[:, None] + np.arange(C)
    rollouts = blank.rollouts.replace(
        prompts=blank.rollouts.prompts.replace(
            tokens=np.full((P, S), PAD, np.int32), length=np.ones(P, np.int32), uid=uid, row=np.int32(row)
        ),
        tokens=np.where(inside, token, PAD).astype(np.int32),
        length=length,
        sampled=inside,
        behavior_logprobs=np.where(inside, -token / 3, 0).astype(np.float32),
        entropy=np.where(inside, token / 7, 0).astype(np.float32),
        version=np.where(inside, version, 0).astype(np.int32),
        kept_tokens=np.where(inside[..., None], token[..., None] + [[[0, 1, -1]]], -1).astype(np.int32),
    )
    reward = reward.reshape(-1)
    kept = (reward.reshape(P, G).std(axis=1) > 0).repeat(G) if keep is None else np.repeat(keep, G)
    return check(blank.replace(rollouts=rollouts, reward=reward, components=reward[:, None], keep=kept))


def by_position(groups: Groups) -> np.ndarray:
    """An entropy that no rule could guess from anything else: less for later rows."""
    return -np.arange(len(groups.keep), dtype=float)


def after(stored: list[Groups], fresh: Groups, seed: int = 0, **cfg):
    """What a step trains on, with the metrics of its replay; the stored groups are of the steps before."""
    cfg = ReplayConfig(capacity=20, max_age=100, replace_dropped=False, **cfg)
    buffer, rng = empty_buffer(20), np.random.default_rng(seed)
    for groups in stored:
        buffer, _, _ = exchange(buffer, groups, rng, by_position, ReplayConfig(capacity=20, max_age=100), PAD)
    before = jax.tree.map(np.copy, buffer)
    buffer, out, metrics = exchange(buffer, fresh, rng, by_position, cfg, PAD)
    check(out)
    assert len(out.keep) == P * (G + (0 if not cfg.join or cfg.join.swap else cfg.join.most)) + cfg.groups * G
    # What is stored never changes.
    assert all((buffer.packed[n] == before.packed[n]).all() for n in buffer.packed.keys() & before.packed.keys())
    return out, metrics, buffer


def names(groups: Groups, p: int) -> list[tuple[int, int]]:
    """(uid, sample) of the rows of group p, as their tokens say."""
    first = groups.rollouts.tokens[groups.rollouts.prompt == p, 0]
    return [(int(x) // 100, int(x) // 10 % 10) for x in first]


OLD = [groups_of(0, [7, 8], [[0, 1, 1], [1, 0, 0]]), groups_of(1, [7, 5], [[1, 0, 1], [0, 0, 1]], 10)]
FRESH = groups_of(2, [5, 7], [[0, 0, 1], [0, 1, 0]], 20)


def test_the_newest_join_behind_the_fresh_rows_as_they_were_sampled():
    out, metrics, buffer = after(OLD, FRESH, join=JoinConfig(most=2))
    assert names(out, 0) == [(20, 0), (20, 1), (20, 2), (11, 0), (11, 1)]
    assert names(out, 1) == [(21, 0), (21, 1), (21, 2), (10, 0), (10, 1)]
    assert out.reused.tolist() == 2 * [False, False, False, True, True]
    rollouts, old = out.rollouts, OLD[1].rollouts
    for name in ("tokens", "behavior_logprobs", "entropy", "version", "kept_tokens", "sampled"):
        np.testing.assert_array_equal(getattr(rollouts, name)[8:10], getattr(old, name)[:2])
        np.testing.assert_array_equal(getattr(rollouts, name)[:3], getattr(FRESH.rollouts, name)[:3])
    assert out.reward.tolist() == [0, 0, 1, 0, 0, 0, 1, 0, 1, 0]
    # Each name of a row is there once: records of a step look rows up by uid and sample.
    sample = list(zip(rollouts.prompts.uid[rollouts.prompt].tolist(), rollouts.sample.tolist(), strict=True))
    assert len(set(sample)) == len(sample) and sample[:3] == [(20, 0), (20, 1), (20, 2)]
    assert metrics["replay/rows"] == 4 and metrics["replay/age"] == 1 and metrics["groups/replayed"] == 0
    # Both groups were used twice now, those that stayed away once.
    assert buffer.known.uses[:4].tolist() == [1, 1, 2, 2]


def test_rows_of_another_prompt_never_join_and_places_stay_empty():
    out, metrics, _ = after(OLD, groups_of(2, [1, 8], [[0, 0, 1], [0, 1, 0]], 20), join=JoinConfig(most=2))
    assert names(out, 0) == [(20, 0), (20, 1), (20, 2)] and names(out, 1)[3:] == [(1, 0), (1, 1)]
    assert metrics["replay/rows"] == 2 and out.rollouts.prompt.tolist() == [0] * 3 + [1] * 5 + [-1] * 2
    assert not out.keep[-2:].any() and not out.rollouts.sampled[-2:].any()


def test_responses_to_another_form_of_the_prompt_never_join(monkeypatch):
    """The older stored group of row 7 was asked as now, the newer one otherwise; the only one of row 5 otherwise."""
    other = jax.tree.map(np.copy, OLD[1])
    other.rollouts.prompts.tokens[:, 0] += 1
    for stored, want in ((other, [(0, 0), (0, 1)]), (OLD[1], [(10, 0), (10, 1)])):
        out, _, _ = after([OLD[0], stored], FRESH, join=JoinConfig(most=2))
        assert names(out, 1)[3:] == want and len(names(out, 0)) == 3 + 2 * (stored is OLD[1])
    monkeypatch.setattr(joining, "_is_prompt", lambda *args: True)
    out, _, _ = after([OLD[0], other], FRESH, join=JoinConfig(most=2))
    assert names(out, 1)[3:] == [(10, 0), (10, 1)]


def test_a_group_whose_rewards_are_equal_once_rows_were_swapped_stays_dropped():
    """Rewards 1, 1, 0, dropped by some rule: with the stored 1 in the last place all are 1."""
    for reward, kept in (([1, 1, 0], False), ([1, 0, 0], True)):
        fresh = groups_of(2, [5, 7], [[0, 0, 1], reward], 20, keep=[True, False])
        out, metrics, _ = after(OLD, fresh, join=JoinConfig(right=True, swap=True))
        assert out.keep[3:].tolist() == [kept] * G and metrics["replay/rows"] == 1 + kept


@pytest.mark.parametrize(
    "rule, want",
    [
        (dict(most=9), [(10, 0), (10, 1), (10, 2), (0, 0), (0, 1), (0, 2)]),
        (dict(most=9, right=True), [(10, 0), (10, 2), (0, 1), (0, 2)]),
        # The groups are of versions 1 and 0, the step's of version 2.
        (dict(most=9, max_age=1), [(10, 0), (10, 1), (10, 2)]),
        (dict(most=9, window=4), [(10, 0), (10, 1), (10, 2), (0, 0)]),
        (dict(most=3, choose="highest"), [(10, 0), (10, 2), (0, 1)]),
        (dict(most=2, choose="max_variance"), [(10, 1), (10, 0)]),
        # `by_position`: the later a row, the lower its entropy; the groups are unpacked the newest first.
        (dict(most=2, choose="lowest_entropy"), [(0, 2), (0, 1)]),
        (dict(most=2, choose="lowest_entropy", right=True, window=3), [(0, 1), (10, 2)]),
        (dict(most=2, least=7), []),
    ],
)
def test_each_rule_by_hand(rule, want):
    """Stored of row 7: rewards 1, 0, 1 of the newer group, 0, 1, 1 of the older one."""
    out, _, _ = after(OLD, FRESH, join=JoinConfig(**rule))
    assert names(out, 1)[3:] == want


def test_ar3po_swaps_one_wrong_response_for_a_stored_right_one_where_all_are_wrong():
    fresh = groups_of(2, [5, 7], [[0, 0, 1], [0, 0, 0]], 20)
    rule = JoinConfig(when="all_wrong", right=True, swap=True, most=1)
    out, metrics, buffer = after(OLD, fresh, join=rule)
    assert len(out.keep) == P * G and names(out, 0) == [(20, 0), (20, 1), (20, 2)]
    assert names(out, 1) == [(21, 0), (21, 1), (10, 0)] and out.reward[3:].tolist() == [0, 0, 1]
    # The filter had dropped the group; with the stored row it has a signal, and is trained on.
    assert not fresh.kept[1] and out.keep.all()
    # Yet it is not stored: its own responses are all wrong.
    assert buffer.known.row[:5].tolist() == [7, 8, 7, 5, 5]
    # Nothing right is stored of row 8's successor 6: the group stays dropped.
    out, metrics, _ = after(OLD, groups_of(2, [6, 6], np.zeros((P, G)), 20), join=rule)
    assert metrics["replay/rows"] == 0 and not out.keep.any() and out.reused is None


def test_one_fresh_response_stays_whatever_is_swapped():
    out, _, _ = after(OLD, FRESH, join=JoinConfig(most=9, swap=True))
    assert names(out, 1) == [(21, 0), (10, 0), (10, 1)]


def test_a_dropped_group_whose_rewards_stay_equal_is_not_trained_on():
    fresh = groups_of(2, [5, 7], np.ones((P, G)), 20)
    out, metrics, _ = after(OLD, fresh, join=JoinConfig(right=True))
    assert metrics["replay/rows"] == 0 and not out.keep.any()


def test_the_baseline_is_joint_or_split():
    """Fresh 0, 1, 0 and stored 1, 0: means 2/5, or 1/3 and 1/2."""
    out, _, _ = after(OLD, FRESH, join=JoinConfig(most=2))
    for reused_rows, want in (
        ("joint", [-2 / 5, 3 / 5, -2 / 5, 3 / 5, -2 / 5]),
        ("split", [-1 / 3, 2 / 3, -1 / 3, 1 / 2, -1 / 2]),
    ):
        credit = estimator_credit(MeanOnly(), out, reused_rows=reused_rows)
        np.testing.assert_allclose(credit.advantage[5:, 0], want, rtol=1e-6)


def naive_pick(rule: JoinConfig, reward: list[float], entropy: list[float]) -> set[tuple[float, ...]]:
    """All results that the rule allows, as sorted rewards or entropies."""
    n = min(rule.most, len(reward))
    if rule.choose == "recent":
        return {tuple(sorted(reward[:n]))}
    if rule.choose == "highest":
        return {tuple(sorted(reward)[len(reward) - n :])}
    if rule.choose == "lowest_entropy":
        return {tuple(sorted(entropy)[:n])}
    subsets = [tuple(sorted(reward[i] for i in chosen)) for chosen in itertools.combinations(range(len(reward)), n)]
    if rule.choose == "random":
        return set(subsets)
    best = max(np.var(x) for x in subsets)
    return {x for x in subsets if np.isclose(np.var(x), best, atol=1e-12)}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.sampled_from(["recent", "random", "highest", "max_variance", "lowest_entropy"]),
    st.integers(1, 5),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), min_size=1, max_size=7),
    st.integers(0, 99),
)
def test_each_rule_equals_trying_all_subsets(choose, most, rows, seed):
    rule = JoinConfig(choose=choose, most=most)
    reward, entropy = (np.array(x, float) for x in zip(*rows, strict=True))
    picked = rule.pick(StoredRows(reward, entropy), np.random.default_rng(seed))
    assert len(set(picked.tolist())) == len(picked) == min(most, len(rows))
    by = entropy if choose == "lowest_entropy" else reward
    assert tuple(sorted(by[picked])) in naive_pick(rule, reward.tolist(), entropy.tolist())


def test_random_picks_every_row_equally_often():
    rule, rng = JoinConfig(choose="random", most=2), np.random.default_rng(0)
    rows = StoredRows(np.zeros(5), np.zeros(5))
    counts = np.bincount(np.concatenate([rule.pick(rows, rng) for _ in range(5000)]), minlength=5)
    # Each with chance 2/5 of 5,000: within four deviations of sqrt(5000 * 2/5 * 3/5) = 35.
    assert (abs(counts - 2000) < 139).all()


def test_groups_in_places_of_their_own_and_their_weights():
    """Rewards 0, 1, 1: mean distance 4/9, and 1, 0, 0 too; prioritized draws of all four have weight 1 each with correction 1."""
    old = [groups_of(0, [7, 8], [[0, 1, 1], [0, 9, 0]])]
    out, metrics, _ = after(old, FRESH, groups=2, correction=0.5, draw=PrioritizedDraw(alpha=1.0))
    assert metrics["groups/replayed"] == 2 and len(out.failure) == P + 2
    assert sorted([names(out, 2)[0][0], names(out, 3)[0][0]]) == [0, 1]
    assert out.reused.tolist() == [False] * 6 + [True] * 6
    # Signals 4/9 and 4, a ninth: factors 1 and (1/9)^0.5.
    of_group = {names(out, p)[0][0]: out.loss_weight[out.rollouts.prompt == p] for p in (2, 3)}
    np.testing.assert_allclose(of_group[0], 1)
    np.testing.assert_allclose(of_group[1], 1 / 3, rtol=1e-6)
    np.testing.assert_array_equal(out.loss_weight[:6], 1)


def test_places_stay_empty_while_the_buffer_has_fewer():
    out, metrics, _ = after([], FRESH, groups=2)
    assert metrics["groups/replayed"] == 0 and out.rollouts.size.tolist() == [3, 3, 0, 0] and out.reused is None
    assert out.kept.tolist() == [True, True, False, False]


@pytest.mark.parametrize("least, comes", [(0.0, 2), (0.33, 2), (0.34, 0)])
def test_nothing_comes_back_below_the_wanted_success(least, comes):
    """2 of 6 fresh responses are right."""
    _, metrics, _ = after(OLD, FRESH, groups=2, min_success=least)
    assert metrics["groups/replayed"] == comes


def test_solved_prompts_are_retired():
    fresh = groups_of(2, [7, 5], [[1, 1, 1], [0, 1, 0]], 20, keep=[True, True])
    _, _, buffer = after(OLD, fresh, retire_solved=True)
    # Both groups of row 7 have left, and the new one does not enter.
    assert buffer.known.row[:4].tolist() == [8, 5, 5, -1]

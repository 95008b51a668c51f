"""Trees in one row of a batch: the same scores and gradients as row by row, in fewer slots, and on-policy ratio 1."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from controlled import MODEL, VOCAB, C, P, sampler
from setups import layouts, make_params, make_policy, make_prompts

from jaxrl_llm.distribution.score import Scoring, score_tokens
from jaxrl_llm.parallel import hosts
from jaxrl_llm.rollout.config import EngineConfig, PointTree, SegmentTree
from jaxrl_llm.rollout.tree import whole_paths
from jaxrl_llm.types import Credit, Experience, Rollouts, Scores
from jaxrl_llm.update.batch import fill_batch, to_completions, ungraded
from jaxrl_llm.update.packing import BatchShape, Branching, GroupSizes, batch_shape, branching, place_sequences

KEY = jax.random.key(0)
G = 8
TREES = {
    "points": PointTree(roots=2, branches=2, rounds=2),
    "segments": SegmentTree(tokens=2, width=2, roots=1),
}


@cache
def tree_of(name: str) -> Rollouts:
    train, decode = layouts()
    policy = make_policy(MODEL, make_params(MODEL, train, sharpness=2.0), train, decode)
    form = EngineConfig(decode_chunk=2, eos_interval=1)
    return sampler(engine=form, samples=G, tree=TREES[name]).generate(policy, make_prompts(P), KEY)


def experience_of(tree: Rollouts, keep: np.ndarray | None = None) -> Experience:
    rng = np.random.default_rng(0)
    advantage = np.where(tree.sampled, rng.standard_normal(tree.tokens.shape), 0).astype(np.float32)
    groups = ungraded(tree)
    return Experience(groups if keep is None else groups.replace(keep=keep), Scores(), Credit(advantage))


def shape_of(kind: str, slots: int = 0) -> BatchShape:
    return batch_shape(kind, GroupSizes(P, P * G, G), (7, C), slots, 1, 1)


def gradient(experience: Experience, kind: str, slots: int = 0, sizes=(1, 1, 1)):
    """Log-probs of the completions, the gradient of the weighted sum of advantages times log-probs, and slots in use."""
    train, _ = layouts(sizes)
    batch, where = fill_batch(experience, shape_of(kind, slots), VOCAB.pad)
    used = np.count_nonzero(batch.until > np.arange(batch.until.shape[1]))
    batch = hosts.put(batch, train.sharding(("rows", None)))

    def loss(params):
        logprobs = score_tokens(params, batch, Scoring(MODEL, train, VOCAB.size)).logprobs
        return jnp.sum(jnp.where(batch.loss_mask, logprobs * batch.advantage * batch.weight, 0)), logprobs

    grads, logprobs = jax.jit(jax.grad(loss, has_aux=True))(make_params(MODEL, train, sharpness=2.0))
    return to_completions(np.asarray(logprobs), where, experience.groups.rollouts), jax.device_get(grads), used


def assert_near(got, want) -> None:
    """Sums over the same tokens in another order."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(np.abs(b).max(), 1e-3))


@pytest.mark.parametrize("slots", [0, 40])
@pytest.mark.parametrize("name", TREES)
def test_scores_and_gradients_are_those_of_rows_by_themselves(name, slots):
    """In rows that hold a whole tree, and in rows of 40 slots, between which it is cut."""
    tree = tree_of(name)
    experience = experience_of(tree)
    alone, want, _ = gradient(experience, "none")
    got, grads, used = gradient(experience, "shared_prefix", slots)
    assert_near(grads, want)
    sampled = tree.sampled
    np.testing.assert_allclose(np.where(sampled, got, 0), np.where(sampled, alone, 0), atol=2e-5)
    # On-policy: the ratio of the first update is 1.
    np.testing.assert_allclose(np.where(sampled, got, 0), tree.behavior_logprobs, atol=2e-5)
    if not slots:
        prompts = tree.prompts.length.sum()
        assert used == prompts + sampled.sum() < prompts + tree.length.sum() * 0.9, "shared tokens are not placed again"


def test_rows_that_are_left_out_leave_their_tokens_to_their_branches():
    """Roots and some branches are dropped: what others share with them is placed once all the same."""
    tree = tree_of("points")
    keep = (tree.sample > 1) & (np.random.default_rng(1).random(len(tree.length)) < 0.7)
    experience = experience_of(tree, keep)
    _, want, _ = gradient(experience, "none")
    got, grads, used = gradient(experience, "shared_prefix")
    assert_near(grads, want)
    at = tree.sampled & keep[:, None]
    np.testing.assert_allclose(np.where(at, got, 0), np.where(at, tree.behavior_logprobs, 0), atol=2e-5)
    origin = np.arange(len(tree.length) * C).reshape(-1, C)
    for b in np.argsort(tree.sample, kind="stable"):
        origin[b, : tree.fork[b]] = origin[tree.trunk_rows[b], : tree.fork[b]]
    there = (np.arange(C) < tree.length[:, None]) & keep[:, None]
    assert used == tree.prompts.length[np.unique(tree.prompt[keep])].sum() + len(np.unique(origin[there]))


def test_the_same_on_a_mesh():
    tree = tree_of("points")
    one, mesh = (gradient(experience_of(tree), "shared_prefix", 80, sizes) for sizes in ((1, 1, 1), (2, 2, 2)))
    assert_near(mesh[1], one[1])


def test_a_tree_by_hand():
    """Prompt of 2, trunk a of 5; b leaves it behind 4, c behind 2, and d leaves c behind 3; e is another root."""
    group, trunk, fork = np.zeros(5, int), np.array([0, 0, 0, 2, 4]), np.array([0, 4, 2, 3, 0])
    tree = branching(group, trunk, fork)
    assert tree.order.tolist() == [0, 1, 2, 3, 4] and tree.shared.tolist() == [0, 4, 2, 3, 0]
    length = np.array([5, 6, 4, 5, 2])
    where = place_sequences(np.full(5, 2), length, group, np.ones(5, bool), BatchShape("shared_prefix", 1, 20, 1), tree)
    assert (
        where.start.tolist() == [2, 7, 9, 11, 13]
        and where.shared.tolist() == [0, 4, 2, 3, 0]
        and set(where.end) == {15}
    )
    # Without a, b has what both share with it; without b too, c has.
    for used, shared in (("01111", [0, 2, 3, 0]), ("00111", [0, 3, 0]), ("01011", [0, 2, 0])):
        use = np.array(list(used)) == "1"
        where = place_sequences(np.full(5, 2), length, group, use, BatchShape("shared_prefix", 1, 20, 1), tree)
        assert where.shared[use].tolist() == shared


def test_branches_lie_behind_what_shares_most():
    tree = branching(np.array([0, 0, 0, 1, 1]), np.array([0, 0, 0, 3, 3]), np.array([0, 1, 4, 0, 2]))
    assert tree.order.tolist() == [0, 2, 1, 3, 4]


def broken(experience: Experience, mutate, monkeypatch) -> None:
    mutate(monkeypatch)
    _, want, _ = gradient(experience, "none")
    _, got, _ = gradient(experience, "shared_prefix")
    assert_near(got, want)


def in_order_of_rows(monkeypatch):
    """Branches in the order in which they were sampled: a key's queries are then no run of slots."""
    found = branching
    monkeypatch.setattr(
        "jaxrl_llm.update.batch.branching",
        lambda *args: Branching(np.arange(len(args[0])), found(*args).shared),
    )


@pytest.mark.parametrize("mutate", [in_order_of_rows])
def test_mutants_of_the_placement(mutate, monkeypatch):
    with pytest.raises((AssertionError, IndexError)):
        broken(experience_of(tree_of("points")), mutate, monkeypatch)


def test_tokens_that_are_trained_twice_change_the_gradient():
    """A mutant: every row trains its whole path."""
    tree = tree_of("points")
    paths = whole_paths(tree)
    experience = experience_of(paths)
    once = np.where(tree.sampled, experience.credit.advantage, 0)
    _, want, _ = gradient(Experience(ungraded(tree), Scores(), Credit(once)), "shared_prefix")
    _, got, _ = gradient(experience, "none")
    with pytest.raises(AssertionError):
        assert_near(got, want)

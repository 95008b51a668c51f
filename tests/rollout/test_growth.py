"""Growth of trees: where rows are left, how many rows each prompt has in the end, and that they are the engine's branches."""

import jax
import numpy as np
import pytest
from controlled import CONTROLS, C, P, sampler
from setups import make_prompts
from test_tree import CHUNKS, policy_of
from tree_rows import rollouts_of

from jaxrl_llm.errors import UserError
from jaxrl_llm.metrics.timers import CompileCounter
from jaxrl_llm.rollout.config import PointTree, SegmentTree
from jaxrl_llm.rollout.growth import branches_at, token_scores
from jaxrl_llm.rollout.tree import Branches, root_rows, whole_paths, with_trunks
from jaxrl_llm.types import Rollouts, check

KEY = jax.random.key(0)
TREES = {
    "points": PointTree(roots=2, branches=2, by="random"),
    "points, two rounds": PointTree(roots=1, branches=3, rounds=2, by="surprisal"),
    "segments": SegmentTree(tokens=3, width=2, roots=1),
    "segments of one token": SegmentTree(tokens=1, width=4, roots=2),
}


def tree_of(name: str, samples: int = 8, sizes=(1, 1, 1), **more) -> Rollouts:
    engine = sampler(sizes, engine=CHUNKS, samples=samples, tree=TREES[name], **more)
    return engine.generate(policy_of(sizes=sizes), make_prompts(P), KEY)


FAST = ("points", "segments of one token")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.soak) for n in TREES])
def test_a_tree_has_as_many_whole_rows_as_were_asked_for(name):
    tree = check(tree_of(name))
    assert (tree.size == 8).all() and (np.diff(tree.prompt) >= 0).all()
    np.testing.assert_array_equal(tree.sample, np.tile(np.arange(8), P))
    trunk, paths = tree.trunk_rows, whole_paths(tree)
    inside = np.arange(C) < tree.length[:, None]
    np.testing.assert_array_equal(paths.sampled, inside)
    shared = np.arange(C) < tree.fork[:, None]
    np.testing.assert_array_equal(np.where(shared, tree.tokens, 0), np.where(shared, tree.tokens[trunk], 0))
    # Each token was sampled once, and the roots are the first rows.
    assert not (tree.sampled & shared).any() and tree.sampled.any(axis=1).all()
    assert (tree.fork[tree.sample < TREES[name].roots] == 0).all()
    assert (tree.fork > 0).sum() > 2 * P, "hardly a row left another"


def test_nothing_compiles_after_warm_up():
    engine = sampler(engine=CHUNKS, samples=6, tree=PointTree(roots=2, rounds=2))
    engine.warm(policy_of(), P)
    policy, counter = policy_of(), CompileCounter()
    for seed in range(3):
        engine.generate(policy, make_prompts(P, seed=seed), jax.random.key(seed))
    assert counter.take()["compiles"] == 0


def test_the_same_tree_on_a_mesh():
    one, mesh = (tree_of("points, two rounds", sizes=sizes) for sizes in ((1, 1, 1), (2, 2, 2)))
    for name in ("tokens", "length", "trunk", "fork", "finish"):
        np.testing.assert_array_equal(getattr(one, name), getattr(mesh, name), err_msg=name)


def test_rows_are_left_where_entropy_is_largest_by_hand():
    """Two roots: two points, one in each tree, and two rows at each; not at the first token, which has the largest entropy."""
    roots = rollouts_of([[9, 1, 3, 2], [9, 8, 7, 6]])
    found = branches_at(roots, token_scores("entropy", roots, []), np.array([4]), 2)
    assert sorted(zip(found.row.tolist(), found.fork.tolist(), strict=True)) == [(0, 2), (0, 2), (1, 1), (1, 1)]
    # Surprisal, twice the entropy read backwards here, is another number: a mutant that takes one for the other fails.
    found = branches_at(roots, token_scores("surprisal", roots, []), np.array([2]), 1)
    assert sorted(zip(found.row.tolist(), found.fork.tolist(), strict=True)) == [(0, 3), (1, 3)]


def test_later_rounds_leave_branches_too_but_not_where_they_left_their_trunk():
    tree = rollouts_of([[0, 1, 2, 1], [0, 0, 9, 4]], fork=[0, 2], trunk=[0, 0])
    found = branches_at(tree, token_scores("entropy", tree, []), np.array([2]), 1)
    assert sorted(zip(found.row.tolist(), found.fork.tolist(), strict=True)) == [(0, 2), (1, 3)]
    assert set(root_rows(tree)) == {0}


def test_short_rows_leave_further_roots():
    """Rows of one token cannot be left behind it: what is missing begins at the prompt."""
    roots = with_trunks(rollouts_of([[1.0], [2.0]]))
    found = branches_at(roots, token_scores("entropy", roots, []), np.array([3]), 2)
    assert found.fork.tolist() == [0, 0, 0] and set(found.row.tolist()) == {0}


def test_what_no_tree_can_be():
    with pytest.raises(UserError, match=r"tree\.roots: got 2, want less than samples"):
        sampler(samples=2, tree=PointTree(roots=2))
    engine, policy = sampler(engine=CHUNKS, samples=8, tree=TREES["points"]), policy_of()
    with pytest.raises(UserError, match="tree: got none, want an engine with a tree"):
        sampler().tree_sampler(policy, KEY).grow(make_prompts(P))
    for samples in (0, np.zeros(P, int)):
        with pytest.raises(ValueError, match=r"samples: got .*, want a whole number from 1"):
            engine.tree_sampler(policy, KEY).grow(make_prompts(P), samples=samples)
    with pytest.raises(ValueError, match="controls: got 16, want one for each of the 8 prompts"):
        engine.tree_sampler(policy, KEY).grow(make_prompts(P), engine.controls(2 * P))
    with pytest.raises(ValueError, match=r"known\.trunk: got rows that leave others, want independent ones"):
        engine.reuse(policy, engine.generate(policy, make_prompts(P), KEY), KEY)


def test_prompts_with_different_numbers_of_rows():
    """As a budget gives them: at least one root each, and the same share of roots."""
    engine = sampler(engine=CHUNKS, samples=8, tree=TREES["points"])
    samples = np.array([1, 2, 3, 4, 8, 12, 16, 5])
    tree = engine.tree_sampler(policy_of(), KEY).grow(make_prompts(P), samples=samples)
    assert tree.size.tolist() == samples.tolist()
    roots = np.bincount(tree.prompt[tree.trunk == tree.sample], minlength=P)
    assert roots.tolist() == [1, 1, 1, 1, 2, 3, 4, 1]


def own_score(rollouts: Rollouts) -> np.ndarray:
    """Rows are left at slot 2."""
    return np.broadcast_to(np.arange(rollouts.tokens.shape[1]) == 2, rollouts.tokens.shape).astype(np.float32)


def one_per_row(rollouts: Rollouts) -> np.ndarray:
    return np.zeros(len(rollouts.length))


def test_a_function_of_your_own():
    roots = rollouts_of([[9, 1, 3, 2]])
    found = branches_at(roots, token_scores(f"{__name__}:own_score", roots, []), np.array([1]), 1)
    assert found.fork.tolist() == [2]
    with pytest.raises(
        UserError, match=r"rollout.tree.by .*one_per_row: got float64\[1\], want a finite number per token"
    ):
        token_scores(f"{__name__}:one_per_row", roots, [])
    with pytest.raises(UserError, match=r"Perhaps you meant .entropy."):
        token_scores("entropi", roots, [])


def test_segments_under_a_control_are_refused():
    """Its rows would end with their segments."""
    engine = sampler(control=CONTROLS["regex"], tree=SegmentTree(tokens=4), samples=4)
    with pytest.raises(UserError, match=r"tree.kind: got segments under a control, want points"):
        engine.generate(policy_of(), make_prompts(P), KEY)


def test_a_row_that_shares_nothing_is_a_root():
    engine, policy = sampler(engine=CHUNKS, samples=2), policy_of()
    chains = engine.generate(policy, make_prompts(P), KEY)
    tree = engine.branch(policy, chains, Branches(np.array([0, 0]), np.array([0, 1])), KEY)
    assert tree.trunk[:4].tolist() == [0, 1, 2, 0] and tree.fork[:4].tolist() == [0, 0, 0, 1]
    # Its noise is that of its sample number.
    more = sampler(engine=CHUNKS, samples=3).generate(policy, make_prompts(P), KEY)
    np.testing.assert_array_equal(tree.tokens[2], more.tokens[2])


def test_points_that_do_not_come_out_even_go_where_scores_are_largest():
    """Three points over two roots: one in each tree, and the third in that of the second, whose scores are larger."""
    rollouts = with_trunks(rollouts_of([[0, 0, 8], [0, 0, 8]]))
    score = np.where(np.arange(rollouts.tokens.shape[1]) < 0, 0, np.arange(2)[:, None] + 1.0) + np.zeros(
        rollouts.tokens.shape
    )
    found = branches_at(rollouts, score, np.array([3]), 1)
    assert sorted(found.row.tolist()) == [0, 1, 1]

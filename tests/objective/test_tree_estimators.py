"""Advantages from subtrees: by hand, and against a count over the leaves of every single token."""

import numpy as np
import pytest
from setups import make_prompts

from jaxrl_llm.errors import UserError
from jaxrl_llm.objective.group_estimators import BestWorst, MaxRl, Opo, PassAtK
from jaxrl_llm.objective.tree_estimators import Spo, TreePo, TreeRl, TreeRpo
from jaxrl_llm.objective.tree_nodes import nodes_of
from jaxrl_llm.types import Groups, Rollouts

C = 6


def groups_of(reward, trunk, fork, length, prompts: int = 1) -> Groups:
    """Equally many rows of each prompt; own tokens sampled."""
    rows, slot = len(reward), np.arange(C)
    fork, length = np.array(fork, np.int32), np.array(length, np.int32)
    prompt = np.repeat(np.arange(prompts, dtype=np.int32), rows // prompts)
    sampled = (slot >= fork[:, None]) & (slot < length[:, None])
    zeros = np.zeros((rows, C), np.float32)
    every = make_prompts(8)
    rollouts = Rollouts(
        prompts=every.replace(**{name: getattr(every, name)[:prompts] for name in ("tokens", "length", "uid", "row")}),
        prompt=prompt,
        sample=np.tile(np.arange(rows // prompts, dtype=np.int32), prompts),
        tokens=np.ones((rows, C), np.int32),
        length=length,
        sampled=sampled,
        behavior_logprobs=zeros,
        entropy=zeros,
        temperature=np.ones(rows, np.float32),
        version=np.zeros((rows, C), np.int32),
        finish=np.zeros(rows, np.int32),
        trunk=np.array(trunk, np.int32),
        fork=fork,
    )
    reward = np.array(reward, np.float32)
    none = np.zeros(prompts, np.int32)
    return Groups(rollouts, reward, reward[:, None], none, none - 1, np.zeros(rows, np.int32), np.ones(rows, bool))


# Row 0 is the trunk, of 6 tokens; row 1 leaves it behind 2, row 2 behind 4; row 3 is another root; row 4 leaves row 1 behind 4.
#   tokens 0, 1 of row 0: leaves 0, 1, 2, 4;  2, 3: leaves 0, 2;  4, 5: leaf 0.
#   tokens 2, 3 of row 1: leaves 1, 4;  4, 5: leaf 1.  4, 5 of row 2: leaf 2.  All of row 3: leaf 3.  4, 5 of row 4: leaf 4.
TREE = {"trunk": [0, 0, 0, 3, 1], "fork": [0, 2, 4, 0, 4], "length": [6, 6, 6, 6, 6]}
REWARD = [1, 0, 0, 1, 1]


def rows(*numbers):
    """One number for each two tokens, 0 where a row sampled nothing."""
    return np.repeat(np.array(numbers, np.float32), 2, axis=1)


def test_nodes_by_hand():
    nodes = nodes_of(*(np.array(TREE[name]) for name in ("trunk", "fork", "length")))
    found = [
        (row, start, end, parent, np.flatnonzero(leaves).tolist())
        for row, start, end, parent, leaves in zip(*nodes, strict=True)
    ]
    assert found == [
        (0, 0, 2, -1, [0, 1, 2, 4]), (0, 2, 4, 0, [0, 2]), (0, 4, 6, 1, [0]), (1, 2, 4, 0, [1, 4]), (1, 4, 6, 3, [1]),
        (2, 4, 6, 1, [2]), (3, 0, 6, -1, [3]), (4, 4, 6, 3, [4]),
    ]  # fmt: skip


def test_spo_by_hand():
    """V: 1/2 of tokens 0 and 1, 1/2 of 2 and 3, 3/5 of the prompt."""
    want = rows([-0.1, 0, 0.5], [0, 0, -0.5], [0, 0, -0.5], [0.4, 0.4, 0.4], [0, 0, 0.5])
    np.testing.assert_allclose(Spo()(groups_of(REWARD, **TREE)).advantage, want, atol=1e-6)


def test_tree_rl_by_hand():
    """r - mean of the others: 1/2 for right leaves, -3/4 for wrong ones; V of both 1/2 and -3/4: -1/8."""
    v, root = -0.125, [(0.5 * 2 - 0.75 * 2) / 4]
    want = rows([2 * root[0], v, 0.5 + 0.5 - v], [0, v, -0.75 * 2 - v], [0, 0, -0.75 * 2 - v], [1, 1, 1], [0, 0, 1 - v])
    np.testing.assert_allclose(TreeRl(reweight=False)(groups_of(REWARD, **TREE)).advantage, want, atol=1e-6)
    leaves = rows([4, 2, 1], [1, 2, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1])
    np.testing.assert_allclose(TreeRl()(groups_of(REWARD, **TREE)).advantage, want / np.sqrt(leaves), atol=1e-6)


def test_tree_po_by_hand():
    """Row 0: 0.4 from the prompt's mean, 0.5 from that of tokens 0, 1, and 0.5 from that of 2, 3: 1.4 / 3."""
    right, wrong, alone = 1.4 / 3, -1.6 / 3, 0.4
    both = (right + wrong) / 2
    want = rows([both, both, right], [0, both, wrong], [0, 0, wrong], [alone] * 3, [0, 0, right])
    np.testing.assert_allclose(TreePo(whiten=False)(groups_of(REWARD, **TREE)).advantage, want, atol=1e-6)
    groups = groups_of(REWARD, **TREE)
    mask, whitened = groups.rollouts.sampled, TreePo()(groups).advantage
    assert abs(whitened[mask].mean()) < 1e-6 and abs(whitened[mask].std(ddof=1) - 1) < 1e-3


def test_tree_rpo_by_hand():
    """Beside each other: the two roots, V 1/2 and 1; 2, 3 of row 0 and of row 1, equal; the last tokens of each pair."""
    a = 1 / np.sqrt(2)
    want = rows([-a, 0, a], [0, 0, -a], [0, 0, -a], [a, a, a], [0, 0, a])
    np.testing.assert_allclose(TreeRpo(eps=0)(groups_of(REWARD, **TREE)).advantage, want, atol=1e-6)
    np.testing.assert_allclose(
        TreeRpo(eps=0, std="population")(groups_of(REWARD, **TREE)).advantage, want * np.sqrt(2), atol=1e-6
    )


def random_tree(rng, num: int):
    trunk, fork, length = [0], [0], [int(rng.integers(1, C + 1))]
    for b in range(1, num):
        t = int(rng.integers(0, b + 1))
        at = int(rng.integers(fork[t], length[t])) if t < b else 0
        # As the engine has it: a row leaves the one that sampled the token before.
        while t < b and trunk[t] != t and at <= fork[t]:
            t = trunk[t]
        trunk.append(t)
        fork.append(at)
        length.append(int(rng.integers(at + 1, C + 1)))
    return trunk, fork, length


@pytest.mark.parametrize("seed", range(5))
def test_values_of_random_trees_are_means_over_the_leaves_of_each_token(seed):
    rng = np.random.default_rng(seed)
    trunk, fork, length = random_tree(rng, 9)
    reward = rng.normal(size=9)
    origin = np.arange(9 * C).reshape(9, C)
    for b in range(9):
        origin[b, : fork[b]] = origin[trunk[b], : fork[b]]
    inside = np.arange(C) < np.array(length)[:, None]
    value = {o: reward[[b for b in range(9) if o in origin[b][inside[b]]]].mean() for o in np.unique(origin[inside])}
    advantage = Spo()(groups_of(reward, trunk, fork, length)).advantage
    for b in range(9):
        for slot in range(fork[b], length[b]):
            path = [value[o] for o in origin[b, : slot + 1]]
            leaves = [sum(o in origin[r][inside[r]] for r in range(9)) for o in origin[b, : slot + 1]]
            # The parent is the last token before with other leaves.
            before = [v for v, n in zip(path, leaves, strict=True) if n != leaves[-1]]
            np.testing.assert_allclose(
                advantage[b, slot], path[-1] - (before[-1] if before else reward.mean()), atol=1e-6
            )


@pytest.mark.parametrize("estimator", [Spo(), TreeRl(), TreePo(whiten=False), TreeRpo()], ids=repr)
def test_equal_rewards_teach_nothing_and_prompts_are_apart(estimator):
    assert not estimator(groups_of([0.7] * 5, **TREE)).advantage.any()
    one = estimator(groups_of(REWARD, **TREE)).advantage
    twice = {name: values * 2 for name, values in TREE.items()}
    np.testing.assert_array_equal(estimator(groups_of(REWARD * 2, **twice, prompts=2)).advantage, np.tile(one, (2, 1)))
    rng = np.random.default_rng(0)
    for _ in range(20):
        trunk, fork, length = random_tree(rng, 7)
        groups = groups_of(rng.normal(size=7) * 10, trunk, fork, length)
        assert np.isfinite(estimator(groups).advantage).all()


@pytest.mark.parametrize("estimator", [PassAtK(), MaxRl(), Opo(), BestWorst()], ids=lambda x: x.kind)
def test_what_needs_independent_rows_refuses_trees(estimator):
    groups = groups_of([1, 0, 0, 1], [0, 0, 2, 2], [0, 1, 0, 2], [3, 2, 4, 6])
    with pytest.raises(UserError, match=f"{estimator.kind}: got trees, want independent responses"):
        estimator(groups)
    estimator(groups.replace(rollouts=groups.rollouts.replace(trunk=groups.rollouts.sample)))


def test_without_a_tree_rows_are_compared_as_wholes():
    groups = groups_of([1, 0, 0, 1], [0, 1, 2, 3], [0] * 4, [3, 2, 4, 6])
    groups = groups.replace(rollouts=groups.rollouts.replace(trunk=None, fork=None))
    np.testing.assert_allclose(
        Spo()(groups).advantage, np.where(groups.rollouts.sampled, [[0.5], [-0.5], [-0.5], [0.5]], 0)
    )

"""Metrics of trees by hand, and that rewards of branches enter no estimate of the policy."""

import dataclasses

import numpy as np
import pytest
from tree_rows import rollouts_of

from jaxrl_llm.experience.independent_rows import independent, independent_rows
from jaxrl_llm.roles.tree_metrics import describe_trees
from jaxrl_llm.types import check
from jaxrl_llm.update.batch import ungraded


def tree():
    """Two roots of 4 tokens; row 2 leaves row 0 behind 1 token, row 3 leaves row 2 behind 3."""
    entropy = [[1, 2, 3, 4], [0, 0, 0, 0], [0, 0.5, 0, 0], [0, 0, 0, 0.7]]
    return rollouts_of(entropy, fork=[0, 0, 1, 3], trunk=[0, 1, 0, 2])


def test_metrics_by_hand():
    assert describe_trees(tree()) == pytest.approx(
        {
            # 16 tokens of responses, of which 4 + 4 + 3 + 1 were sampled.
            "tree/sharing": 16 / 12,
            "tree/tokens_per_leaf": 3,
            "tree/roots": 2,
            "tree/branches": 2,
            "tree/fork": 2,
            "tree/depth": 3 / 4,
            "tree/branch_entropy": 0.6,
        }
    )
    roots = rollouts_of(np.ones((2, 4)))
    assert describe_trees(roots) == {"tree/sharing": 1, "tree/tokens_per_leaf": 4, "tree/roots": 2, "tree/branches": 0}


def test_only_roots_say_how_well_the_policy_does():
    """Also a row that was added because nothing could be left shares nothing, and is none."""
    rollouts = tree()
    added = dataclasses.replace(rollouts, fork=np.array([0, 0, 1, 0], np.int32), trunk=np.array([0, 1, 0, 0], np.int32))
    for each in (rollouts, added):
        groups = ungraded(each)
        assert independent(groups).tolist() == [True, True, False, False]
        assert check(independent_rows(groups)).rollouts.sample.tolist() == [0, 1]

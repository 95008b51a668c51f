"""Metrics of trees of rollouts."""

import numpy as np

from jaxrl_llm.types import Rollouts


def describe_trees(rollouts: Rollouts) -> dict[str, float]:
    """Metrics of rollouts with trunks; a mean over nothing is absent.

    tree/sharing: tokens of all responses per sampled token, 1 without a tree. tree/tokens_per_leaf: sampled tokens per response.
    tree/roots, tree/branches: independent responses and others, per prompt. tree/fork: tokens that a branch shares, and tree/depth:
    branches between the prompt and a response. tree/branch_entropy: of the distributions at which rows were left, nats.
    """
    own = np.flatnonzero(rollouts.prompt >= 0)
    left = own[(rollouts.trunk != rollouts.sample)[own]]
    sampled, prompts = rollouts.sampled[own].sum(), len(np.unique(rollouts.prompt[own]))
    found = {
        "tree/sharing": rollouts.length[own].sum() / max(sampled, 1),
        "tree/tokens_per_leaf": sampled / len(own),
        "tree/roots": (len(own) - len(left)) / prompts,
        "tree/branches": len(left) / prompts,
    }
    if len(left):
        trunk, row, depth = rollouts.trunk_rows, own, np.zeros(len(own))
        while (more := trunk[row] != row).any():
            row, depth = trunk[row], depth + more
        found |= {
            "tree/fork": rollouts.fork[left].mean(),
            "tree/depth": depth.mean(),
            "tree/branch_entropy": rollouts.entropy[left, rollouts.fork[left]].mean(),
        }
    return found

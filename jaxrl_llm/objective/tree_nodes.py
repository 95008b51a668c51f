"""Nodes of trees of responses: runs of tokens that the same responses have, and what their rewards say of them."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxrl_llm.objective.statistics import Rows

ROOT = -1
"""Parent of the nodes that begin at the prompt."""


class Tree(NamedTuple):
    """Which of the rows left which. Rows are whole responses: leaves."""

    trunk: Int[np.ndarray, " B"]
    """Row that each row left, itself if it left none."""
    fork: Int[np.ndarray, " B"]
    """Tokens that it has in common with its trunk."""


class Nodes(NamedTuple):
    """Nodes of the tree of one prompt, n of them, of m leaves. A node is a run of tokens of the row that sampled them, between two
    tokens at which rows leave it; all tokens of a node have the same leaves behind them."""

    row: Int[np.ndarray, " n"]
    """Row that sampled its tokens, of the prompt's m."""
    start: Int[np.ndarray, " n"]
    end: Int[np.ndarray, " n"]
    """Slots start to end - 1 of that row."""
    parent: Int[np.ndarray, " n"]
    """Node before it; -1: the prompt."""
    leaves: Bool[np.ndarray, "n m"]
    """Rows that have its tokens."""

    def values(self, reward: Rows) -> Float[np.ndarray, " n"]:
        """Return the mean over the leaves of each node of one number per leaf. Equal numbers give exactly that number."""
        return np.array([mean(reward[leaves]) for leaves in self.leaves])

    def of_parent(self, value: Float[np.ndarray, " n"], root: float) -> Float[np.ndarray, " n"]:
        """Return each node's parent's number; `root`: that of the prompt."""
        return np.where(self.parent == ROOT, root, value[self.parent])


def mean(x: Rows) -> float:
    """Return the mean, in any order of the numbers to the same bit; of equal numbers exactly that number."""
    least = float(x.min())
    return least + math.fsum(x - least) / len(x)


def nodes_of(trunk: Int[np.ndarray, " m"], fork: Int[np.ndarray, " m"], length: Int[np.ndarray, " m"]) -> Nodes:
    """Return the nodes of one prompt's tree; a parent comes before its children.

    Args:
        trunk: row that each row left, itself if it left none; before the row itself.
        fork: tokens that it has in common with its trunk.
        length: tokens of each row.
    """
    rows = len(trunk)
    below = np.eye(rows, dtype=bool)
    for b in range(rows - 1, -1, -1):
        if trunk[b] != b:
            below[trunk[b]] |= below[b]
    found, of_row = [], []
    for b in range(rows):
        left = np.flatnonzero((trunk == b) & (np.arange(rows) != b))
        cuts = np.unique([fork[b], *fork[left], length[b]])
        parent = _ending_at(found, of_row[trunk[b]], fork[b]) if trunk[b] != b else ROOT
        own = []
        for start, end in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
            behind = below[left[fork[left] >= end]].any(axis=0)
            behind[b] = True
            own.append(len(found))
            found.append((b, start, end, parent, behind))
            parent = own[-1]
        of_row.append(own)
    row, start, end, parent = (np.array([node[i] for node in found], int) for i in range(4))
    return Nodes(row, start, end, parent, np.array([node[4] for node in found], bool).reshape(len(found), rows))


def _ending_at(found: list[tuple], own: list[int], slot: int) -> int:
    """Return the node among `own` that ends at a slot; the prompt if it is 0."""
    return next((node for node in own if found[node][2] == slot), ROOT)

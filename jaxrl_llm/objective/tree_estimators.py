"""Estimators that compare the subtrees of a prompt's responses; dataclasses as in `group_estimators`.

A tree is trained once: a token counts in the row that sampled it, however many responses have it. Where a paper trains it once per
response, the mean over those responses stands here, and the docstring says so.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from annotated_types import Ge
from jaxtyping import Float
from pydantic import ConfigDict

from jaxrl_llm.objective.estimator import AdvantageEstimate, Estimator, EstimatorInputs, sequence_rewards
from jaxrl_llm.objective.group_estimators import largest_range, largest_z_score
from jaxrl_llm.objective.statistics import Rows, ratio, whiten
from jaxrl_llm.objective.token_estimators import last_sampled
from jaxrl_llm.objective.tree_nodes import Nodes, Tree, mean, nodes_of


class TreeEstimator(Estimator):
    """Base class: one number per node, from the rewards of one prompt's leaves."""

    compares_trees: ClassVar[bool] = True

    def estimate(self, inputs: EstimatorInputs) -> AdvantageEstimate:
        advantage, score = np.zeros(inputs.mask.shape), sequence_rewards(inputs)
        for rows, nodes in _trees_of(inputs):
            own = advantage[rows]
            for row, start, end, x in zip(
                nodes.row, nodes.start, nodes.end, self.of_nodes(nodes, score[rows] - score[rows].min()), strict=True
            ):
                own[row, start:end] = x
        return AdvantageEstimate(np.where(inputs.mask, advantage, 0.0))

    def of_nodes(self, nodes: Nodes, reward: Rows) -> Float[np.ndarray, " n"]:
        """Return the advantage of each node's tokens. `reward`: of each leaf of the tree, above the least of them."""
        raise NotImplementedError


@dataclass(frozen=True)
class TreeRl(TreeEstimator):
    """(V(node) - V(prompt) + V(node) - V(parent)) / sqrt(leaves of the node), V the mean over its leaves of r - mean of the other
    leaves' r (Hou et al. 2025, TreeRL, arXiv 2506.11902): a global and a local advantage."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    kind: Literal["tree_rl"] = "tree_rl"
    reweight: bool = True
    """Divide by sqrt(leaves), as the paper does so that tokens of many leaves are not trained too much."""

    def of_nodes(self, nodes: Nodes, reward: Rows) -> Float[np.ndarray, " n"]:
        # The mean of the others is (n mean - r) / (n - 1); V of the prompt, the mean of all r - mean of others, is 0.
        away = _from_mean(reward) * len(reward) / max(len(reward) - 1, 1)
        value = nodes.values(away)
        found = value + (value - nodes.of_parent(value, 0.0))
        return found / np.sqrt(nodes.leaves.sum(axis=1)) if self.reweight else found

    def bound(self, score: Rows, inputs: EstimatorInputs) -> float:
        # |V| is at most the range, and V of two nodes differ by at most n / (n - 1) of it.
        return 3 * largest_range(score, inputs.groups)


@dataclass(frozen=True)
class TreePo(TreeEstimator):
    """Mean over a response's ancestors, the prompt included, of r - mean r of the ancestor's leaves, those of one leaf skipped; of
    a token of several responses the mean over them, where the paper trains it with each; then whitened over the batch's tokens
    (Li et al. 2025, TreePO, arXiv 2508.17445)."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    kind: Literal["tree_po"] = "tree_po"
    whiten: bool = True

    @property
    def uses_batch_statistics(self) -> bool:
        return self.whiten

    def estimate(self, inputs: EstimatorInputs) -> AdvantageEstimate:
        found = super().estimate(inputs).advantage
        return AdvantageEstimate(whiten(found, inputs.mask) if self.whiten else found)

    def of_nodes(self, nodes: Nodes, reward: Rows) -> Float[np.ndarray, " n"]:
        several = nodes.leaves[nodes.leaves.sum(axis=1) > 1]
        several = np.concatenate([np.ones((int(len(reward) > 1), len(reward)), bool), several])
        away = np.array([np.where(leaves, reward - mean(reward[leaves]), 0.0) for leaves in several])
        total = np.array([math.fsum(x) for x in away.T]) if len(several) else np.zeros(len(reward))
        return nodes.values(ratio(total, several.sum(axis=0).astype(float)))

    def bound(self, score: Rows, inputs: EstimatorInputs) -> float:
        tokens = np.count_nonzero(inputs.mask)
        if self.whiten and tokens > 1:
            return largest_z_score(tokens, 1)
        return largest_range(score, inputs.groups)

    def why_equal_rewards_teach(self, graders: int) -> str:
        return "is whitened over the batch: equal rewards teach too" if self.whiten else ""


@dataclass(frozen=True)
class Spo(TreeEstimator):
    """V(node) - V(parent), V the mean reward of the node's leaves (Guo et al. 2025, SPO, arXiv 2505.23564, its tree form)."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    kind: Literal["spo"] = "spo"

    def of_nodes(self, nodes: Nodes, reward: Rows) -> Float[np.ndarray, " n"]:
        value = nodes.values(reward)
        return value - nodes.of_parent(value, mean(reward))

    def bound(self, score: Rows, inputs: EstimatorInputs) -> float:
        return largest_range(score, inputs.groups)


@dataclass(frozen=True)
class TreeRpo(TreeEstimator):
    """(V(node) - mean) / (std + eps), mean and std of V over the nodes with the same parent (Yang et al. 2025, TreeRPO, arXiv
    2506.05183: the group of GRPO at each step)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["tree_rpo"] = "tree_rpo"
    eps: Annotated[float, Ge(0)] = 1e-4
    std: Literal["sample", "population"] = "sample"
    """sample: divides by n - 1, as `grpo` does."""

    def of_nodes(self, nodes: Nodes, reward: Rows) -> Float[np.ndarray, " n"]:
        value, found = nodes.values(reward), np.zeros(len(nodes.row))
        for parent in np.unique(nodes.parent):
            beside = nodes.parent == parent
            away = _from_mean(value[beside])
            divisor = max(np.count_nonzero(beside) - (self.std == "sample"), 1)
            found[beside] = ratio(away, math.sqrt(math.fsum(away**2) / divisor) + self.eps)
        return found

    def bound(self, score: Rows, inputs: EstimatorInputs) -> float:
        return largest_z_score(inputs.groups.largest, int(self.std == "sample"))


def _trees_of(inputs: EstimatorInputs) -> Iterator[tuple[slice, Nodes]]:
    """Yield each prompt's rows and nodes; without trees, every row is one node."""
    mask, rows = inputs.mask, np.arange(len(inputs.mask))
    tree = inputs.tree or Tree(rows, np.zeros_like(rows))
    length = np.maximum(np.where(mask.any(axis=1), last_sampled(mask) + 1, 0), tree.fork)
    for start, size in zip(inputs.groups.start.tolist(), inputs.groups.size.tolist(), strict=True):
        own = slice(start, start + size)
        yield own, nodes_of(tree.trunk[own] - start, tree.fork[own], length[own])


def _from_mean(x: Rows) -> Rows:
    return x - mean(x)

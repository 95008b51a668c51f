"""Filters of single rows: which responses teach. Each is a frozen dataclass of its constants, and a function of groups.

A row whose number is NaN, because its group could not be graded, is never kept, and never counts as 0. Rules that compare the rows
of a group choose among those that are still kept.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from annotated_types import Ge, Le
from jaxtyping import Bool, Float, Int
from pydantic import ConfigDict

from jaxrl_llm.experience import by_prompt

if TYPE_CHECKING:
    from jaxrl_llm.types import Groups

Rows = Bool[np.ndarray, " B"]
Number = Annotated[int, Ge(1)]
Fraction = Annotated[float, Ge(0), Le(1)]


@dataclass(frozen=True, kw_only=True)
class MaxVariance:
    """Keeps the `keep` rows of a group whose numbers have the largest variance (Xu et al. 2025, PODS, arXiv 2504.13818, alg. 1).

    They are the lowest and the highest: all splits are tried. A smaller group is kept whole. Of equal numbers the first samples are
    kept. `objective.baseline_over: kept` computes advantages over these rows, as the paper does; else over all that were sampled.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["max_variance"] = "max_variance"
    keep: Annotated[int, Ge(2)] = 4
    """Rows per group."""
    by: str = "reward"
    """reward: the weighted sum; success, or the name of a grader."""

    def __call__(self, groups: "Groups") -> Rows:
        return by_prompt.chosen(self.choose, groups.measure(self.by), groups)

    def choose(self, x: Float[np.ndarray, " n"]) -> Int[np.ndarray, " k"]:
        keep = min(self.keep, len(x))
        order, low = np.argsort(x, kind="stable"), np.arange(keep + 1)
        # Of the highest, too, the first of equal ones.
        falling = np.argsort(-x, kind="stable")
        total = np.concatenate([[0.0], np.cumsum(x[order] - x.min())])
        squares = np.concatenate([[0.0], np.cumsum((x[order] - x.min()) ** 2)])
        high = keep - low
        from_top = len(x) - high
        sums, of_squares = (part[low] + part[-1] - part[from_top] for part in (total, squares))
        most = int(np.argmax(of_squares / keep - (sums / keep) ** 2))
        lowest = order[:most]
        highest = falling[~np.isin(falling, lowest)][: keep - most]
        return np.concatenate([lowest, highest])


@dataclass(frozen=True, kw_only=True)
class FirstSamples:
    """Keeps the first `keep` rows of a group by their sample number: a random subset, since samples are independent."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["first_samples"] = "first_samples"
    keep: Number = 4
    """Rows per group."""

    def __call__(self, groups: "Groups") -> Rows:
        return by_prompt.chosen(lambda x: np.arange(min(self.keep, len(x))), groups.measure("reward"), groups)


@dataclass(frozen=True, kw_only=True)
class BestBy:
    """Keeps the best `keep` rows of a group: the shortest, or those with most reward per token (Shrivastava et al. 2025, GFPO,
    arXiv 2508.09726). GFPO computes advantages over the kept ones: `objective.baseline_over: kept`."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["best_by"] = "best_by"
    keep: Number = 4
    """Rows per group."""
    score: Literal["length", "efficiency"] = "length"
    """efficiency: reward / length."""

    def __call__(self, groups: "Groups") -> Rows:
        length, reward = groups.rollouts.length.astype(np.float64), groups.measure("reward")
        score = {"length": np.where(np.isnan(reward), np.nan, -length), "efficiency": reward / np.maximum(length, 1)}
        return by_prompt.chosen(lambda x: np.argsort(-x, kind="stable")[: self.keep], score[self.score], groups)


@dataclass(frozen=True, kw_only=True)
class NotCutOff:
    """Keeps responses that ended by themselves (DAPO's overlong filtering, Yu et al. 2025, arXiv 2503.14476, 3.4). They still count
    in their group's statistics, unless `objective.baseline_over` is kept."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["not_cut_off"] = "not_cut_off"

    def __call__(self, groups: "Groups") -> Rows:
        from jaxrl_llm.types import Finish

        return groups.rollouts.finish != Finish.LENGTH


@dataclass(frozen=True, kw_only=True)
class RewardBetween:
    """Keeps rows whose number is from `at_least` to `at_most`."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["between"] = "between"
    by: str = "reward"
    """reward: the weighted sum; success, or the name of a grader."""
    at_least: float | None = None
    at_most: float | None = None

    def __call__(self, groups: "Groups") -> Rows:
        return by_prompt.between(groups.measure(self.by), self.at_least, self.at_most)


@dataclass(frozen=True, kw_only=True)
class NoDuplicates:
    """Keeps the first of equal responses to a prompt: the same tokens, by sample number."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["no_duplicates"] = "no_duplicates"

    def __call__(self, groups: "Groups") -> Rows:
        rollouts, seen = groups.rollouts, set()
        keep = np.zeros(len(rollouts.prompt), bool)
        for b in np.lexsort((rollouts.sample, rollouts.prompt)).tolist():
            if not groups.keep[b]:
                continue
            response = (int(rollouts.prompt[b]), rollouts.tokens[b, : rollouts.length[b]].tobytes())
            keep[b] = response not in seen
            seen.add(response)
        return keep


@dataclass(frozen=True, kw_only=True)
class NoRepetition:
    """Drops degenerate responses: those of whose n-grams more than the share `most` have occurred before in the same response."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["no_repetition"] = "no_repetition"
    ngram: Number = 4
    """n, in tokens."""
    most: Fraction = 0.5
    """Largest share of repeated n-grams: 1 - distinct n-grams / n-grams."""

    def __call__(self, groups: "Groups") -> Rows:
        rollouts = groups.rollouts
        shares = [repeated(rollouts.tokens[b, :n], self.ngram) for b, n in enumerate(rollouts.length.tolist())]
        return np.array(shares) <= self.most


def repeated(tokens: Int[np.ndarray, " n"], ngram: int) -> float:
    """Return the share of a text's n-grams that have occurred before in it; 0 if it is shorter than one."""
    num = len(tokens) - ngram + 1
    if num < 1:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(np.ascontiguousarray(tokens), ngram)
    # Rows as single values: their bytes.
    whole = np.ascontiguousarray(grams).view(np.dtype((np.void, grams.itemsize * ngram)))[:, 0]
    return 1 - len(set(whole.tolist())) / num


@dataclass(frozen=True, kw_only=True)
class NotStale:
    """Drops rows with a token of a policy more than `max_age` versions older than the newest one among all rows.

    Per row, not per group: filters that keep hard prompts longer make what is left systematically older.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["not_stale"] = "not_stale"
    max_age: Annotated[int, Ge(0)] = 4
    """In versions of the policy: optimizer steps."""

    def __call__(self, groups: "Groups") -> Rows:
        rollouts = groups.rollouts
        newest = rollouts.version.max(initial=0, where=rollouts.sampled)
        oldest = np.where(rollouts.sampled, rollouts.version, newest).min(axis=1, initial=newest)
        return newest - oldest <= self.max_age

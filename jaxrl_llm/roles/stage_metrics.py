"""What a step's groups went through: how much each stage left, whether that skews length and difficulty, and how varied it is."""

from collections.abc import Iterator

import numpy as np

from jaxrl_llm.experience.hints import hinted
from jaxrl_llm.experience.independent_rows import independent
from jaxrl_llm.types import Groups

# Groups in which n-grams are counted; sorting all tokens of a large step would take a second.
COUNTED = 32


def describe_stages(groups: Groups) -> dict[str, float]:
    """Metrics of all groups that a step sampled, after the filter; a mean over nothing is absent.

    kept/... and dropped/... compare the rows to train on with the graded ones that refill and filter left out: their number, mean
    length and share of right responses, of those without a hint. A filter that keeps short or easy responses shows here.
    """
    rollouts, keep, success = groups.rollouts, groups.keep, groups.measure("success")
    graded, alone = ~np.isnan(success), independent(groups)
    found: dict[str, float] = {
        "rollout/samples": np.count_nonzero(rollouts.prompt >= 0),
        "groups/sampled": len(groups.failure),
    }
    for name, rows in (("kept", keep), ("dropped", graded & ~keep)):
        found[f"{name}/rows"] = np.count_nonzero(rows)
        if rows.any():
            found[f"{name}/mean_length"] = rollouts.length[rows].mean()
        if (rows & alone).any():
            found[f"{name}/success"] = success[rows & alone].mean()
    if keep.any():
        found["groups/effective_size"] = np.count_nonzero(keep) / np.count_nonzero(groups.kept)
    return found | describe_hints(groups) | diversity(groups)


def describe_hints(groups: Groups) -> dict[str, float]:
    """Metrics of the hints of a step: share of the responses that began with one, their mean number of tokens, and the shares of
    right responses among those with and those without. A mean over nothing is absent; without hints all are."""
    if groups.hint is None:
        return {}
    success, own, has = groups.measure("success"), groups.rollouts.prompt >= 0, hinted(groups)
    found = {"hints/share": np.count_nonzero(has) / np.count_nonzero(own)}
    if has.any():
        found["hints/tokens"] = groups.hint[has].mean()
    for name, rows in (("success", has), ("success_without", own & ~has)):
        if (rows := rows & ~np.isnan(success)).any():
            found[f"hints/{name}"] = success[rows].mean()
    return found


def diversity(groups: Groups) -> dict[str, float]:
    """Means over groups of two or more graded rows: distinct answers per row that has one, and distinct pairs of neighboring tokens
    per pair (distinct-2, Li et al. 2016, arXiv 1510.03055) in the first groups."""
    answers, pairs = [], []
    for number, rows in enumerate(_graded_rows(groups)):
        vote = groups.vote[rows]
        if (vote > 0).any():
            answers.append(len(np.unique(vote[vote > 0])) / np.count_nonzero(vote > 0))
        if number < COUNTED and (share := _distinct_pairs(groups, rows)) is not None:
            pairs.append(share)
    found = {"diversity/unique_answers": answers, "diversity/distinct_2": pairs}
    return {name: float(np.mean(values)) for name, values in found.items() if values}


def _graded_rows(groups: Groups) -> Iterator[np.ndarray]:
    """Yield the rows of each group that was graded and has two or more."""
    size = groups.rollouts.size
    for p, rows in enumerate(np.split(np.arange(size.sum()), np.cumsum(size)[:-1])):
        if len(rows) > 1 and not groups.failure[p]:
            yield rows


def _distinct_pairs(groups: Groups, rows: np.ndarray) -> float | None:
    tokens, length = groups.rollouts.tokens[rows].astype(np.int64), groups.rollouts.length[rows]
    inside = np.arange(1, tokens.shape[1]) < length[:, None]
    pairs = (tokens[:, :-1] << 32 | tokens[:, 1:])[inside]
    return len(np.unique(pairs)) / len(pairs) if len(pairs) else None

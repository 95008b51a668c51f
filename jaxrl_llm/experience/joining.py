"""Joining: stored responses among the fresh ones of the same prompt."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import numpy as np
from annotated_types import Ge
from jaxtyping import Float, Int
from pydantic import ConfigDict

from jaxrl_llm.experience import by_prompt
from jaxrl_llm.experience.independent_rows import independent_rows
from jaxrl_llm.experience.row_filters import MaxVariance

if TYPE_CHECKING:
    from jaxrl_llm.types import Groups

Count = Annotated[int, Ge(1)]
Choose = Literal["recent", "random", "highest", "max_variance", "lowest_entropy"]


class StoredRows(NamedTuple):
    """What is known of n stored rows of one prompt, the newest group first."""

    reward: Float[np.ndarray, " n"]
    entropy: Float[np.ndarray, " n"]
    """Mean over its sampled tokens under the policy that is trained, in nats."""


@dataclass(frozen=True, kw_only=True)
class JoinConfig:
    """Stored responses that join the fresh ones of the same prompt. A group that the filter dropped as a whole comes back with
    them, if its rewards then differ."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    most: Count = 1
    """Stored responses per group, at most."""
    choose: Choose = "recent"
    """recent: the newest. random: any. highest: of the highest reward, the newest of equal ones. max_variance: whose rewards have
    the largest variance. These four, and recent with `most` as large as `window`, are those of RePO (arXiv 2506.09340).
    lowest_entropy: of the lowest mean entropy under the policy that is trained (ExGRPO, arXiv 2510.02245)."""
    right: bool = False
    """Right responses only (RLEP, arXiv 2507.07451)."""
    when: Literal["always", "all_wrong"] = "always"
    """all_wrong: where no fresh response is right (AR3PO, arXiv 2509.25808); one that began with a hint does not count."""
    window: Count = 16
    """The newest stored responses of a prompt that are chosen from."""
    least: Count = 1
    """Stored responses of a prompt, at least, before some join."""
    max_age: Annotated[int, Ge(0)] = 0
    """Largest age of what joins, in updates; 0: any that the buffer has."""
    swap: bool = False
    """They take the places of the group's last fresh responses, of which one stays at least; else the group grows."""

    def pick(self, rows: StoredRows, rng: np.random.Generator) -> Int[np.ndarray, " k"]:
        """Return the rows that join."""
        n = min(self.most, len(rows.reward))
        if self.choose == "random":
            return rng.choice(len(rows.reward), n, replace=False)
        if self.choose == "max_variance" and n > 1:
            return MaxVariance(keep=n).choose(rows.reward)
        key = {"highest": -rows.reward, "lowest_entropy": rows.entropy}.get(self.choose, np.zeros(len(rows.reward)))
        return np.argsort(key, kind="stable")[:n]


def join_stored(
    cfg: JoinConfig,
    fresh: "Groups",
    stored: "Groups",
    entropy: Callable[[], Float[np.ndarray, " B"]],
    rng: np.random.Generator,
) -> dict[int, Int[np.ndarray, " k"]]:
    """Return the rows of `stored` that join each fresh group, by its number.

    Args:
        cfg: the rule.
        fresh: graded groups.
        stored: groups of the buffer, the newest first; their kept rows may join. Of two groups of a prompt the first has them.
        entropy: returns that of the stored rows, as in `StoredRows`; called if the rule reads it.
        rng: draws rows.
    """
    may = stored.keep & (stored.measure("success") == 1 if cfg.right else True)
    row_of = np.where(may, stored.rollouts.prompts.row[stored.rollouts.prompt], -1)
    of_row = entropy() if cfg.choose == "lowest_entropy" else np.zeros(len(may))
    found = {}
    for p in asking_groups(cfg, fresh):
        rows = np.flatnonzero(row_of == fresh.rollouts.prompts.row[p])
        # A visit may ask in another form, to which these are no responses.
        asked = {q: _is_prompt(fresh, p, stored, q) for q in np.unique(stored.rollouts.prompt[rows]).tolist()}
        rows = rows[[asked[q] for q in stored.rollouts.prompt[rows].tolist()]][: cfg.window]
        if len(rows) >= cfg.least:
            picked = rows[cfg.pick(StoredRows(stored.reward[rows], of_row[rows]), rng)]
            found[p] = picked[: fresh.rollouts.size[p] - 1] if cfg.swap else picked
    return {p: rows for p, rows in found.items() if len(rows)}


def _is_prompt(fresh: "Groups", p: int, stored: "Groups", q: int) -> bool:
    """True if the prompts p and q have equal tokens."""
    one, other = fresh.rollouts.prompts, stored.rollouts.prompts
    return np.array_equal(one.tokens[p, : one.length[p]], other.tokens[q, : other.length[q]])


def asking_groups(cfg: JoinConfig, fresh: "Groups") -> list[int]:
    """Return the graded fresh groups that stored rows may join, the first one of each prompt."""
    rollouts, alone = fresh.rollouts, independent_rows(fresh)
    _, first = np.unique(rollouts.prompts.row, return_index=True)
    asks = (rollouts.size > 0) & ~np.isnan(by_prompt.means(fresh.measure("success"), fresh))
    if cfg.when == "all_wrong":
        asks &= by_prompt.means(alone.measure("success"), alone) == 0
    return [p for p in np.sort(first).tolist() if asks[p]]

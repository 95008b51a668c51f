"""What each token's action was worth, by any of the published estimators, in float64 over whole groups."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from jaxrl_llm.config.own_part import OwnPart
from jaxrl_llm.errors import AdvantageError
from jaxrl_llm.objective.estimator import Estimator
from jaxrl_llm.objective.group_estimators import (
    BestWorst,
    Gdpo,
    Gpg,
    Grpo,
    LeaveOneOut,
    MaxRl,
    MeanOnly,
    Opo,
    PassAtK,
    Raw,
    Rloo,
)
from jaxrl_llm.objective.outcome import Completion, Estimate, Outcome, of_groups_that_count, scores
from jaxrl_llm.objective.token_estimators import Gae, ReinforcePlusPlus, to_go

if TYPE_CHECKING:
    from jaxrl_llm.types import Credit, Groups, Scores

Published = (
    Grpo
    | MeanOnly
    | Rloo
    | LeaveOneOut
    | MaxRl
    | PassAtK
    | Opo
    | Gpg
    | Gdpo
    | Raw
    | BestWorst
    | ReinforcePlusPlus
    | Gae
)


@dataclass(frozen=True)
class OwnAdvantage(OwnPart, Estimator):
    """A function of your own of the groups and the scores: one number per row or per token. A bare "module:name" is one without
    options."""

    columns: tuple[Literal["reference_logprobs"], ...] = ()
    """Of the scores, those that it reads."""

    arguments: ClassVar[tuple[str, ...]] = ("groups", "scores")
    compares_a_group: ClassVar[bool] = False
    # Nothing is known of it.
    reads_the_batch: ClassVar[bool] = True

    def __call__(self, groups: "Groups", scores: "Scores | None" = None) -> "Credit":
        from jaxrl_llm.objective.credit import UNSCORED, of_own

        return of_own(self.made(), self.function, groups, UNSCORED if scores is None else scores)

    @property
    def reads_reference_logprobs(self) -> bool:
        return "reference_logprobs" in self.columns


AdvantageConfig = Annotated[Published | OwnAdvantage, Field(discriminator="kind")]


def estimate(advantage: Estimator, outcome: Outcome) -> Estimate:
    """Advantages of the tokens in `mask` of the groups that count, 0 elsewhere.

    Raises AdvantageError where float32 does not hold what is read or found, or an advantage is above the `bound` of its formula.
    """
    outcome = of_groups_that_count(outcome)
    _check_float32(advantage.kind, outcome, {name: read(outcome) for name, (read, _) in READ.items()})
    within = lambda x: None if x is None else np.where(outcome.mask, x, 0.0)  # noqa: E731
    # What is too large is named by the checks, and is no warning.
    with np.errstate(over="ignore", invalid="ignore"):
        found = Estimate(*map(within, advantage.estimate(outcome)))
        _check_bound(advantage, outcome, found.advantage)
        if outcome.late_reward is not None:
            late = within(to_go(outcome.late_reward, outcome.mask, 1.0))
            found = found._replace(advantage=found.advantage + late)
    _check_float32(advantage.kind, outcome, {"advantages": found.advantage, "returns": found.returns})
    return found


def bound(advantage: Estimator, outcome: Outcome) -> float:
    """The largest |advantage| that the formula allows for these rewards, of the groups that count; inf where there is none.

    n rows per group, or N in the batch (tokens, where these are whitened); range is max - min of a group, each at its largest.

    - Of n numbers, d from their mean: the others sum to -d, their squares to d^2 / (n - 1) or more, all squares to
      d^2 n / (n - 1) or more. So |d| <= std * sqrt((n - ddof)(n - 1) / n): (n - 1) / sqrt(n) sample stds, sqrt(n - 1) population
      stds. The same for a group's mean with the batch's std, whose squares sum to no less than the group's: N - ddof for n - ddof.
    - From the mean of n: (n - 1) / n of the range at most, where all others are at the other end. From any weighted mean, that of
      the others among them: the range.
    - Two numbers a range apart have squares of range^2 / 2 or more about any mean: std >= range / sqrt(2 (n - ddof)).
    - The best, a gap ahead of all others: squares of gap^2 (n - 1) / n or more, so gap <= sqrt(n) sample stds.
    - An eps only takes away; where there is none to divide by, the quotient is 0.
    """
    outcome = of_groups_that_count(outcome)
    score = scores(outcome)[outcome.counts]
    return float(advantage.bound(score, outcome)) if score.size else 0.0


LOWER_REWARDS = "bound what the graders return, or lower their reward.graders.weight"
LOWER_KL = "k1 and k2 of objective.reward_kl.kind stay smaller than k3; or lower its weight"
READ = {
    "rewards": (lambda o: o.reward.reshape(-1, 1), LOWER_REWARDS),
    "rewards per token": (lambda o: o.token_reward, LOWER_KL),
    "late rewards per token": (lambda o: o.late_reward, LOWER_KL),
    "values of the critic": (lambda o: o.values, "the critic has diverged: lower its learning rate"),
}
"""What must be a number that float32 holds, and what to do where it is not."""


def _check_float32(kind: str, outcome: Outcome, columns: dict[str, np.ndarray | None]) -> None:
    most = np.finfo(np.float32).max
    for name, x in columns.items():
        # Most often all are small, those that no token of `mask` has among them.
        if x is None or np.abs(x).max(initial=0.0) <= most:
            continue
        largest = np.abs(np.where(outcome.mask, x, 0.0)).max(initial=0.0)
        if not largest <= most:
            todo = READ[name][1] if name in READ else f"rewards reach {np.abs(outcome.reward).max():g}; {LOWER_REWARDS}"
            raise AdvantageError(
                f"objective.advantage.kind {kind}: got {name} of {largest:g}, want at most {most:g}, the largest that "
                f"float32 holds: {todo}"
            )


def _check_bound(advantage: Estimator, outcome: Outcome, found: Completion) -> None:
    largest, most = np.abs(found).max(initial=0.0), bound(advantage, outcome)
    # Roundings in float64 are far below this, and float32 hardly tells it.
    if largest > most * (1 + 1e-7):
        raise AdvantageError(
            f"objective.advantage.kind {advantage.kind}: got an advantage of {largest:g}, want at most {most:g}, the most that its "
            "formula gives for these rewards: this is a bug of the estimator, please report it; another kind avoids it"
        )

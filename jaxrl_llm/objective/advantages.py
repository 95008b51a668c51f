"""Advantages per token by any of the published estimators, in float64 over whole groups."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from jaxrl_llm.config.own_part import OwnPart
from jaxrl_llm.errors import AdvantageError
from jaxrl_llm.objective.estimator import (
    AdvantageEstimate,
    Estimator,
    EstimatorInputs,
    Tokens,
    at_tokens,
    in_float64,
    sequence_rewards,
)
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
from jaxrl_llm.objective.statistics import Numbers
from jaxrl_llm.objective.token_estimators import Gae, GrpoSteps, ReinforcePlusPlus, to_go
from jaxrl_llm.objective.tree_estimators import Spo, TreePo, TreeRl, TreeRpo

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
    | GrpoSteps
    | Gae
    | TreeRl
    | TreePo
    | Spo
    | TreeRpo
)


@dataclass(frozen=True)
class OwnAdvantage(OwnPart, Estimator):
    """A custom function of groups and scores that returns one number per row or per token. A bare "module:name" is one without
    options."""

    columns: tuple[Literal["reference_logprobs"], ...] = ()
    """Columns of the scores that it reads."""

    arguments: ClassVar[tuple[str, ...]] = ("groups", "scores")
    compares_within_group: ClassVar[bool] = False
    # Unknown, so the safe answer.
    uses_batch_statistics: ClassVar[bool] = True

    def __call__(self, groups: "Groups", scores: "Scores | None" = None) -> "Credit":
        from jaxrl_llm.objective.credit import NO_SCORES, custom_credit

        return custom_credit(self.made(), self.function, groups, NO_SCORES if scores is None else scores)

    @property
    def reads_reference_logprobs(self) -> bool:
        return "reference_logprobs" in self.columns


AdvantageConfig = Annotated[Published | OwnAdvantage, Field(discriminator="kind")]


def estimate(advantage: Estimator, inputs: EstimatorInputs) -> AdvantageEstimate:
    """Return advantages of the rows, or of their tokens in `mask`; 0 for other tokens, and for rows without one.

    Raises:
        AdvantageError: an input or a result does not fit float32, or an advantage exceeds the `bound` of its formula.
    """
    inputs = in_float64(inputs)
    _check_float32(advantage.kind, inputs, {name: read(inputs) for name, (read, _) in READ.items()})
    # Overflow is reported by the checks below, so NumPy need not warn.
    with np.errstate(over="ignore", invalid="ignore"):
        found = AdvantageEstimate(*(_within(x, inputs.mask) for x in advantage.estimate(inputs)))
        _check_bound(advantage, inputs, found.advantage)
        if inputs.late_reward is not None:
            late = _within(to_go(inputs.late_reward, inputs.mask, 1.0), inputs.mask)
            found = found._replace(advantage=at_tokens(found.advantage, inputs.mask) + late)
    _check_float32(advantage.kind, inputs, {"advantages": found.advantage, "returns": found.returns})
    return found


def _within(x: Numbers | None, mask: Tokens) -> Numbers | None:
    """Return x, 0 outside the mask."""
    return None if x is None else np.where(mask if x.ndim == 2 else mask.any(axis=1), x, 0.0)


def bound(advantage: Estimator, inputs: EstimatorInputs) -> float:
    """Return the largest |advantage| that the formula allows for these rewards; inf if unbounded.

    n rows in the group, or N in the batch (tokens, where these are whitened); range is the group's max - min. Of several groups,
    the largest bound.

    - Of n numbers, d from their mean: the others sum to -d, their squares to d^2 / (n - 1) or more, all squares to
      d^2 n / (n - 1) or more. So |d| <= std * sqrt((n - ddof)(n - 1) / n): (n - 1) / sqrt(n) sample stds, sqrt(n - 1) population
      stds. The same for a group's mean with the batch's std, whose squares sum to no less than the group's: N - ddof for n - ddof.
    - Of n numbers, the sum of m of their distances d, which is minus that of the others: if it is s, all squares are s^2 / m +
      s^2 / (n - m) or more. So s <= std * sqrt((n - ddof) m (n - m) / n).
    - From the mean of n: (n - 1) / n of the range at most, where all others are at the other end. From any weighted mean, that of
      the others among them: the range.
    - Two numbers a range apart have squares of range^2 / 2 or more about any mean: std >= range / sqrt(2 (n - ddof)).
    - The best, a gap ahead of all others: squares of gap^2 (n - 1) / n or more, so gap <= sqrt(n) sample stds.
    - An eps only lowers these; a quotient with divisor 0 is 0.
    """
    inputs = in_float64(inputs)
    score = sequence_rewards(inputs)
    return float(advantage.bound(score, inputs)) if score.size else 0.0


LOWER_REWARDS = "bound what the graders return, or lower their reward.graders.weight"
LOWER_KL = "k1 and k2 of objective.reward_kl.kind stay smaller than k3; or lower its weight"
READ = {
    "rewards": (lambda o: o.reward, LOWER_REWARDS),
    "rewards per token": (lambda o: o.token_reward, LOWER_KL),
    "late rewards per token": (lambda o: o.late_reward, LOWER_KL),
    "values of the critic": (lambda o: o.values, "the critic has diverged: lower its learning rate"),
}
"""Inputs that must fit float32, and what to do if one does not."""


def _check_float32(kind: str, inputs: EstimatorInputs, columns: dict[str, np.ndarray | None]) -> None:
    most = np.finfo(np.float32).max
    for name, x in columns.items():
        # Fast path: usually all numbers are small, masked ones included.
        if x is None or np.abs(x).max(initial=0.0) <= most:
            continue
        largest = np.abs(_within(x, inputs.mask)).max(initial=0.0)
        if not largest <= most:
            todo = READ[name][1] if name in READ else f"rewards reach {np.abs(inputs.reward).max():g}; {LOWER_REWARDS}"
            raise AdvantageError(
                f"objective.advantage.kind {kind}: got {name} of {largest:g}, want at most {most:g}, the largest that "
                f"float32 holds: {todo}"
            )


def _check_bound(advantage: Estimator, inputs: EstimatorInputs, found: Numbers) -> None:
    largest, most = np.abs(found).max(initial=0.0), bound(advantage, inputs)
    # Float64 rounding errors are far below this, and float32 hardly resolves it.
    if largest > most * (1 + 1e-7):
        raise AdvantageError(
            f"objective.advantage.kind {advantage.kind}: got an advantage of {largest:g}, want at most {most:g}, the most that its "
            "formula gives for these rewards: this is a bug of the estimator, please report it; another kind avoids it"
        )

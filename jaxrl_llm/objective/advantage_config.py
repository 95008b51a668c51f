"""Which advantage, and what is taken from each token's reward."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le
from pydantic import ConfigDict, Field

NonNegative = Annotated[float, Ge(0)]


Fraction = Annotated[float, Ge(0), Le(1)]


Over = Literal["group", "batch"]


@dataclass(frozen=True)
class Grpo:
    """(r - mean) / (std + eps) (Shao et al. 2024, DeepSeekMath, 4.1.2)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["grpo"] = "grpo"
    std: Literal["sample", "population"] = "sample"
    """sample: with n - 1 (torch's default)."""
    eps: NonNegative = 1e-4
    """TRL 1e-4, verl 1e-6, OpenRLHF 1e-9."""
    mean_over: Over = "group"
    std_over: Over = "group"


@dataclass(frozen=True)
class MeanOnly:
    """r - mean of the group (Liu et al. 2025, Dr. GRPO, 3.2)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["mean_only"] = "mean_only"


@dataclass(frozen=True)
class Rloo:
    """r - mean of the G - 1 others (Ahmadian et al. 2024, eq. 9)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["rloo"] = "rloo"
    whiten: bool = False
    """Then (A - mean) / (std + 1e-4) over the batch (TRL's normalize_advantages)."""


@dataclass(frozen=True)
class LeaveOneOut:
    """(r - mean) / (std + eps), both of the G - 1 others; r - mean where their std is 0 (NeMo-RL)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["leave_one_out"] = "leave_one_out"
    eps: NonNegative = 1e-6


@dataclass(frozen=True)
class MaxRl:
    """(r - mean) / (mean + eps); 0 where the mean is not above 0 (MaxRL)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["max_rl"] = "max_rl"
    eps: NonNegative = 0.0
    """prime-rl 0, SkyRL 1e-6."""


@dataclass(frozen=True)
class PassAtK:
    """The best of a group gets what it is ahead of the second, the others 0 (Walder & Karkhanis 2025; verl's best-only form)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["pass_at_k"] = "pass_at_k"
    scale: bool = True
    """Divided by the group's std + eps."""
    eps: NonNegative = 1e-6


@dataclass(frozen=True)
class Opo:
    """r - sum(length * r) / sum(length) (Hao et al. 2025, OPO)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["opo"] = "opo"


@dataclass(frozen=True)
class Gpg:
    """alpha (r - mean), alpha = rows / rows whose reward is not 0 (Chu et al. 2025, GPG)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["gpg"] = "gpg"


@dataclass(frozen=True)
class Gdpo:
    """Each grader's part normalised in its group as `grpo` does, their weighted sum whitened over the batch (GDPO)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["gdpo"] = "gdpo"
    eps: NonNegative = 1e-4


@dataclass(frozen=True)
class Raw:
    """The reward itself."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["raw"] = "raw"


@dataclass(frozen=True)
class BestWorst:
    """1 for the best of a group, -1 for the worst, 0 for the others: the pairs of `dpo`."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["best_worst"] = "best_worst"


@dataclass(frozen=True)
class ReinforcePlusPlus:
    """Returns to go of the tokens' rewards, whitened over the batch's tokens (Hu 2025, REINFORCE++)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["reinforce_pp"] = "reinforce_pp"
    baseline: bool = False
    """First r - mean of the group; then nothing is discounted."""
    gamma: Fraction = 1.0
    variance: Literal["sample", "population"] = "sample"
    """Of the whitening: verl's n - 1, or OpenRLHF's n."""
    eps: Annotated[float, Gt(0)] = 1e-8
    eps_beside: Literal["variance", "std"] = "variance"
    """Divided by sqrt(var + eps), or by std + eps (AReaL)."""


@dataclass(frozen=True)
class Gae:
    """Generalised advantage estimation over completion tokens with the critic's values (Schulman et al. 2016, eq. 16)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["gae"] = "gae"
    gamma: Fraction = 1.0
    lam: Fraction = 0.95
    whiten: bool = True
    """(A - mean) / sqrt(var + 1e-8) over the batch's tokens, var with n - 1; after the returns."""


AdvantageConfig = Annotated[
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
    | Gae,
    Field(discriminator="kind"),
]


@dataclass(frozen=True)
class RewardKl:
    """What is taken from each token's reward: weight * the estimate of KL(policy that sampled || reference) at it."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["k1", "k2", "k3"] = "k1"
    weight: NonNegative = 0.0
    to: Literal["reward", "advantage"] = "reward"
    """reward: before any statistic (verl, TRL). advantage: after them, each token getting what is still to come (OpenRLHF)."""

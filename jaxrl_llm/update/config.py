"""What an update minimises and how it steps. A choice among variants is a type, tagged by `kind`."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le
from pydantic import ConfigDict, Field

Count = Annotated[int, Ge(1)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) after a clip of the global gradient norm; linear warm-up, then constant or linear decay."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    lr: Annotated[float, Gt(0)] = 1e-3
    warmup_steps: Annotated[int, Ge(0)] = 0
    """Updates over which the learning rate rises from 0."""
    decay_steps: Annotated[int, Ge(0)] = 0
    """Updates after the warm-up over which it falls linearly to `final_lr`, to stay there; 0 = it does not fall."""
    final_lr: NonNegative = 0.0
    b1: Fraction = 0.9
    b2: Fraction = 0.95
    eps: Annotated[float, Gt(0)] = 1e-8
    weight_decay: NonNegative = 0.0
    max_grad_norm: Annotated[float, Gt(0)] = 1.0


@dataclass(frozen=True)
class ClippedLoss:
    """PPO's clipped surrogate with bounds of its own on either side; DAPO's clip-higher is high > low."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["clipped"] = "clipped"
    low: Fraction = 0.2
    """The ratio stops counting below 1 - low when the advantage is negative."""
    high: NonNegative = 0.2
    """The ratio stops counting above 1 + high when the advantage is positive."""
    kl: NonNegative = 0.0
    """Weight of the k3 estimate of KL(policy || reference). Above 0, the policy at the start of RL is kept as reference."""
    entropy: NonNegative = 0.0
    """Weight of the entropy bonus."""


@dataclass(frozen=True)
class CrossEntropyLoss:
    """-log p of the tokens in the loss mask."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["cross_entropy"] = "cross_entropy"


LossConfig = Annotated[ClippedLoss | CrossEntropyLoss, Field(discriminator="kind")]


@dataclass(frozen=True)
class NoCorrection:
    """The ratio is to the policy that sampled, as it sampled."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["none"] = "none"


@dataclass(frozen=True)
class TruncatedImportance:
    """Each token weighs min(p_trainer / p_sampler, cap), the trainer's parameters being those before the first update on it; the
    ratio is to these (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training")."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["truncated_importance"] = "truncated_importance"
    cap: Annotated[float, Gt(0)] = 2.0
    """C; the weight has no gradient."""


@dataclass(frozen=True)
class AutoCorrection:
    """`truncated_importance` where the sampler's weights or cache are quantised, else `none`."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["auto"] = "auto"


Correction = NoCorrection | TruncatedImportance
CorrectionConfig = Annotated[Correction | AutoCorrection, Field(discriminator="kind")]


def resolve(correction: CorrectionConfig, weights: str, cache: str) -> Correction:
    """What `auto` stands for, given `rollout.engine.weights` and `rollout.engine.cache`."""
    if not isinstance(correction, AutoCorrection):
        return correction
    return NoCorrection() if weights == cache == "compute" else TruncatedImportance()


@dataclass(frozen=True)
class UpdateConfig:
    """One step of RL: `epochs` passes over a batch of R rows, each in `minibatches` updates of `micro_batches` parts."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    loss: LossConfig = field(default_factory=ClippedLoss)
    normalize: Literal["token", "sequence", "constant"] = "token"
    """What a term of the loss is a mean over, counted over the whole minibatch: all tokens (DAPO); the tokens of a sequence,
    then sequences (GRPO); a constant length of C tokens, then sequences (Dr. GRPO)."""
    correction: CorrectionConfig = field(default_factory=AutoCorrection)
    """Of the difference between the sampler's arithmetic and the trainer's."""
    epochs: Count = 1
    minibatches: Count = 1
    """Updates an epoch. Rows stay in groups; their order is drawn anew each epoch."""
    micro_batches: Count = 1
    """Parts whose gradients are added up before an update: less memory, the same numbers."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    @property
    def updates(self) -> int:
        """On each batch."""
        return self.epochs * self.minibatches


@dataclass(frozen=True)
class WarmStartConfig:
    """Supervised updates before RL on noisy answers, so that RL starts from a policy that is right only sometimes."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    steps: Annotated[int, Ge(0)] = 0
    rows: Count = 256
    """Sequences an update."""
    noise: Fraction = 0.0
    """Share of the training answers that are wrong."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

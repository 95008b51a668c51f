"""Config of the update, its packing and guards, and of the warm start. Each variant is a type, tagged by `kind`."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le
from pydantic import ConfigDict

from jaxrl_llm.update.optimizer.config import AdamW, OptimizerConfig

Count = Annotated[int, Ge(1)]
Positive = Annotated[float, Gt(0)]
Fraction = Annotated[float, Ge(0), Le(1)]


@dataclass(frozen=True)
class PackingConfig:
    """Packing of sequences into the rows of a batch. Loss and gradients are the same for every kind."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["none", "plain", "shared_prefix"] = "none"
    """none: one sequence per row. plain: as many whole sequences as fit. shared_prefix: a group's prompt once, followed by its
    completions."""
    slots: Annotated[int, Ge(0)] = 0
    """Tokens per row, T. 0: the longest sequence; with shared_prefix, the longest group."""


@dataclass(frozen=True)
class EssScaling:
    """Learning rate of each update by the effective sample size of its sequences' importance weights (VCPO, arXiv 2602.17616).
    With share = ESS / sequences the factor is min(1, share / base), or its square root."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    rule: Literal["sqrt", "linear"] = "sqrt"
    """sqrt: for Adam and its kin, whose steps do not grow with the gradient. linear: the factor itself."""
    base: Annotated[float, Gt(0), Le(1)] = 1.0
    """Share at which, and above which, the learning rate is whole."""


@dataclass(frozen=True)
class GuardConfig:
    """Conditions under which a run warns or stops."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    max_nonfinite: Count = 3
    """Consecutive steps without a finite update after which the run ends with exit code 4. A non-finite update changes nothing."""
    max_mismatch_kl: Positive | None = 0.1
    """Largest mean KL(sampler || trainer) at equal parameters, nats per token; above it the run ends with exit code 4. None: no
    limit. Measured in the first update on fresh data and, if groups are replayed, on each evaluation's rollouts."""
    max_ungraded: Count = 3
    """Consecutive steps without a graded group after which the run ends with exit code 4."""
    max_dropped: Count = 50
    """Consecutive steps in which every graded group was dropped by a filter and none was replayed, after which the run ends with
    exit code 4."""
    idle_steps: Count = 3
    """Steps without a gradient after which a warning gives the reason, repeated at 2x, 4x, ... as many. Sampling cut off by
    `rollout.max_kept_tokens` is warned about after this many consecutive steps."""
    zero_gradient_steps: Count = 3
    """Steps with a gradient of exactly 0 after which a parameter is named in a warning."""


@dataclass(frozen=True)
class UpdateConfig:
    """One step of RL: `epochs` passes over a batch of R rows, each in `minibatches` updates of `micro_batches` micro-batches."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    epochs: Annotated[int, Ge(1), Le(1000)] = 1
    minibatches: Count = 1
    """Updates per epoch. Groups stay whole; their order is shuffled each epoch."""
    micro_batches: Count = 1
    """Micro-batches per update, whose gradients are accumulated: less memory, the same result."""
    packing: PackingConfig = field(default_factory=PackingConfig)
    attention: Literal["auto", "plain", "blocks", "splash", "cudnn"] = "auto"
    """Attention implementation for whole rows: docs/update.md."""
    remat: Literal["auto", "none", "attention", "layer", "offload"] = "auto"
    """Activations that the backward pass recomputes instead of storing: docs/update.md."""
    optimizer: OptimizerConfig = field(default_factory=AdamW)
    ess_scaling: EssScaling | None = None
    """Lower the learning rate of updates on off-policy samples; null: never."""
    guards: GuardConfig = field(default_factory=GuardConfig)

    @property
    def updates(self) -> int:
        """Updates per batch."""
        return self.epochs * self.minibatches


@dataclass(frozen=True)
class WarmStartConfig:
    """Supervised updates before RL on noisy answers, so that RL starts from a policy that is right only sometimes."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    steps: Annotated[int, Ge(0)] = 0
    rows: Count = 256
    """Sequences per update."""
    noise: Fraction = 0.0
    """Fraction of the training answers that are wrong."""
    optimizer: OptimizerConfig = field(default_factory=AdamW)

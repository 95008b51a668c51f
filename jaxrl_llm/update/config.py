"""How an update steps, what it is made of and when a run stops. A choice among variants is a type, tagged by `kind`."""

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
    """How sequences lie in the rows of a batch. Loss and gradients are the same in all."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["none", "plain", "shared_prefix"] = "none"
    """none: one a row. plain: as many whole ones as fit. shared_prefix: a group's prompt once, its completions behind it."""
    slots: Annotated[int, Ge(0)] = 0
    """T. 0: those of one sequence at its longest; with shared_prefix those of a whole group."""


@dataclass(frozen=True)
class GuardConfig:
    """When a run stops or complains by itself."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    max_nonfinite: Count = 3
    """Steps in a row of which no update was finite; then the run ends with exit code 4. Such an update changes nothing."""
    max_mismatch_kl: Positive | None = 0.1
    """Mean KL(sampler || trainer), nats per token, of the same parameters; above it the run ends with exit code 4. None: no gate.
    Measured in the first update on fresh data, and, where groups are reused, on each evaluation's rollouts."""
    max_ungraded: Count = 3
    """Steps in a row of which no group could be graded; then the run ends with exit code 4."""
    idle_steps: Count = 3
    """Once so many steps have learned nothing, that is said with the reason; again at twice, four times, ... as many. Draws that
    `rollout.max_kept_tokens` cuts off are told after so many steps in a row."""
    zero_gradient_steps: Count = 3
    """A parameter whose gradient is exactly 0 for so many steps is named."""


@dataclass(frozen=True)
class UpdateConfig:
    """One step of RL: `epochs` passes over a batch of R rows, each in `minibatches` updates of `micro_batches` parts."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    epochs: Annotated[int, Ge(1), Le(1000)] = 1
    minibatches: Count = 1
    """Updates an epoch. Rows stay in groups; their order is drawn anew each epoch."""
    micro_batches: Count = 1
    """Parts whose gradients are added up before an update: less memory, the same numbers."""
    packing: PackingConfig = field(default_factory=PackingConfig)
    attention: Literal["auto", "plain", "blocks", "splash", "cudnn"] = "auto"
    """The form of attention over whole rows: docs/update.md."""
    remat: Literal["auto", "none", "attention", "layer", "offload"] = "auto"
    """What the backward pass computes again instead of keeping it: docs/update.md."""
    optimizer: OptimizerConfig = field(default_factory=AdamW)
    guards: GuardConfig = field(default_factory=GuardConfig)

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
    optimizer: OptimizerConfig = field(default_factory=AdamW)

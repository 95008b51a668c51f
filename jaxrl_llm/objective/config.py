"""What a run maximizes: an advantage, a loss, and the models beside the policy that these read. Imports no jax.

    objective = advantage (x KL in the reward) x loss: ratio x surrogate x correction x aggregation + KL - entropy (+ critic)

`presets.PRESETS` names whole objectives by their source; `refusals` says which parts do not go together, and why.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le
from pydantic import ConfigDict, model_validator

from jaxrl_llm.config.own_part import OwnPart
from jaxrl_llm.objective.advantages import AdvantageConfig
from jaxrl_llm.objective.group_estimators import Grpo
from jaxrl_llm.objective.loss_config import LossConfig, PolicyGradient
from jaxrl_llm.objective.reward_kl import RewardKl
from jaxrl_llm.objective.token_estimators import Gae


@dataclass(frozen=True)
class ReferenceConfig:
    """Which policy the KL terms hold on to, where there are any."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["initial", "ema", "periodic", "pretrained"] = "initial"
    """initial: the policy at the start of RL. ema: a running mean of the policy. periodic: the policy of every so many steps.
    pretrained: another model with the same tokens, also as the teacher of a distillation."""
    decay: Annotated[float, Gt(0), Le(1)] = 0.99
    """Of `ema`: reference = decay * reference + (1 - decay) * policy after each step."""
    every: Annotated[int, Ge(1)] = 100
    """Of `periodic`: steps."""
    path: str = ""
    """Of `pretrained`: a Hugging Face directory, or a hub name where there is internet."""


@dataclass(frozen=True)
class CriticConfig:
    """Where values come from, for advantages that need them."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["head", "separate"] = "head"
    """head: a linear map of the policy's last activations, whose gradient flows into the policy's layers. separate: a transformer
    of its own, at first a copy of the policy's layers."""
    lr_scale: Annotated[float, Gt(0)] = 1.0
    """Its learning rate, times the policy's."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What RL maximizes."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    preset: str = ""
    """Where the parts that follow come from; what is written beside it replaces the preset's."""
    advantage: AdvantageConfig = field(default_factory=Grpo)
    reward_kl: RewardKl = field(default_factory=RewardKl)
    loss: LossConfig = field(default_factory=PolicyGradient)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    """Only with the advantage `gae`."""

    @model_validator(mode="before")
    @classmethod
    def written_out(cls, value: Any) -> Any:
        """A name alone is short for {preset: name}; a part may name a function of your own."""
        if isinstance(value, str):
            return {"preset": value}
        if not isinstance(value, dict):
            return value
        return value | {part: OwnPart.written_out(value[part]) for part in ("advantage", "loss") if part in value}

    @property
    def has_critic(self) -> bool:
        return isinstance(self.advantage, Gae)

    @property
    def reads_reference_logprobs(self) -> bool:
        """Of the tokens that were drawn."""
        in_parts = self.loss.reads_reference_logprobs or self.advantage.reads_reference_logprobs
        return in_parts or self.reward_kl.weight > 0

    @property
    def reads_reference_distribution(self) -> bool:
        """Over the whole vocabulary: the update runs the reference too."""
        if isinstance(self.loss, PolicyGradient):
            return self.loss.kl.weight > 0 and self.loss.kl.kind == "full"
        return self.loss.kind == "distillation"

    @property
    def has_reference(self) -> bool:
        return self.reads_reference_logprobs or self.reads_reference_distribution

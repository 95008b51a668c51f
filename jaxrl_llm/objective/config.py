"""Objective of a run: the advantage, the loss, and the reference and critic that these read. Imports no jax.

    objective = advantage (x KL in the reward) x loss: ratio x surrogate x correction x aggregation + KL - entropy (+ critic)

`presets.PRESETS` names whole objectives by their source; `rules.refusals` lists incompatible parts, with the reason.
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

BaselineOver = Literal["sampled", "kept"]
ReusedRows = Literal["joint", "split"]


@dataclass(frozen=True)
class ReferenceConfig:
    """Reference policy of the KL terms."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["initial", "ema", "periodic", "pretrained"] = "initial"
    """initial: the policy at the start of RL. ema: an exponential moving average of the policy. periodic: a copy of
    the policy, refreshed every `every` steps. pretrained: another model with the same tokens, such as the teacher of a
    distillation."""
    decay: Annotated[float, Gt(0), Le(1)] = 0.99
    """For `ema`: reference = decay * reference + (1 - decay) * policy after each step."""
    every: Annotated[int, Ge(1)] = 100
    """For `periodic`: steps between refreshes."""
    path: str = ""
    """For `pretrained`: a Hugging Face directory, or a hub name (needs internet access)."""


@dataclass(frozen=True)
class CriticConfig:
    """Source of the values that the advantage `gae` needs."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["head", "separate"] = "head"
    """head: a linear map of the policy's last activations; its gradient flows into the policy's layers. separate: a second
    transformer, initialized from the policy's layers."""
    lr_scale: Annotated[float, Gt(0)] = 1.0
    """Its learning rate, as a multiple of the policy's."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """The objective of RL: one choice per part."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    preset: str = ""
    """Source of the defaults of the parts below; keys written beside it override the preset's."""
    advantage: AdvantageConfig = field(default_factory=Grpo)
    baseline_over: BaselineOver = "sampled"
    """Rows whose rewards enter the statistics of the advantage (means, stds, ranks), in each group with a kept row. sampled: all
    its graded rows, also those that a filter dropped. kept: the kept ones only, as PODS (Xu et al. 2025, arXiv 2504.13818) has it
    on its subset; the others then have advantage 0."""
    reused_rows: ReusedRows = "joint"
    """Baseline of a prompt's rows where stored ones have joined the fresh ones (experience.replay.join). joint: all share one, as
    in RLEP (arXiv 2507.07451). split: fresh and stored ones have their own, as in RePO (arXiv 2506.09340)."""
    reward_kl: RewardKl = field(default_factory=RewardKl)
    loss: LossConfig = field(default_factory=PolicyGradient)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    """Used with the advantage `gae` only."""

    @model_validator(mode="before")
    @classmethod
    def written_out(cls, value: Any) -> Any:
        """Expand a bare name to {preset: name}, and a part given as "module:name" to a custom function."""
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
        """True if log-probs of the sampled tokens under the reference are needed."""
        in_parts = self.loss.reads_reference_logprobs or self.advantage.reads_reference_logprobs
        return in_parts or self.reward_kl.weight > 0

    @property
    def reads_reference_distribution(self) -> bool:
        """True if the loss needs the reference's whole distribution: the update then runs the reference too."""
        if isinstance(self.loss, PolicyGradient):
            return self.loss.kl.weight > 0 and self.loss.kl.kind == "full"
        return self.loss.kind == "distillation"

    @property
    def has_reference(self) -> bool:
        return self.reads_reference_logprobs or self.reads_reference_distribution

"""Config of the optimizer and its learning-rate schedule. Each optimizer is a type, tagged by `kind`."""

import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, ConfigDict, Discriminator, Tag, model_validator

from jaxrl_llm.config.own_part import OwnPart

Count = Annotated[int, Ge(1)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Beta = Annotated[float, Ge(0), Lt(1)]


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return text


@dataclass(frozen=True)
class GroupConfig:
    """Parameter group with its own learning rate, weight decay and gradient clip."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    match: Annotated[str, AfterValidator(_pattern)]
    """Regular expression from the start of a parameter's path (`layers/qkv`, `critic/.*`); the first matching group takes it."""
    lr_scale: NonNegative = 1.0
    """Factor on the learning rate; 0 freezes the group."""
    weight_decay: NonNegative | None = None
    """None: the optimizer's."""


@dataclass(frozen=True)
class OwnSchedule(OwnPart):
    """A custom schedule: a JAX function from the update's number, 1, 2, ..., to its learning rate."""

    arguments: ClassVar[tuple[str, ...]] = ("update",)


@dataclass(frozen=True)
class _Steps:
    """Fields shared by all optimizers. The gradient's global norm is clipped to `max_grad_norm`, separately for each of `groups`
    and for the remaining parameters; weight decay is multiplied by the learning rate and skips norms and biases."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    lr: Positive = 1e-3
    warmup_steps: Annotated[int, Ge(0)] = 0
    """Updates over which the learning rate rises from 0."""
    hold_steps: Annotated[int, Ge(0)] = 0
    """Updates at the full rate after the warm-up: with a decay, warmup-stable-decay (Hu et al. 2024)."""
    decay_steps: Annotated[int, Ge(0)] = 0
    """Updates over which the learning rate decays to `final_lr`, its value thereafter; 0: no decay."""
    schedule: Literal["linear", "cosine", "sqrt"] | OwnSchedule = "linear"
    """Shape of the decay. sqrt: 1 - sqrt(progress) (Haegele et al. 2024). "module:name": a custom function for the whole
    schedule."""
    final_lr: NonNegative = 0.0
    weight_decay: NonNegative = 0.0
    decay_embedding: bool = True
    """Apply weight decay to the embedding (also the head with `model.tied_head`)."""
    max_grad_norm: Positive = 1.0
    groups: tuple[GroupConfig, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def written_out(cls, value: Any) -> Any:
        """Expand a bare "module:name" to a custom schedule without options."""
        if not isinstance(value, dict) or "schedule" not in value:
            return value
        return value | {"schedule": OwnPart.written_out(value["schedule"])}


@dataclass(frozen=True)
class AdamW(_Steps):
    """Loshchilov & Hutter 2019. Two moments per parameter."""

    kind: Literal["adamw"] = "adamw"
    b1: Beta = 0.9
    b2: Beta = 0.95
    eps: Positive = 1e-8


@dataclass(frozen=True)
class Adafactor(_Steps):
    """Shazeer & Stern 2018: the second moment of the two widest axes as a product of two vectors; no first moment."""

    kind: Literal["adafactor"] = "adafactor"
    decay_exponent: Positive = 0.8
    """The second moment's decay is 1 - step^-decay_exponent."""
    clip_rms: Positive = 1.0
    """Largest root mean square of a parameter's step, before the learning rate."""
    factor_from: Count = 128
    """Axes shorter than this are not factored."""
    relative: bool = False
    """Multiply the learning rate by the root mean square of the parameter."""


@dataclass(frozen=True)
class Lion(_Steps):
    """Chen et al. 2023: the sign of a momentum. Use a learning rate 3 to 10 times smaller than AdamW's."""

    kind: Literal["lion"] = "lion"
    b1: Beta = 0.9
    b2: Beta = 0.99


@dataclass(frozen=True)
class Muon(_Steps):
    """Jordan et al. 2024: orthogonalized momentum for the layers' matrices, AdamW for all else, including the router. Steps have
    the root mean square `rms`, as AdamW's, so that one learning rate fits both (Liu et al. 2025)."""

    kind: Literal["muon"] = "muon"
    momentum: Beta = 0.95
    iterations: Annotated[int, Ge(1), Le(100)] = 5
    """Newton-Schulz iterations."""
    rms: Positive = 0.2
    b1: Beta = 0.9
    """b1, b2 and eps are AdamW's."""
    b2: Beta = 0.95
    eps: Positive = 1e-8


def _kind_of_optimizer(value: Any) -> str | None:
    return value.get("kind", "adamw") if isinstance(value, dict) else getattr(value, "kind", None)


Optimizer = AdamW | Adafactor | Lion | Muon
OptimizerConfig = Annotated[
    Annotated[AdamW, Tag("adamw")]
    | Annotated[Adafactor, Tag("adafactor")]
    | Annotated[Lion, Tag("lion")]
    | Annotated[Muon, Tag("muon")],
    Discriminator(_kind_of_optimizer),
]
"""AdamW if no `kind` is given."""

"""Which optimizer, and how its steps change over a run. A choice among optimizers is a type, tagged by `kind`."""

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
    """Parameters with a rate, a decay and a gradient clip of their own."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    match: Annotated[str, AfterValidator(_pattern)]
    """Regular expression from the start of a parameter's path (`layers/qkv`, `critic/.*`); the first group that fits has it."""
    lr_scale: NonNegative = 1.0
    """Times the learning rate; 0 leaves them as they are."""
    weight_decay: NonNegative | None = None
    """None: that of the optimizer."""


@dataclass(frozen=True)
class OwnSchedule(OwnPart):
    """A function of the number of the update, 1, 2, ..., to its learning rate, in JAX."""

    arguments: ClassVar[tuple[str, ...]] = ("update",)


@dataclass(frozen=True)
class _Steps:
    """What all optimizers share. The gradient's global norm is held at `max_grad_norm`, for each of `groups` and for the rest by
    itself; weight decay is times the learning rate, and not that of norms and biases."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    lr: Positive = 1e-3
    warmup_steps: Annotated[int, Ge(0)] = 0
    """Updates over which the learning rate rises from 0."""
    hold_steps: Annotated[int, Ge(0)] = 0
    """Updates after the warm-up before it falls: with both, warm-up - stable - decay (Hu et al. 2024)."""
    decay_steps: Annotated[int, Ge(0)] = 0
    """Updates over which it falls to `final_lr`, to stay there; 0 = it does not fall."""
    schedule: Literal["linear", "cosine", "sqrt"] | OwnSchedule = "linear"
    """How it falls. sqrt: by the square root of the way (Haegele et al. 2024). "module:name": one of your own in its place."""
    final_lr: NonNegative = 0.0
    weight_decay: NonNegative = 0.0
    decay_embedding: bool = True
    """Weight decay of the embedding, which is the head too where `model.tied_head` is."""
    max_grad_norm: Positive = 1.0
    groups: tuple[GroupConfig, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def written_out(cls, value: Any) -> Any:
        """A bare "module:name" is a schedule of your own without options."""
        if not isinstance(value, dict) or "schedule" not in value:
            return value
        return value | {"schedule": OwnPart.written_out(value["schedule"])}


@dataclass(frozen=True)
class AdamW(_Steps):
    """Loshchilov & Hutter 2019. Two moments of every parameter."""

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
    """Of a parameter's step, before the learning rate."""
    factor_from: Count = 128
    """Axes shorter than this are not factored."""
    relative: bool = False
    """The learning rate is times the root mean square of the parameter."""


@dataclass(frozen=True)
class Lion(_Steps):
    """Chen et al. 2023: the sign of a momentum. Its learning rate wants to be 3 to 10 times smaller than AdamW's."""

    kind: Literal["lion"] = "lion"
    b1: Beta = 0.9
    b2: Beta = 0.99


@dataclass(frozen=True)
class Muon(_Steps):
    """Jordan et al. 2024: the momentum of the layers' matrices, made orthogonal; all else, the router too, by AdamW. Steps have
    the root mean square `rms`, AdamW's, so that one learning rate fits both (Liu et al. 2025)."""

    kind: Literal["muon"] = "muon"
    momentum: Beta = 0.95
    iterations: Annotated[int, Ge(1), Le(100)] = 5
    """Of Newton and Schulz."""
    rms: Positive = 0.2
    b1: Beta = 0.9
    """Of AdamW."""
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
"""AdamW where no `kind` stands."""

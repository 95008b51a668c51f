"""What is kept of the rollouts, and how long they are used."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, ClassVar

from annotated_types import Ge
from pydantic import ConfigDict, model_validator

from jaxrl_llm.config import user_code
from jaxrl_llm.config.own_part import OwnPart

FILTERS = ("auto", "has_signal", "success", "none")
"""Every other name is a grader's."""


@dataclass(frozen=True)
class ReplayConfig:
    """A ring of whole groups that learned something; fresh groups that the filter dropped are replaced from it."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    capacity: Annotated[int, Ge(0)] = 0
    """Groups kept. 0 is the identity: fresh groups pass through, dropped ones stay empty."""
    max_age: Annotated[int, Ge(1)] = 8
    """A group older than so many updates is not taken."""


@dataclass(frozen=True)
class OwnFilter(OwnPart):
    """A filter of your own: a function of groups to bool[B], one truth per row; or a class whose objects have `init` and `apply`,
    as `experience.filters.Filter`. One that takes `texts` too gets the responses as text."""

    arguments: ClassVar[tuple[str, ...]] = ("groups",)
    named: ClassVar[tuple[str, ...]] = ("texts",)

    def methods_of(self, found: type) -> Mapping[str, tuple[str, ...]]:
        if user_code.has_method(found, "__call__") and not user_code.has_method(found, "apply"):
            return super().methods_of(found)
        return {"init": (), "apply": ("state", "groups")}


@dataclass(frozen=True)
class OwnReplay(OwnPart):
    """A replay of your own: a class whose objects have `init` and `exchange`, as `experience.replay.Replay`."""

    methods: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {"init": ("blank",), "exchange": ("state", "groups", "rng")}
    )


@dataclass(frozen=True)
class OwnCurriculum(OwnPart):
    """An order of the prompts of your own: a class whose objects have `init`, `choose` and `observe`, as
    `experience.curriculum.Curriculum`."""

    methods: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {"init": ("num_rows",), "choose": ("state", "rng", "n"), "observe": ("state", "groups")}
    )


@dataclass(frozen=True)
class ExperienceConfig:
    """Which prompts are sampled, which responses teach, and how long they are used. Each part may be one of your own,
    "module:name": docs/extending.md."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    curriculum: OwnCurriculum | None = None
    """Which rows of the task are sampled next. None: every row once per epoch, in an order that the seed draws anew each epoch."""
    filter: str | OwnFilter = "auto"
    """has_signal: keeps a group whose rewards differ. success: keeps a group in which some responses are right and some wrong, as
    the evaluation counts them. The name of a grader: keeps a group to which this one gave different numbers. none: keeps every
    group that was graded. auto: what the preset's source does; without a preset has_signal where a group of equal rewards has no
    gradient to give, else none."""
    replay: ReplayConfig | OwnReplay = ReplayConfig()

    @model_validator(mode="before")
    @classmethod
    def written_out(cls, value: Any) -> Any:
        """A bare "module:name" is a part of your own without options."""
        if not isinstance(value, dict):
            return value
        return value | {
            name: OwnPart.written_out(value[name]) for name in ("curriculum", "filter", "replay") if name in value
        }

    @property
    def replays(self) -> bool:
        """Groups may be used in a later step than the one that sampled them."""
        return isinstance(self.replay, OwnReplay) or self.replay.capacity > 0

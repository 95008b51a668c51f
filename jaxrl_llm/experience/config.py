"""Config of curriculum, filter and replay."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, ClassVar

from annotated_types import Ge
from pydantic import ConfigDict, model_validator

from jaxrl_llm.config import user_code
from jaxrl_llm.config.own_part import OwnPart

FILTERS = ("auto", "has_signal", "success", "none")
"""Built-in filters; any other name is that of a grader."""


@dataclass(frozen=True)
class ReplayConfig:
    """Ring buffer of whole groups that passed the filter; dropped fresh groups are replaced by groups from it."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    capacity: Annotated[int, Ge(0)] = 0
    """Groups in the ring. 0: no replay; fresh groups pass through, dropped ones stay empty."""
    max_age: Annotated[int, Ge(1)] = 8
    """Largest age of a replayed group, in updates."""


@dataclass(frozen=True)
class OwnFilter(OwnPart):
    """A custom filter: a function of groups that returns bool[B], or a class with the methods `init` and `apply` of
    `experience.filters.Filter`. A parameter named `texts` receives the responses as text."""

    arguments: ClassVar[tuple[str, ...]] = ("groups",)
    optional_arguments: ClassVar[tuple[str, ...]] = ("texts",)

    def methods_of(self, found: type) -> Mapping[str, tuple[str, ...]]:
        if user_code.has_method(found, "__call__") and not user_code.has_method(found, "apply"):
            return super().methods_of(found)
        return {"init": (), "apply": ("state", "groups")}


@dataclass(frozen=True)
class OwnReplay(OwnPart):
    """A custom replay: a class with the methods `init` and `exchange` of `experience.replay.Replay`."""

    methods: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {"init": ("blank",), "exchange": ("state", "groups", "rng")}
    )


@dataclass(frozen=True)
class OwnCurriculum(OwnPart):
    """A custom curriculum: a class with the methods `init`, `choose` and `observe` of `experience.curricula.Curriculum`."""

    methods: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {"init": ("num_rows",), "choose": ("state", "rng", "n"), "observe": ("state", "groups")}
    )


@dataclass(frozen=True)
class ExperienceConfig:
    """Which prompts are sampled, which responses are trained on, and for how long. Each part may be a custom one,
    "module:name": docs/extending.md."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    curriculum: OwnCurriculum | None = None
    """Which rows of the task are sampled next. None: every row once per epoch, in an order that the seed shuffles each epoch."""
    filter: str | OwnFilter = "auto"
    """has_signal: keeps a group whose rewards differ. success: keeps a group with both right and wrong responses, as the
    evaluation counts them. The name of a grader: keeps a group whose rewards by that grader differ. none: keeps every graded
    group. auto: the filter of the preset's source; without a preset, has_signal if a group of equal rewards has no gradient, else
    none."""
    replay: ReplayConfig | OwnReplay = ReplayConfig()

    @model_validator(mode="before")
    @classmethod
    def written_out(cls, value: Any) -> Any:
        """Expand a bare "module:name" to a custom part without options."""
        if not isinstance(value, dict):
            return value
        return value | {
            name: OwnPart.written_out(value[name]) for name in ("curriculum", "filter", "replay") if name in value
        }

    @property
    def replays(self) -> bool:
        """True if groups may be trained on in a later step than the one that sampled them."""
        return isinstance(self.replay, OwnReplay) or self.replay.capacity > 0

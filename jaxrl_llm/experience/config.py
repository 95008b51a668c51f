"""Config of curriculum, gate, budget, hints, refill, filter and replay."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

import numpy as np
from annotated_types import Ge, Gt, Le, MinLen
from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from jaxrl_llm.config import user_code
from jaxrl_llm.config.own_part import OwnPart
from jaxrl_llm.experience.budgets import FromPassRates as FromPassRates
from jaxrl_llm.experience.budgets import Knapsack, ReinforceAda, Rounds, Screening, UniformBudget, Vip
from jaxrl_llm.experience.by_successes import BySuccesses
from jaxrl_llm.experience.draws import BySuccessesDraw, Candidates, PrioritizedDraw, RecencyDraw, UniformDraw
from jaxrl_llm.experience.gates import AdmitAll, ExcludeSolved, Greso
from jaxrl_llm.experience.group_filters import DifficultyBand, KeepAll, Signal
from jaxrl_llm.experience.hints import CosineHints, LevelHints, NoHints, OwnHints, StagedHints
from jaxrl_llm.experience.joining import JoinConfig
from jaxrl_llm.experience.row_filters import (
    BestBy,
    FirstSamples,
    MaxVariance,
    NoDuplicates,
    NoRepetition,
    NotCutOff,
    NotStale,
    RewardBetween,
)
from jaxrl_llm.experience.staged import RowsOfStage as RowsOfStage
from jaxrl_llm.experience.staged import Staged
from jaxrl_llm.experience.strata import Columns, StratifiedByColumn, StratifiedByDifficulty
from jaxrl_llm.experience.targeted import AdaRft, DifficultyTargeted, Learnability, Sec, Unsolved
from jaxrl_llm.experience.targeted import ByPassRate as ByPassRate

if TYPE_CHECKING:
    from jaxrl_llm.experience.curricula import Curriculum


def rule_written_out(value: Any) -> Any:
    """Expand the short forms of a rule: the name of a kind, or "module:name"."""
    value = OwnPart.written_out(value)
    return {"kind": value} if isinstance(value, str) else value


@dataclass(frozen=True)
class OwnDraw(OwnPart):
    """A custom draw: a function of `experience.draws.Candidates` that returns a weight for each stored group, 0 or more."""

    arguments: ClassVar[tuple[str, ...]] = ("groups",)

    def __call__(self, groups: Candidates) -> np.ndarray:
        return self.made()(groups)


DrawConfig = Annotated[
    UniformDraw | RecencyDraw | PrioritizedDraw | BySuccessesDraw | OwnDraw, Field(discriminator="kind")
]


@dataclass(frozen=True)
class ReplayConfig:
    """Buffer of groups that passed the filter, and what comes back of it."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    capacity: Annotated[int, Ge(0), Le(2**24)] = 0
    """Groups in the buffer, at most. 0: no replay; fresh groups pass through, dropped ones stay empty."""
    memory_mib: Annotated[float, Gt(0)] = 4096.0
    """MiB of the buffer, at most: the oldest groups leave first. A group takes what its tokens need."""
    max_age: Annotated[int, Ge(0)] = 8
    """Largest age of what comes back, in updates; 0: any."""
    max_uses: Annotated[int, Ge(0)] = 0
    """Steps that train on a group, at most, the one that sampled it included; 0: any number."""
    start: str = ""
    """File of responses that the buffer has when RL starts: of `jaxrl sample --out`, a run's rollouts.jsonl, or texts of others.
    They are graded as fresh ones are, and as old as the first policy. Empty: none."""
    draw: DrawConfig = field(default_factory=UniformDraw)
    """Which groups of the buffer come back."""
    replace_dropped: bool = True
    """A fresh group that the filter dropped gives its place to a stored one."""
    groups: Annotated[int, Ge(0)] = 0
    """Stored groups that each step's updates have beside the rollout.prompts others: of P + groups groups P are fresh. Places stay
    empty while the buffer has fewer."""
    join: JoinConfig | None = None
    """Stored responses that join fresh ones of the same prompt; None: none do."""
    correction: Annotated[float, Ge(0), Le(1)] = 0.0
    """beta: the loss terms of a drawn group have the factor (smallest probability / its own)^beta, which undoes what its draw
    prefers (PER, arXiv 1511.05952, 3.4). 0: all have 1."""
    min_success: Annotated[float, Ge(0), Le(1)] = 0.0
    """Nothing comes back in a step whose fresh responses are right less often."""
    store_fresh: bool = True
    """Fresh groups that passed the filter enter the buffer. False: it has what it started with."""
    retire_solved: bool = False
    """Groups of a prompt whose fresh responses are all right leave the buffer."""

    @model_validator(mode="before")
    @classmethod
    def written_out(cls, value: Any) -> Any:
        if isinstance(value, dict) and "draw" in value:
            return value | {"draw": rule_written_out(value["draw"])}
        return value


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
class OwnGate(OwnPart):
    """A custom gate: a class with the methods `init`, `admit` and `observe` of `experience.gates.Gate`."""

    methods: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {"init": ("num_rows",), "admit": ("state", "rng", "row"), "observe": ("state", "groups")}
    )


@dataclass(frozen=True)
class OwnBudget(OwnPart):
    """A custom budget: a class with the methods `init`, `allocate` and `observe` of `experience.budgets.Budget`."""

    methods: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {"init": ("num_rows",), "allocate": ("state", "row", "seen", "left"), "observe": ("state", "groups")}
    )


@dataclass(frozen=True)
class OwnReplay(OwnPart):
    """A custom replay: a class with the methods `init` and `exchange` of `experience.replay.Replay`."""

    methods: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {"init": ("blank",), "exchange": ("state", "groups", "rng")}
    )


@dataclass(frozen=True)
class OwnCurriculum(OwnPart):
    """A custom curriculum: a class with the methods `init`, `choose`, `observe` and perhaps `describe` of
    `experience.curricula.Curriculum`."""

    methods: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {"init": ("num_rows",), "choose": ("state", "rng", "n"), "observe": ("state", "groups")}
    )

    def methods_of(self, found: type) -> Mapping[str, tuple[str, ...]]:
        described = {"describe": ("state", "rows")} if user_code.has_method(found, "describe") else {}
        return {**self.methods, **described}

    def over(self, columns: Columns, seed: int) -> "Curriculum":
        from jaxrl_llm.experience.curricula import own_curriculum

        return own_curriculum(self)


@dataclass(frozen=True)
class Shuffled:
    """Every row once per epoch, in an order that the seed shuffles each epoch."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["shuffled"] = "shuffled"


Rule = (
    KeepAll
    | Signal
    | DifficultyBand
    | NotStale
    | MaxVariance
    | FirstSamples
    | BestBy
    | NotCutOff
    | RewardBetween
    | NoDuplicates
    | NoRepetition
    | OwnFilter
)
Rules = Annotated[tuple[Annotated[Rule, Field(discriminator="kind")], ...], MinLen(1)]
# Names that are kinds; any other is `{kind: signal, by: NAME}`.
KINDS = {field.default for rule in get_args(Rule) for field in dataclasses.fields(rule) if field.name == "kind"} - {
    "own"
}
# Other short names.
SHORT = {"auto": {"kind": "auto"}, "none": {"kind": "none"}, "has_signal": {"kind": "signal", "by": "reward"}}


def filter_written_out(value: Any) -> Any:
    """Expand the short forms of a filter: a list is a chain; a name is that of a kind, of a measure, or "module:name"."""
    if isinstance(value, list | tuple):
        return {"kind": "chain", "filters": [filter_written_out(part) for part in value]}
    if isinstance(value, str) and ":" not in value:
        return SHORT.get(value) or ({"kind": value} if value in KINDS else {"kind": "signal", "by": value})
    if isinstance(value, dict) and len(value) == 1 and value.keys() <= {"chain", "all_of", "any_of"}:
        [(kind, parts)] = value.items()
        # Anything but a list stays as it is, to be refused as such.
        return {
            "kind": kind,
            "filters": filter_written_out(parts)["filters"] if isinstance(parts, list | tuple) else parts,
        }
    return OwnPart.written_out(value)


@dataclass(frozen=True)
class ComposedFilter:
    """The part of a filter that is made of others."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    filters: Rules
    listed: ClassVar[str] = "filters"
    """Field that a short form gives: `config.schema.types_as_written`."""

    @staticmethod
    def written_out(value: Any) -> Any:
        """Expand `{all_of: [...]}` and the like, as a flag may give it."""
        return filter_written_out(value) if isinstance(value, dict) else value


@dataclass(frozen=True)
class ChainConfig(ComposedFilter):
    """Each filter applied to what the one before left."""

    kind: Literal["chain"] = "chain"


@dataclass(frozen=True)
class AllOfConfig(ComposedFilter):
    """Rows that all filters keep, each applied to all rows."""

    kind: Literal["all_of"] = "all_of"


@dataclass(frozen=True)
class AnyOfConfig(ComposedFilter):
    """Rows that at least one filter keeps, each applied to all rows."""

    kind: Literal["any_of"] = "any_of"


@dataclass(frozen=True)
class AutoFilter:
    """The filter of the preset's source; without a preset, groups that differ if one of equal rewards has no gradient, else all.

    By the reward with one grader; with several by the first one, which the evaluation counts, never by their sum.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["auto"] = "auto"


FilterConfig = Annotated[AutoFilter | Rule | ChainConfig | AllOfConfig | AnyOfConfig, Field(discriminator="kind")]
CurriculumConfig = Annotated[
    Shuffled
    | StratifiedByColumn
    | StratifiedByDifficulty
    | Unsolved
    | Learnability
    | DifficultyTargeted
    | AdaRft
    | Sec
    | Staged
    | BySuccesses
    | OwnCurriculum,
    Field(discriminator="kind"),
]
OVER_A_COLUMN = (StratifiedByColumn, AdaRft, Sec, Staged)
"""Curricula whose `misfits` checks the columns of a task."""
GateConfig = Annotated[AdmitAll | Greso | ExcludeSolved | OwnGate, Field(discriminator="kind")]
BudgetConfig = Annotated[
    UniformBudget | Vip | Knapsack | Rounds | ReinforceAda | Screening | OwnBudget, Field(discriminator="kind")
]
HintConfig = Annotated[NoHints | CosineHints | LevelHints | StagedHints | OwnHints, Field(discriminator="kind")]


@dataclass(frozen=True)
class RefillConfig:
    """Dynamic sampling (Yu et al. 2025, DAPO, arXiv 2503.14476, 3.2): a group that the filter rejects is replaced by one of another
    prompt, while the others are decoded, until the step has all its groups."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    filter: FilterConfig = field(default_factory=Signal)
    """Rejects a group of which it keeps no row, judging each on its own. Filters that keep a state, and `not_stale`, which compares
    with other groups, cannot be used here."""
    attempts: Annotated[int, Ge(1)] = 10
    """Prompts sampled in a step, at most, per prompt of the step. When they run out, the step trains on the groups that were
    accepted; `update.guards.max_dropped` ends a run in which that is none, again and again."""

    @model_validator(mode="before")
    @classmethod
    def written_out(cls, value: Any) -> Any:
        """Expand the short forms; a filter alone is a refill by it."""
        if isinstance(value, str | list):
            value = {"filter": value}
        if isinstance(value, dict) and "filter" in value:
            return value | {"filter": filter_written_out(value["filter"])}
        return value


def _kind_of_replay(value: Any) -> str:
    is_own = bool(value.keys() & {"kind", "function"}) if isinstance(value, dict) else isinstance(value, OwnReplay)
    return "own" if is_own else "ring"


@dataclass(frozen=True)
class ExperienceConfig:
    """Which prompts are sampled and how often, which responses are trained on, and for how long. Each part may be a custom one,
    "module:name": docs/extending.md."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    curriculum: CurriculumConfig = Shuffled()
    """Which rows of the task are sampled next."""
    gate: GateConfig = field(default_factory=AdmitAll)
    """Which of these prompts are skipped."""
    budget: BudgetConfig = field(default_factory=UniformBudget)
    """How many of the step's rollout.prompts * rollout.samples samples each prompt gets."""
    hints: HintConfig = field(default_factory=NoHints)
    """With how many tokens of its row's known response each response begins. Never in an evaluation."""
    refill: RefillConfig | None = None
    """Replaces groups before they are trained on. None: what is dropped stays empty."""
    filter: FilterConfig = AutoFilter()
    """Which responses are trained on. Short forms: the name of a measure (success, reward or a grader) keeps groups whose numbers
    differ, as {kind: signal, by: NAME}; a list is a chain, {all_of: [...]} and {any_of: [...]} combine."""
    replay: Annotated[
        Annotated[ReplayConfig, Tag("ring")] | Annotated[OwnReplay, Tag("own")], Discriminator(_kind_of_replay)
    ] = ReplayConfig()

    @model_validator(mode="before")
    @classmethod
    def written_out(cls, value: Any) -> Any:
        """Expand the short forms."""
        if not isinstance(value, dict):
            return value
        forms = {
            **dict.fromkeys(("curriculum", "gate", "budget", "hints"), rule_written_out),
            "filter": filter_written_out,
            "replay": OwnPart.written_out,
        }
        return value | {name: form(value[name]) for name, form in forms.items() if name in value}

    @property
    def start(self) -> str:
        """File with whose responses the replay's buffer starts; "" without one."""
        return self.replay.start if isinstance(self.replay, ReplayConfig) and self.replay.capacity else ""

    @property
    def replayed_groups(self) -> int:
        """Groups that a step trains on beside those of its prompts."""
        return self.replay.groups if isinstance(self.replay, ReplayConfig) and self.replay.capacity else 0

    @property
    def trains_hints(self) -> bool:
        """True if the tokens of hints are trained on."""
        return not isinstance(self.hints, NoHints) and self.hints.train

    @property
    def replays(self) -> bool:
        """True if groups may be trained on in a later step than the one that sampled them."""
        return isinstance(self.replay, OwnReplay) or self.replay.capacity > 0

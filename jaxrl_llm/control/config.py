"""Config of controls: what a response may consist of."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, MinLen
from pydantic import ConfigDict, Discriminator

Count = Annotated[int, Ge(1), Le(2**30)]
Natural = Annotated[int, Ge(0)]
Text = Annotated[str, MinLen(1)]
Texts = Annotated[tuple[Text, ...], MinLen(1)]
Tokens = Annotated[tuple[int | Text, ...], MinLen(1)]


@dataclass(frozen=True)
class NoControl:
    """Responses are sampled freely."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["none"] = "none"


@dataclass(frozen=True)
class RegexControl:
    """Responses match a regular expression, as a whole."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["regex"] = "regex"
    pattern: Text = ""
    """In the syntax of Rust's regex crate, without look-around and back-references."""


@dataclass(frozen=True)
class JsonSchemaControl:
    """Responses are JSON that is valid under a schema."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["json_schema"] = "json_schema"
    schema: dict[str, Any] = field(default_factory=dict)
    """The JSON schema."""
    path: str = ""
    """A file with the schema, in place of `schema`."""
    whitespace: str = "[ ]?"
    """Regular expression of the white space between two JSON tokens."""


@dataclass(frozen=True)
class ChoiceControl:
    """Responses are one of some texts."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["choice"] = "choice"
    texts: Texts = ()


@dataclass(frozen=True)
class AllowControl:
    """Responses consist of some tokens, and end tokens, only."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["allow"] = "allow"
    tokens: Tokens = ()
    """Token ids, or texts of exactly one token each."""


@dataclass(frozen=True)
class ForbidControl:
    """Responses have none of some tokens."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["forbid"] = "forbid"
    tokens: Tokens = ()
    """Token ids, or texts of exactly one token each."""


@dataclass(frozen=True)
class StopControl:
    """Responses end with the token that completes one of some texts, on the device."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["stop"] = "stop"
    texts: Texts = ()


Answer = Annotated[NoControl | RegexControl | JsonSchemaControl | ChoiceControl, Discriminator("kind")]


@dataclass(frozen=True)
class BudgetControl:
    """Thinking of a limited number of tokens, then an answer (s1, arXiv 2501.19393)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["budget"] = "budget"
    tokens: Count = 256
    """Completion slots for thinking. In the slot behind them `closing` is forced, unless the response closed it before."""
    close: Text = "</think>"
    """Text that ends the thinking."""
    closing: str = ""
    """Text that is forced when the budget is used up; it has to contain `close`. Empty: `close` itself."""
    waits: Natural = 0
    """Number of times that `wait` is forced in place of the token that would end the thinking."""
    wait: Text = "Wait"
    """Text that makes the policy think on."""
    then: Answer = field(default_factory=NoControl)
    """Control of the answer behind `close`."""


@dataclass(frozen=True)
class BeginControl:
    """Responses begin with a text that is forced: context, never trained."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["begin"] = "begin"
    text: Text = ""
    then: Annotated[
        NoControl | RegexControl | JsonSchemaControl | ChoiceControl | BudgetControl, Discriminator("kind")
    ] = field(default_factory=NoControl)
    """Control of what follows; `BudgetControl.tokens` counts the forced text too."""


Control = Annotated[
    NoControl | RegexControl | JsonSchemaControl | ChoiceControl | AllowControl | ForbidControl | StopControl
    | BudgetControl | BeginControl,
    Discriminator("kind"),
]  # fmt: skip
# No budget: no slot is that late.
UNLIMITED = 2**31 - 1


def budget_of(control: Control) -> int:
    """Return the completion slot from which states of the control expire."""
    if isinstance(control, BeginControl):
        return budget_of(control.then)
    return control.tokens if isinstance(control, BudgetControl) else UNLIMITED


def missing_field(control: Control) -> str:
    """Return the path of a setting without which the control says nothing, as `then.pattern`; "": it has all."""
    for name in ("pattern", "texts", "tokens", "text"):
        if getattr(control, name, None) in ("", ()):
            return name
    missing = missing_field(control.then) if hasattr(control, "then") else ""
    return missing and f"then.{missing}"


def without_budget(control: Control) -> Control:
    """Return the control with a budget of 1 in place of its own: budgets are no part of an automaton."""
    if isinstance(control, BeginControl):
        return dataclasses.replace(control, then=without_budget(control.then))
    return dataclasses.replace(control, tokens=1) if isinstance(control, BudgetControl) else control

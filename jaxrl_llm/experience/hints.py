"""Hints: with how many tokens of its prompt's demonstration each response begins. The policy draws what follows.

A rule is a frozen dataclass that is called with a `Demonstration`. It depends on the step, the row and the sample number, so a
resumed run, another mesh and another number of processes force the same tokens.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple

import numpy as np
from annotated_types import Ge, Gt, Le, MinLen
from jaxtyping import Bool, Int
from pydantic import ConfigDict

from jaxrl_llm.config.own_part import OwnPart
from jaxrl_llm.errors import UserError

if TYPE_CHECKING:
    from jaxrl_llm.types import Groups

Share = Annotated[float, Ge(0), Le(1)]
Count = Annotated[int, Ge(0)]
Tokens = Int[np.ndarray, " n"]
WHERE = "experience.hints"
# A share of 0.29 of 100 tokens is 29 of them, though 0.29 * 100 is less.
EPS = 1e-9


class Demonstration(NamedTuple):
    """What a rule knows when n responses to a prompt are asked for."""

    step: int
    """Steps of RL done."""
    steps: int
    """Steps of RL of the run."""
    row: int
    """Index of the prompt's row in the task."""
    sample: Tokens
    """Sample number of each response."""
    length: int
    """Tokens of the demonstration, without the end token."""
    step_ends: Tokens
    """Ascending numbers of tokens up to the end of each step of the demonstration but the last; of a rule without `step_end`, up to
    each token but the last."""


@dataclass(frozen=True)
class NoHints:
    """Every response begins at its first token."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: Literal["none"] = "none"


@dataclass(frozen=True, kw_only=True)
class HintRule:
    """What all rules have in common."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    only_unsolved: bool = False
    """Hints for those prompts alone that had a response without a hint at an earlier visit, none of which was ever right."""
    train: bool = False
    """The tokens of hints are trained on too, as if they had been sampled with probability 1, by the term of
    objective.loss.shaping. False: they are context."""


@dataclass(frozen=True, kw_only=True)
class ShareHints(HintRule):
    """The part of the rules that give some responses of a group the same share of the demonstration."""

    samples: Count = 0
    """Responses of a group that have a hint, those of the lowest sample numbers; 0: all."""

    def share(self, asked: Demonstration) -> float:
        """Return the share of the demonstration."""
        raise NotImplementedError

    def hints_all(self, samples: int) -> bool:
        """True if all of a group's `samples` responses have a hint, as long as there are hints."""
        return not 0 < self.samples < samples

    def __call__(self, asked: Demonstration) -> Tokens:
        tokens = math.floor(self.share(asked) * asked.length + EPS)
        return np.where((asked.sample < self.samples) | (self.samples == 0), tokens, 0)


@dataclass(frozen=True, kw_only=True)
class CosineHints(ShareHints):
    """A share that falls along half a cosine, for one response of a group (Prefix-RFT, arXiv 2507.01679)."""

    kind: Literal["cosine"] = "cosine"
    first: Share = 0.95
    """Share in the first step."""
    last: Share = 0.05
    """Share in the last of `steps`, and after it."""
    steps: Count = 0
    """Steps of RL in which the share falls; 0: all of the run."""
    samples: Count = 1

    def share(self, asked: Demonstration) -> float:
        done = min(asked.step / max((self.steps or asked.steps) - 1, 1), 1.0)
        return self.last + (self.first - self.last) * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True, kw_only=True)
class StagedHints(ShareHints):
    """One share after the other, then none (QuestA, arXiv 2507.13266, where the hint is part of the prompt; here the response
    begins with it)."""

    kind: Literal["stages"] = "stages"
    shares: Annotated[tuple[Share, ...], MinLen(1)] = (0.5, 0.25)
    """Share of each stage."""
    until: tuple[Annotated[int, Gt(0)], ...] = ()
    """Step of RL at which each stage ends. Empty: the stages and the time without hints are equally long."""

    @property
    def problems(self) -> list[str]:
        """Errors about the ends of the stages."""
        if self.until and len(self.until) != len(self.shares):
            return [f"{WHERE}.until: got {len(self.until)} steps, want {len(self.shares)}, one for each of shares"]
        if list(self.until) != sorted(set(self.until)):
            return [f"{WHERE}.until: got {list(self.until)}, want ascending steps"]
        return []

    def share(self, asked: Demonstration) -> float:
        parts = len(self.shares) + 1
        until = self.until or [asked.steps * i / parts for i in range(1, parts)]
        return (*self.shares, 0.0)[sum(asked.step >= end for end in until)]


@dataclass(frozen=True, kw_only=True)
class LevelHints(HintRule):
    """Demonstrations in m steps, of which the response with sample number i begins with i mod m (StepHint, arXiv 2507.02841).

    StepHint cuts where a model thinks it likelier that the reasoning ends here than one token later; here a text marks the ends.
    """

    kind: Literal["levels"] = "levels"
    levels: Annotated[int, Ge(2)] = 4
    """m."""
    step_end: str = ""
    """Text at which a step ends. If there are more than m steps, neighbors are one. Empty: m parts of equally many tokens."""
    steps: Count = 0
    """Steps of RL with hints; 0: all of the run."""

    def hints_all(self, samples: int) -> bool:
        """False: every group has responses without a hint."""
        return False

    def __call__(self, asked: Demonstration) -> Tokens:
        ends = np.array([0, *asked.step_ends])
        level = asked.sample % self.levels * (asked.step < (self.steps or asked.steps))
        return ends[level * len(ends) // self.levels]


@dataclass(frozen=True, kw_only=True)
class OwnHints(HintRule, OwnPart):
    """A custom rule: a function of an `experience.hints.Demonstration` that returns the tokens of each response's hint."""

    arguments: ClassVar[tuple[str, ...]] = ("demonstration",)
    step_end: str = ""
    """Text at which a step of the demonstration ends. Empty: every token is one."""

    def hints_all(self, samples: int) -> bool:
        """False: it is not known."""
        return False

    def __call__(self, asked: Demonstration) -> Tokens:
        found = np.asarray(self.made()(asked))
        if found.shape != asked.sample.shape or found.dtype.kind not in "iu" or (found < 0).any():
            raise UserError(
                f"{WHERE} {self.function}: got {found.tolist()}, want {len(asked.sample)} whole numbers, 0 or more: the tokens of "
                "each response's hint"
            )
        return found


def hinted(groups: "Groups") -> Bool[np.ndarray, " B"]:
    """Return True for the responses that began with a hint."""
    return np.zeros(len(groups.keep), bool) if groups.hint is None else groups.hint > 0

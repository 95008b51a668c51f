"""What does not fit between a run's control, its tokenizer, its limits and its right responses. Imports no jax."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxrl_llm.config import mixtures
from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.control.automaton import REFUSED, TokenAutomaton
from jaxrl_llm.control.config import (
    UNLIMITED,
    ChoiceControl,
    Control,
    JsonSchemaControl,
    NoControl,
    RegexControl,
    budget_of,
)
from jaxrl_llm.errors import UserError
from jaxrl_llm.rollout.built_control import build_control, limit_problem
from jaxrl_llm.rollout.config import RolloutConfig
from jaxrl_llm.tasks.rows import Row
from jaxrl_llm.tasks.task import Task

MAX_ROWS = 1000
"""Right responses that are followed through the automaton, of each split."""


class ControlFindings(NamedTuple):
    problems: list[str]
    cautions: list[str]
    """What is accepted and suggests a mistake."""


def check_control(cfg: RunConfig, task: Task) -> ControlFindings:
    """Check `rollout.control`, which is built for the task's tokenizer."""
    control, problems = cfg.rollout.control, []
    if isinstance(control, NoControl):
        return ControlFindings([], [])
    if cfg.rollout.stop and _has_form(control):
        problems.append(
            f"rollout.stop: got {list(cfg.rollout.stop)} beside rollout.control {control.kind}, want []: a stop string would end "
            "responses that are not yet what the control says"
        )
    try:
        automaton = build_control(control, task.tokenizer, task.eos)
    except UserError as error:
        return ControlFindings([*problems, str(error)], [])
    return ControlFindings(problems + _limits(cfg, automaton), _cautions(cfg, task, automaton))


def _has_form(control: Control) -> bool:
    """Whether a response is right as a whole only."""
    then = getattr(control, "then", None)
    return isinstance(control, RegexControl | JsonSchemaControl | ChoiceControl) or (
        then is not None and _has_form(then)
    )


def _limits(cfg: RunConfig, automaton: TokenAutomaton) -> list[str]:
    """Errors about limits within which no row can end."""
    limits = {"rollout.max_new_tokens": cfg.rollout.max_new_tokens}
    for index, part in enumerate(mixtures.parts_of(cfg)):
        if part.max_new_tokens:
            limits[f"task.tasks.{index}.max_new_tokens"] = part.max_new_tokens
    found = ((name, limit_problem(limit, automaton, budget_of(cfg.rollout.control))) for name, limit in limits.items())
    return [f"{name}: {wrong}" for name, wrong in found if wrong]


def _cautions(cfg: RunConfig, task: Task, automaton: TokenAutomaton) -> list[str]:
    found, rollout = [], cfg.rollout
    if (longest := longest_below(automaton, rollout.min_new_tokens)) is not None:
        found.append(
            f"rollout.min_new_tokens: {rollout.min_new_tokens}, and the control allows no response of more than {longest} tokens, "
            "whose end is then not put off"
        )
    if rollout.max_new_tokens <= budget_of(rollout.control) < UNLIMITED:
        found.append(
            f"rollout.control: its budget of {budget_of(rollout.control)} tokens is never used up, since rollout.max_new_tokens is "
            f"{rollout.max_new_tokens}"
        )
    found += _refused(
        "rollout.control: eval/exact is 0 where the right response is refused", automaton, task.held_out, rollout
    )
    if cfg.warm_start.steps:
        found += _refused(
            "warm_start: trains on responses that rollout.control refuses", automaton, task.train, rollout
        )
    return found


def _refused(what: str, automaton: TokenAutomaton, rows: Sequence[Row], cfg: RolloutConfig) -> list[str]:
    """A warning that says of how many right responses it is true, with an example; none if the control allows all."""
    known = [row for row in rows[:MAX_ROWS] if row.target is not None]
    refused = [row for row in known if not allows(automaton, row.target, budget_of(cfg.control))]
    if not refused:
        return []
    row = refused[0]
    return [f"{what}, {len(refused)} of {len(known)}, as {row.response!r} to {row.prompt[:80]!r}"]


def allows(automaton: TokenAutomaton, tokens: Sequence[int], budget: int) -> bool:
    """Return whether a control allows a whole response: as `ControlSet.allows`, without tables.

    Args:
        automaton: of the control.
        tokens: of the response.
        budget: slot from which states expire.
    """
    state = automaton.start
    for slot, token in enumerate(tokens):
        state = automaton.expires[state] if slot >= budget else state
        state = automaton.next[state, automaton.classes[token]]
        if state == REFUSED:
            return False
    return True


def longest_below(automaton: TokenAutomaton, length: int) -> int | None:
    """Return the length of the longest response, in tokens, if it is less than `length`; None if there are longer ones."""
    states, seen = np.array([automaton.start]), set()
    for n in range(1, length):
        after = np.unique(automaton.next[states])
        states = after[(after != REFUSED) & ~automaton.ends[after]]
        if not len(states):
            return n
        if states.tobytes() in seen:
            return None
        seen.add(states.tobytes())
    return None

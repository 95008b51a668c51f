"""What does not fit between a run's control, its tokenizer, its limits and its right responses. Imports no jax."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxrl_llm.config import mixtures
from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.control.automaton import REFUSED, TokenAutomaton, states_of
from jaxrl_llm.control.config import (
    ChoiceControl,
    Control,
    JsonSchemaControl,
    NoControl,
    RegexControl,
    budget_of,
)
from jaxrl_llm.errors import UserError
from jaxrl_llm.experience.hints import NoHints
from jaxrl_llm.rollout.built_control import build_control, limit_problem
from jaxrl_llm.rollout.config import RolloutConfig
from jaxrl_llm.tasks.rows import Row
from jaxrl_llm.tasks.task import Task

MAX_ROWS = 1000
"""Right responses of each split that are followed through the automaton for a warning."""


class ControlFindings(NamedTuple):
    problems: list[str]
    cautions: list[str]
    """What is accepted and suggests a mistake."""


def check_control(cfg: RunConfig, task: Task, trains: bool) -> ControlFindings:
    """Check `rollout.control`, which is built for the task's tokenizer. `trains`: check its hints too."""
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
    problems += _limits(cfg, task, automaton) + (_hints(cfg, task, automaton) if trains else [])
    return ControlFindings(problems, _cautions(cfg, task, automaton))


def _has_form(control: Control) -> bool:
    """Whether a response is right as a whole only."""
    then = getattr(control, "then", None)
    return isinstance(control, RegexControl | JsonSchemaControl | ChoiceControl) or (
        then is not None and _has_form(then)
    )


def _limits(cfg: RunConfig, task: Task, automaton: TokenAutomaton) -> list[str]:
    """Errors about limits within which no row can end."""
    limits, of_tasks = {"rollout.max_new_tokens": cfg.rollout.max_new_tokens}, {}
    for index, part in enumerate(mixtures.parts_of(cfg)):
        if part.max_new_tokens:
            limits[f"task.tasks.{index}.max_new_tokens"] = of_tasks[part.name] = part.max_new_tokens
    rows = (*task.train, *task.held_out)
    if own := [row for row in rows if row.max_new_tokens not in (None, of_tasks.get(row.task))]:
        least = min(own, key=lambda row: row.max_new_tokens)
        limits[f"task.prompting.columns.max_new_tokens: {least.where}"] = least.max_new_tokens
    found = ((name, limit_problem(limit, automaton, budget_of(cfg.rollout.control))) for name, limit in limits.items())
    return [f"{name}: {wrong}" for name, wrong in found if wrong]


def _hints(cfg: RunConfig, task: Task, automaton: TokenAutomaton) -> list[str]:
    """Errors about hints that the control refuses."""
    if isinstance(cfg.experience.hints, NoHints) or not (refused := _refused(automaton, task, task.train, cfg.rollout)):
        return []
    return [
        f"experience.hints: got right responses that rollout.control refuses, {refused}, want a control that allows them, since a "
        "hint is a part of one; or hints of kind none"
    ]


def _cautions(cfg: RunConfig, task: Task, automaton: TokenAutomaton) -> list[str]:
    found, rollout = [], cfg.rollout
    if (longest := longest_below(automaton, rollout.min_new_tokens)) is not None:
        found.append(
            f"rollout.min_new_tokens: {rollout.min_new_tokens}, and the control allows no response of more than {longest} tokens, "
            "whose end is then not put off"
        )
    if refused := _refused(automaton, task, task.held_out[:MAX_ROWS], rollout):
        found.append(f"rollout.control: eval/exact is 0 where the right response is refused, {refused}")
    if cfg.warm_start.steps and (refused := _refused(automaton, task, task.train[:MAX_ROWS], rollout)):
        found.append(f"warm_start: trains on responses that rollout.control refuses, {refused}")
    return found


def _refused(automaton: TokenAutomaton, task: Task, rows: Sequence[Row], cfg: RolloutConfig) -> str:
    """Say how many right responses the control refuses, with an example; "": none."""
    known = [row for row in rows if row.target is not None]
    refused = [row for row in known if not allows(automaton, row.target, budget_of(cfg.control))]
    if not refused:
        return ""
    text = task.tokenizer.decode(refused[0].target.tolist())
    return f"{len(refused)} of {len(known)}, as {text!r} to {refused[0].prompt[:80]!r}"


def allows(automaton: TokenAutomaton, tokens: Sequence[int], budget: int) -> bool:
    """Return whether a control allows a whole response.

    Args:
        automaton: of the control.
        tokens: of the response.
        budget: slot from which states expire.
    """
    return bool(states_of(automaton, automaton.start, 0, tokens, budget)[-1] != REFUSED)


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

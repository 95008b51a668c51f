"""Hints in a run: the first tokens of known responses, forced upon requests as a rule says."""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxrl_llm.experience import by_prompt
from jaxrl_llm.experience.hints import Demonstration, HintRule
from jaxrl_llm.roles.collector import Asked
from jaxrl_llm.tasks.rows import Row
from jaxrl_llm.tasks.stream import completion_limits
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import Groups

# Of a row of the task: responses without a hint at earlier visits.
NONE, WRONG, RIGHT = 0, 1, 2


def demonstration_of(row: Row, eos: tuple[int, ...]) -> Int[np.ndarray, " n"]:
    """Return the tokens of a row's known response without the end token; none if it is unknown."""
    ids = np.zeros(0, np.int32) if row.target is None else row.target
    return ids[:-1] if len(ids) and ids[-1] in eos else ids


class NoHinting:
    """Every response begins at its first token."""

    def init(self, num_rows: int) -> tuple:
        return ()

    def add(self, asked: Asked, state: tuple, step: int) -> Asked:
        return asked

    def mark(self, groups: Groups) -> Groups:
        return groups

    def observe(self, state: tuple, groups: Groups) -> tuple:
        return state


@dataclass(frozen=True)
class Hinting:
    """Hints by a rule. Its state is what is known of each row of the task, or () if the rule does not ask."""

    rule: HintRule
    task: Task
    most: int
    """Completion slots."""
    first_step: int
    """Step of the run at which RL begins."""
    steps: int
    """Steps of RL."""

    def init(self, num_rows: int) -> Any:
        return np.full(num_rows, NONE, np.int8) if self.rule.only_unsolved else ()

    def add(self, asked: Asked, state: Any, step: int) -> Asked:
        """Return the requests with the hints of their rows. `step`: of the run."""
        prompts, hints = asked.prompts, []
        limits = completion_limits(self.task.train, prompts.row, self.most)
        each = zip(prompts.row.tolist(), asked.samples, asked.first_sample, limits.tolist(), strict=True)
        for row, samples, first, limit in each:
            hints += self._of(row, first + np.arange(samples), limit, state, step - self.first_step)
        return asked._replace(hints=hints)

    def _of(self, row: int, sample: Int[np.ndarray, " n"], limit: int, state: Any, step: int) -> list[list[int]]:
        """Return the hint of each response. At least one token of the demonstration, and of the limit, is left to the policy."""
        ids = demonstration_of(self.task.train[row], self.task.eos).tolist()
        most = min(len(ids), limit) - 1
        if most < 1 or (self.rule.only_unsolved and state[row] != WRONG):
            return [[] for _ in sample]
        tokens = self.rule(Demonstration(step, self.steps, row, sample, len(ids), self._step_ends(ids)))
        return [ids[:n] for n in np.minimum(tokens, most).tolist()]

    def _step_ends(self, ids: list[int]) -> Int[np.ndarray, " k"]:
        end = getattr(self.rule, "step_end", "")
        if not end:
            return np.arange(1, len(ids))
        *steps, _ = self.task.tokenizer.decode(ids).split(end)
        last = self.task.tokenizer.tokens_at(ids, list(accumulate(len(step) + len(end) for step in steps)))
        return np.unique([i + 1 for i in last if i + 1 < len(ids)]).astype(int)

    def mark(self, groups: Groups) -> Groups:
        """Return the groups with the tokens of their hints marked, if they are trained on."""
        slots = np.arange(groups.rollouts.tokens.shape[1])
        return groups.replace(taught=slots < groups.hint[:, None]) if self.rule.train else groups

    def observe(self, state: Any, groups: Groups) -> Any:
        """Return the state after a step. `groups`: its graded responses without a hint."""
        if not self.rule.only_unsolved:
            return state
        right, state = by_prompt.reduced(np.add, groups.measure("success"), groups), state.copy()
        graded = np.flatnonzero(~np.isnan(right) & (groups.rollouts.size > 0))
        found = np.where(right[graded] > 0, RIGHT, WRONG).astype(np.int8)
        np.maximum.at(state, groups.rollouts.prompts.row[graded], found)
        return state

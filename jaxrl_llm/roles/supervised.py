"""Supervised training: cross-entropy on the task's right responses, some of them replaced by wrong ones."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Sharding

from jaxrl_llm.experience.curricula import Order
from jaxrl_llm.parallel import hosts
from jaxrl_llm.roles.state import SupervisedState
from jaxrl_llm.roles.updates import as_floats, without_zero_gradients
from jaxrl_llm.tasks.rows import Row
from jaxrl_llm.tasks.stream import make_prompts, noisy_rows, pad_rows
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import Experience
from jaxrl_llm.update.batch import fill_batch, supervised
from jaxrl_llm.update.config import WarmStartConfig
from jaxrl_llm.update.packing import BatchShape
from jaxrl_llm.update.step import Update


@dataclass(frozen=True)
class Supervised:
    cfg: WarmStartConfig
    task: Task
    order: Order
    """Order of the task's rows."""
    seed: int
    """Seed of the wrong responses."""
    right: Callable[[list[Row]], Experience]
    """See `right_responses`."""
    update: Update
    shape: BatchShape
    rows: Sharding
    """Sharding of a batch."""

    def __call__(self, state: SupervisedState) -> tuple[SupervisedState, dict[str, float]]:
        """One update; the state is donated."""
        step = int(state.step)
        places = range(step * self.cfg.rows, (step + 1) * self.cfg.rows)
        rows = noisy_rows(self.task, self.order, places, self.cfg.noise, self.seed)
        batch, _ = fill_batch(self.right(rows), self.shape, self.task.pad)
        train, metrics = self.update(state.train, hosts.put(batch, self.rows))
        metrics, _ = without_zero_gradients(as_floats(jax.device_get(metrics)))
        return state._replace(step=np.array(step + 1), train=train), metrics


def right_responses(task: Task, slots: int, temperature: float, rows: list[Row]) -> Experience:
    """Prompts with their right responses as completions to train on or to score.

    Args:
        task: pads the tokens.
        slots: C, completion slots.
        temperature: at which the responses are scored.
        rows: of the task.
    """
    index = np.arange(len(rows))
    prompts = make_prompts(task, rows, index, index)
    target, length = pad_rows([row.target for row in rows], slots, task.pad)
    return supervised(prompts, target, length, temperature)

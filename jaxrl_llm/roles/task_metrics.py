"""What a step sampled of each task of a mixture, and of each form of the prompts."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Shaped

from jaxrl_llm.experience.independent_rows import independent
from jaxrl_llm.tasks.stream import rows_asked
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import Groups


def describe_tasks(groups: Groups, task: Task) -> dict[str, float]:
    """Metrics of each task of a mixture, `task/<name>/...`: its share of the groups, means over its graded rows without a hint of
    reward and success, and over all its rows of the length. A mean over nothing is absent; none at all without a mixture."""
    of_group = np.array([task.train[i].task for i in groups.rollouts.prompts.row])
    return _of_each("task", task.weights, groups, of_group)


def describe_forms(groups: Groups, task: Task) -> dict[str, float]:
    """Metrics of the prompts, if not every row is asked by its task's `prompt` alone: tokens of a prompt and few-shot examples in
    it, means over the groups; and of each form `form/<name>/...`, as in `describe_tasks`."""
    prompts = groups.rollouts.prompts
    asks = [row.asks for row in rows_asked(task.train, prompts)]
    if not any(asks):
        return {}
    found = {
        "prompts/mean_length": float(np.mean(prompts.length)),
        "prompts/examples": float(np.mean([each.num_examples if each else 0 for each in asks])),
    }
    return found | _of_each("form", task.forms, groups, np.array([each.form if each else "" for each in asks]))


def _of_each(prefix: str, names: Iterable[str], groups: Groups, of_group: Shaped[np.ndarray, " P"]) -> dict[str, float]:
    """Metrics of groups with the same name. `of_group`: that of each."""
    rollouts, reward, success = groups.rollouts, groups.measure("reward"), groups.measure("success")
    found = {}
    for name in names:
        rows = (rollouts.prompt >= 0) & (of_group == name)[rollouts.prompt]
        graded = rows & ~np.isnan(reward) & independent(groups)
        found[f"{prefix}/{name}/groups"] = float(np.mean(of_group == name))
        if rows.any():
            found[f"{prefix}/{name}/mean_length"] = float(rollouts.length[rows].mean())
        if graded.any():
            found |= {
                f"{prefix}/{name}/reward": float(reward[graded].mean()),
                f"{prefix}/{name}/success": float(success[graded].mean()),
            }
    return found

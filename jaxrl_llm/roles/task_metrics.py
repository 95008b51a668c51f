"""What a step sampled of each task of a mixture."""

import numpy as np

from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import Groups


def describe_tasks(groups: Groups, task: Task) -> dict[str, float]:
    """Metrics of each task of a mixture, `task/<name>/...`: its share of the groups, and means over its graded rows of reward and
    success, over all its rows of the length. A mean over nothing is absent; none at all without a mixture."""
    rollouts, reward, success = groups.rollouts, groups.measure("reward"), groups.measure("success")
    of_group, found = np.array([task.train[i].task for i in rollouts.prompts.row]), {}
    for name in task.weights:
        rows = (rollouts.prompt >= 0) & (of_group == name)[rollouts.prompt]
        graded = rows & ~np.isnan(reward)
        found[f"task/{name}/groups"] = float(np.mean(of_group == name))
        if rows.any():
            found[f"task/{name}/mean_length"] = float(rollouts.length[rows].mean())
        if graded.any():
            found |= {
                f"task/{name}/reward": float(reward[graded].mean()),
                f"task/{name}/success": float(success[graded].mean()),
            }
    return found

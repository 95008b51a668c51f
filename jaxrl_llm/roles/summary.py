"""Summary of a step's rollouts: metrics under TRL's names, and responses as text."""

import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from jaxrl_llm.distribution.control_tables import ControlTables
from jaxrl_llm.environments.grader_pool import Failure, component_metrics
from jaxrl_llm.experience.independent_rows import independent
from jaxrl_llm.perf.utilization import DecodeRates
from jaxrl_llm.roles.allowed_sets import AllowedSet, allowed_in_row
from jaxrl_llm.roles.stage_metrics import describe_stages
from jaxrl_llm.roles.stored_rollouts import trajectory_rows
from jaxrl_llm.roles.task_metrics import describe_forms, describe_tasks
from jaxrl_llm.roles.tree_metrics import describe_trees
from jaxrl_llm.roles.updates import as_floats
from jaxrl_llm.rollout.session import Stats
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import Credit, Finish, Groups, select_groups


def describe(groups: Groups, graders: Sequence[str], task: Task | None = None) -> dict[str, float]:
    """Metrics of all groups that a step sampled, after the filter, most under TRL's names; a mean over nothing is absent.

    Args:
        groups: of the step.
        graders: names of the graders.
        task: whose training rows they are; a mixture has metrics per task too.
    """
    rollouts, own = groups.rollouts, groups.rollouts.prompt >= 0
    graded = own & (groups.failure == Failure.NONE)[rollouts.prompt]
    reward, length, alone = groups.reward[graded].astype(np.float64), rollouts.length[own], graded & independent(groups)
    metrics = {
        "completions/mean_length": length.mean(),
        "completions/min_length": length.min(),
        "completions/max_length": length.max(),
        "completions/clipped_ratio": np.mean(rollouts.finish[own] == Finish.LENGTH),
        "completions/tokens": length.sum(),
        "completions/crc32": zlib.crc32(rollouts.tokens.tobytes()),
        "prompts/first_uid": rollouts.prompts.uid[0],
        "groups/graded": len(np.unique(rollouts.prompt[graded])),
        "groups/kept": groups.kept.sum(),
        "sampling/mean_logprob": rollouts.behavior_logprobs.sum() / rollouts.sampled.sum(),
        "sampling/entropy": rollouts.entropy.sum() / rollouts.sampled.sum(),
    }
    if alone.any():
        metrics["reward"] = groups.reward[alone].astype(np.float64).mean()
    # Relative to the first of each group, so that equal rewards have a deviation of exactly 0.
    std = [(group - group[0]).std(ddof=1) for group in _groups_of(reward, rollouts.prompt[graded]) if len(group) > 1]
    if std:
        metrics |= {"reward_std": np.mean(std), "frac_reward_zero_std": np.mean(np.equal(std, 0))}
    if rollouts.control_state is not None:
        metrics["control/forced_share"] = 1 - rollouts.sampled[own].sum() / length.sum()
    if rollouts.trunk is not None:
        metrics |= describe_trees(rollouts)
    if groups.step_reward is not None and graded.any():
        metrics["rewards/steps"] = np.count_nonzero(~np.isnan(groups.step_reward[graded])) / np.count_nonzero(graded)
    metrics |= describe_stages(groups)
    if task:
        metrics |= describe_tasks(groups, task) | describe_forms(groups, task)
    metrics |= component_metrics(groups.components, alone, groups.failure, groups.failed_by, graders)
    return as_floats(metrics)


def _groups_of(x: np.ndarray, prompt: np.ndarray) -> list[np.ndarray]:
    """Return the numbers of each prompt that has some. `prompt`: of each, ascending."""
    return np.split(x, np.flatnonzero(np.diff(prompt)) + 1) if len(x) else []


def describe_engine(stats: Stats, rates: DecodeRates | None) -> dict[str, float]:
    """Metrics of the engine: active rows per step, fraction of row-steps spent on rows that had already finished, and the time
    that the steps need at the machine's measured rates, as a fraction of the time they took.

    Args:
        stats: of the call.
        rates: measured ceilings; None: not measured.
    """
    found = {
        "rollout/steps": float(stats.steps),
        "rollout/segments": float(stats.chunks),
        "rollout/live_rows": stats.tokens / max(stats.steps, 1),
        "rollout/waste": 1 - stats.tokens / max(stats.row_steps, 1),
        "sampling/support_overflow": stats.overflow / max(stats.tokens, 1),
    }
    return found if rates is None else found | {"rollout/ceiling_fraction": stats.least_seconds(*rates) / stats.seconds}


def advantage_of(fresh: Groups, trained: Groups, credit: Credit) -> Float[np.ndarray, "B C"]:
    """Return the advantages of the rows of `fresh`, 0 for those that are not trained on. The replay may have moved their rows."""
    found = np.zeros(fresh.rollouts.tokens.shape)
    names = (
        zip(part.rollouts.prompts.uid[part.rollouts.prompt].tolist(), part.rollouts.sample.tolist(), strict=True)
        for part in (trained, fresh)
    )
    # Rows of a file may have the same names.
    reused = np.zeros(len(trained.keep), bool) if trained.reused is None else trained.reused
    place = {name: b for b, name in enumerate(next(names)) if not reused[b]}
    for b, name in enumerate(next(names)):
        if fresh.keep[b] and name in place:
            found[b] = credit.advantage[place[name]]
    return found


def replayed_rows(fresh: Groups, trained: Groups) -> dict[str, list[int]]:
    """Return the rows of the task of the groups that are stored ones or have stored responses; nothing if none came back."""
    prompts = trained.rollouts.prompts
    back = ~np.isin(prompts.uid, fresh.rollouts.prompts.uid) & (trained.rollouts.size > 0)
    if trained.reused is not None:
        back[trained.rollouts.prompt[trained.reused]] = True
    rows = prompts.row[back]
    return {"replay/task_rows": rows.tolist()} if len(rows) else {}


def responses(
    task: Task, groups: Groups, advantage: np.ndarray, num_groups: int, tables: ControlTables | None = None
) -> list[dict]:
    """Records of the rows of the first `num_groups` groups: as in a trajectory file, with the tokens' texts, the advantage and
    what the control allowed.

    Args:
        task: decodes the tokens.
        groups: of a step.
        advantage: `[B C]`; the mean over a row's tokens is recorded.
        num_groups: number of groups; -1: all.
        tables: in which `control_state` is read, NumPy; None: nothing was controlled.
    """
    rollouts, token = groups.rollouts, task.tokenizer.token
    own = np.flatnonzero((rollouts.prompt >= 0) & ((rollouts.prompt < num_groups) | (num_groups < 0)))
    shown = select_groups(groups, np.unique(rollouts.prompt[own]))
    return [
        {
            **row,
            "tokens": [token(i) for i in row["ids"]],
            "advantage": float(np.mean(advantage[b, : len(row["ids"])])),
            **_allowed(task, allowed_in_row(tables, rollouts, b, task.num_tokens)),
        }
        for b, row in zip(own.tolist(), trajectory_rows(task, task.train, shown), strict=True)
    ]


def _allowed(task: Task, sets: list[AllowedSet | None]) -> dict[str, list]:
    """Columns of a row whose tokens were not all sampled freely; null where every token was allowed."""
    if not any(sets):
        return {}
    return {
        "num_allowed": [one and one.size for one in sets],
        "allowed": [one and [task.tokenizer.token(i) for i in one.first] for one in sets],
    }

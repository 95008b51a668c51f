"""Tasks of a mixture and the graders of each: what the config says, and what does not fit together. Imports no jax."""

import dataclasses

from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.environments.config import GraderConfig
from jaxrl_llm.experience.config import Shuffled
from jaxrl_llm.tasks.config import MixtureTask, SingleTask, TaskPart


def parts_of(cfg: RunConfig) -> tuple[TaskPart, ...]:
    """Return the tasks of a mixture; none if there is one task only."""
    return cfg.task.tasks if isinstance(cfg.task, MixtureTask) else ()


def single_tasks(cfg: RunConfig) -> dict[str, SingleTask]:
    """Return each task by name; a single one has the name ""."""
    return {part.name: part.task for part in parts_of(cfg)} or {"": cfg.task}


def task_names(cfg: RunConfig) -> list[str]:
    """Return the names of the tasks; that of a single one is ""."""
    return list(single_tasks(cfg))


def most_graders(cfg: RunConfig) -> int:
    """Return the number of graders of the task that has most."""
    return max(sum(grader.grades(name) for grader in cfg.reward.graders) for name in task_names(cfg))


def grades_all(cfg: RunConfig, grader: GraderConfig) -> bool:
    """Return whether the grader grades every task."""
    return all(map(grader.grades, task_names(cfg)))


def problems(cfg: RunConfig) -> list[str]:
    """Errors about the tasks of a mixture, and about graders of tasks."""
    found, names = [], [part.name for part in parts_of(cfg)]
    for index, part in enumerate(parts_of(cfg)):
        if part.name in names[:index]:
            found.append(f"task.tasks.{index}.name: got {part.name!r} again, want distinct names")
        most = cfg.rollout.max_new_tokens
        if (part.max_new_tokens or 0) > most:
            found.append(
                f"task.tasks.{index}.max_new_tokens: got {part.max_new_tokens}, want at most rollout.max_new_tokens ({most})"
            )
        if not any(grader.grades(part.name) for grader in cfg.reward.graders):
            found.append(
                f"task.tasks.{index}: got no grader for the task {part.name!r}, want it in reward.graders.0.tasks, say"
            )
    for index, grader in enumerate(cfg.reward.graders):
        for name in dict.fromkeys(grader.tasks):
            if name not in names:
                want = f"want some of {', '.join(names)}" if names else "want none: task is no mixture"
                found.append(f"reward.graders.{index}.tasks: got {name!r}, {want}")
    return found


def training_problems(cfg: RunConfig) -> list[str]:
    """Errors about weights that nothing reads, and about stages that judge all tasks by a grader of some."""
    found, curriculum = [], cfg.experience.curriculum
    if len({part.weight for part in parts_of(cfg)}) > 1 and not isinstance(curriculum, Shuffled):
        shares = ", ".join(f"{part.name}: {part.weight:g}" for part in parts_of(cfg))
        found.append(
            f"experience.curriculum: got {curriculum.kind} beside task weights, which only the curriculum shuffled reads; want "
            f"equal weights, or {{kind: stratified, column: task, shares: {{{shares}}}}}"
        )
    some = {grader.label: grader.tasks for grader in cfg.reward.graders if not grades_all(cfg, grader)}
    for where, by in _measures(cfg.experience, "experience"):
        if by in some:
            found.append(
                f"{where}: got {by!r}, which grades {', '.join(some[by])} alone, want success, reward, or a grader of every task"
            )
    return found


def _measures(section: object, where: str) -> list[tuple[str, str]]:
    """Return the settings `by` of a section and its parts, each with its path."""
    if isinstance(section, tuple):
        return [found for i, part in enumerate(section) for found in _measures(part, f"{where}.{i}")]
    if not dataclasses.is_dataclass(section):
        return []
    found = []
    for field in dataclasses.fields(section):
        value, path = getattr(section, field.name), f"{where}.{field.name}"
        found += [(path, value)] if field.name == "by" else _measures(value, path)
    return found

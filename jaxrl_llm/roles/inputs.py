"""Inputs of a run, read before it starts: model config, task and tokenizer, graders; and what is wrong with them. Imports no jax,
so that a wrong name is reported at once.
"""

import dataclasses
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import NamedTuple, TypeVar

from jaxrl_llm.config import consistency, mixtures
from jaxrl_llm.config.own_part import own_problems
from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.environments.grader import Sample, unreadable_rows
from jaxrl_llm.environments.grader import problems as grader_problems
from jaxrl_llm.errors import UserError
from jaxrl_llm.experience.config import OVER_A_COLUMN, NoHints
from jaxrl_llm.experience.hints import HintRule
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.hf.config import read_config
from jaxrl_llm.model.hf.source import resolve
from jaxrl_llm.roles.control_checks import ControlFindings, check_control
from jaxrl_llm.tasks import trajectories
from jaxrl_llm.tasks.rows import Row, longest_target
from jaxrl_llm.tasks.task import Task, load_task
from jaxrl_llm.tasks.tokenizer import stop_problems

Read = TypeVar("Read")


class Inputs(NamedTuple):
    cfg: RunConfig
    """With the config of a pretrained model in place of its path, if it can be read."""
    task: Task | None
    missing: tuple[str, ...]
    """Messages on names and files that do not exist or cannot be read."""
    misfits: tuple[str, ...]
    """Messages on what does not fit together."""
    cautions: tuple[str, ...] = ()
    """Warnings about what training accepts."""

    @property
    def problems(self) -> list[str]:
        return [*self.missing, *self.misfits]

    def refuse(self) -> None:
        """Raise UserError if something is missing, with everything else that can be checked without devices."""
        if self.missing:
            least = prod(n for n in self.cfg.mesh.sizes() if n > 0)
            raise UserError("\n".join([*self.problems, *consistency.problems(self.cfg, least)]))


def read_task(cfg: RunConfig) -> Task:
    return load_task(cfg.task, cfg.tokenizer, cfg.seed)


def read(cfg: RunConfig, trains: bool = False, asked: Callable[[RunConfig], Task] | None = None) -> Inputs:
    """Read the inputs of a run.

    Args:
        cfg: of the run.
        trains: report also what only training cannot do.
        asked: makes the task around a typed prompt, in place of the config's; its rows need no answer.
    """
    missing: list[str] = []
    model = _or_words(missing, lambda: read_model(cfg))
    task = _or_words(missing, lambda: (asked or read_task)(cfg))
    wrong_graders = grader_problems(cfg.reward)
    missing += [*wrong_graders, *own_problems(cfg)]
    whole = cfg if model is None else dataclasses.replace(cfg, model=model)
    found = [*mixtures.problems(cfg), *([] if task is None else task_problems(whole, task))]
    if task is not None and asked is None and not wrong_graders:
        found += unreadable_rows(cfg.reward, [(row.where, _ungraded(row)) for row in (*task.train, *task.held_out)])
    if trains:
        found += consistency.training_problems(cfg)
        if task is not None and isinstance(cfg.experience.curriculum, OVER_A_COLUMN):
            found += cfg.experience.curriculum.misfits([row.columns for row in task.train])
        if task is not None and (wrong := start_problem(cfg, task)):
            missing.append(wrong)
        if not isinstance(cfg.experience.hints, NoHints) and task is not None:
            found += hint_problems(cfg.experience.hints, task)
        if cfg.warm_start.steps and task is not None and not task.has_targets:
            lacking = [name for name, known in task.targets_known.items() if name and not known]
            where = f" for {', '.join(lacking)}" if lacking else ""
            want = f"want the right response: warm_start.steps is {cfg.warm_start.steps}"
            found.append(f"task.response: got nothing{where}, {want}")
    control = ControlFindings([], []) if task is None else check_control(cfg, task, trains)
    cautions = (*consistency.cautions(cfg), *control.cautions) if trains else ()
    return Inputs(whole, task, tuple(missing), (*found, *control.problems), cautions)


def hint_problems(rule: HintRule, task: Task) -> list[str]:
    """Errors about known responses that no hint can be made of."""
    if longest_target(task.train) < 3:
        return [
            f"task.response: got {longest_target(task.train)} tokens at most, want 3 or more, end token included, of some row: "
            f"experience.hints is {rule.kind}, and a hint is a part of a response"
        ]
    end = getattr(rule, "step_end", "")
    if end and not any(end in row.response for row in task.train if row.target is not None):
        return [
            f"experience.hints.step_end: got {end!r}, which is in no known response, want a text that ends a step of one"
        ]
    return []


def start_problem(cfg: RunConfig, task: Task) -> str:
    """Error about the file with which the replay's buffer starts; "" if it can be read, or there is none."""
    if not cfg.experience.start:
        return ""
    try:
        found = trajectories.read(Path(cfg.experience.start), task.tokenizer)
    except UserError as error:
        return f"experience.replay.start: {error}"
    most = cfg.rollout.max_new_tokens
    if long := [t for t in found if len(t.ids) > most]:
        return (
            f"experience.replay.start: {long[0].where}: got {len(long[0].ids)} tokens, and {len(long)} of {len(found)} responses "
            f"have more than rollout.max_new_tokens ({most}), want that many at most"
        )
    if greedy := [t.where for t in found if t.temperature == 0]:
        return (
            f"experience.replay.start: {greedy[0]}: got temperature 0 in {len(greedy)} of {len(found)} responses, want more: "
            "greedy ones have no gradient; or a file of texts alone, prompt and completion"
        )
    bare = [t.where for t in found if t.logprobs is None]
    if not bare:
        return ""
    got = f"experience.replay.start: {bare[0]}: got no logprobs in {len(bare)} of {len(found)} responses, want"
    if cfg.objective.reward_kl.weight:
        return (
            f"{got} those of their tokens as they were sampled, or objective.reward_kl.weight 0: it compares them with the "
            "reference's"
        )
    if (kl := getattr(cfg.objective.loss, "kl", None)) and kl.weight and (kl.to == "behavior" or kl.times == "ratio"):
        return f"{got} those of their tokens as they were sampled, or objective.loss.kl.weight 0: it reads them"
    if getattr(cfg.objective.loss, "shaping", None):
        return ""
    return (
        f"{got} those of their tokens as they were sampled; or objective.loss.shaping: 0.1, as if they had been sampled with "
        "probability 1"
    )


def _ungraded(row: Row) -> Sample:
    """Sample of a row that has no response yet."""
    return Sample(row.text, "", row.answer, "", row.columns, task=row.task)


def refuse_graders(cfg: RunConfig) -> None:
    """Raise UserError if a grader is wrong, as far as that can be checked without a task."""
    if found := grader_problems(cfg.reward):
        raise UserError("\n".join(found))


def _or_words(found: list[str], read: Callable[[], Read]) -> Read | None:
    """Return what `read` returns; append its UserError to `found` instead of raising it, so that all errors are reported."""
    try:
        return read()
    except UserError as error:
        found.append(str(error))
        return None


def read_model(cfg: RunConfig) -> ModelConfig:
    """Model config; a pretrained model's is read from its config.json."""
    if isinstance(cfg.model, ModelConfig):
        return cfg.model
    return read_config(resolve(cfg.model.path), cfg.model.compute)


def task_problems(cfg: RunConfig, task: Task) -> list[str]:
    """Messages on what does not fit between config and task. A pretrained model that could not be read is not checked."""
    found = stop_problems(cfg.rollout.stop, task.tokenizer, cfg.rollout.max_new_tokens)
    if isinstance(cfg.model, ModelConfig):
        found += vocabulary_problems(cfg.model, task.num_tokens)
    if cfg.rollout.max_new_tokens < task.target_slots:
        found.append(
            f"rollout.max_new_tokens: got {cfg.rollout.max_new_tokens}, want at least the {task.target_slots} tokens of the "
            "longest right response"
        )
    for index, part in enumerate(mixtures.parts_of(cfg)):
        slots = longest_target(row for row in (*task.train, *task.held_out) if row.task == part.name)
        if part.max_new_tokens and part.max_new_tokens < slots:
            found.append(
                f"task.tasks.{index}.max_new_tokens: got {part.max_new_tokens}, want at least the {slots} tokens of its longest "
                "right response"
            )
    return found + _limit_problems(cfg, task) + packing_problems(cfg, task.prompt_slots)


def _limit_problems(cfg: RunConfig, task: Task) -> list[str]:
    """Messages on maximum numbers of tokens that columns give to single rows."""
    parts = mixtures.single_tasks(cfg)
    columns = {
        name: part.prompting.columns.max_new_tokens for name, part in parts.items() if hasattr(part, "prompting")
    }
    rows, most = (*task.train, *task.held_out), cfg.rollout.max_new_tokens
    own = [row for row in rows if row.columns.get(columns.get(row.task) or None) is not None]
    long = [row for row in own if row.max_new_tokens > most]
    short = [row for row in own if row.target is not None and len(row.target) > row.max_new_tokens]
    wanted = [
        (long, f"want at most rollout.max_new_tokens ({most})"),
        (short, "want at least the tokens of its right response"),
    ]
    return [
        f"task.prompting.columns.max_new_tokens: {wrong[0].where}: got {wrong[0].max_new_tokens} there, one of {len(wrong)} such "
        f"rows, {want}"
        for wrong, want in wanted
        if wrong
    ]


def vocabulary_problems(model: ModelConfig, num_tokens: int) -> list[str]:
    if model.vocab_size >= num_tokens:
        return []
    return [f"model.vocab_size: got {model.vocab_size}, want at least the tokenizer's {num_tokens}"]


def packing_problems(cfg: RunConfig, prompt_slots: int) -> list[str]:
    """Messages on packed rows that are too short for what one must hold, or longer than a whole minibatch."""
    packing, rollout = cfg.update.packing, cfg.rollout
    if packing.kind == "none" or not packing.slots:
        return []
    together = 2 if cfg.objective.loss.kind == "dpo" else 1
    least = prompt_slots + together * rollout.max_new_tokens
    if packing.slots < least:
        what = "a pair of the loss dpo" if together == 2 else "one sequence"
        return [f"update.packing.slots: got {packing.slots}, want 0 or at least the {least} of {what} at its longest"]
    sequences = max(rollout.prompts // cfg.update.minibatches, 1) * rollout.samples
    most = max(sequences * (prompt_slots + rollout.max_new_tokens), least)
    if packing.slots > most:
        return [
            f"update.packing.slots: got {packing.slots}, want 0 or at most the {most} of all sequences of a minibatch"
        ]
    return []

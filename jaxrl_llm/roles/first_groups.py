"""Groups of a file with which the buffer of a replay starts: graded as fresh ones are, in the columns of the run."""

import logging

import numpy as np

from jaxrl_llm.environments.grader_pool import GraderPool
from jaxrl_llm.errors import UserError
from jaxrl_llm.experience.composition import Composition, compose
from jaxrl_llm.experience.hints import NoHints
from jaxrl_llm.roles.blueprint import Blueprint, fresh_sizes, uses_of
from jaxrl_llm.roles.grading import grade
from jaxrl_llm.roles.known_responses import allowed_rows, under_control
from jaxrl_llm.roles.stored_rollouts import read_trajectories
from jaxrl_llm.tasks.stream import completion_limits
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import COLUMNS, Groups, Rollouts, select_groups

log = logging.getLogger("jaxrl_llm.roles")
WHERE = "experience.replay.start"


def first_groups(blueprint: Blueprint, task: Task, pool: GraderPool, version: int) -> Groups | None:
    """Return the groups with which the buffer starts; None if `experience.replay.start` names no file.

    Responses to prompts that are not trained on are left out, and those of a prompt that are more than a group has are several
    groups. A response without log-probs counts as sampled with probability 1 at the run's temperature (LUFFY, arXiv 2504.14945).

    Args:
        blueprint: of the run.
        task: its training rows have the answers.
        pool: grades the responses.
        version: of the policy when RL starts, which is taken for theirs.

    Raises:
        UserError: the file does not fit the run.
    """
    cfg, replay = blueprint.cfg, blueprint.cfg.experience.replay
    if not cfg.experience.start:
        return None
    slots = (blueprint.prompt_slots, cfg.rollout.max_new_tokens)
    kept = cfg.rollout.max_kept_of(blueprint.vocab.size)
    try:
        found = read_trajectories(replay.start, task, slots, kept, needs_logprobs=False)
    except UserError as error:
        raise UserError(f"{WHERE}: {error}") from None
    known = np.flatnonzero(found.rollouts.prompts.row >= 0)
    if not len(known):
        raise UserError(f"{WHERE}: got no response in {replay.start} to a prompt that is trained on, want one or more")
    if len(known) < len(found.failure):
        others = len(found.failure) - len(known)
        log.warning("%s: %d of %d groups answer no prompt that is trained on", WHERE, others, len(found.failure))
    selected = select_groups(found, known)
    rollouts = selected.rollouts
    unknown = np.isnan(rollouts.behavior_logprobs).any(axis=1)
    temperature = np.where(unknown, np.float32(cfg.rollout.temperature), rollouts.temperature)
    limit = completion_limits(task.train, rollouts.prompts.row, cfg.rollout.max_new_tokens)
    rollouts = under_control(rollouts.replace(temperature=temperature), blueprint.controls, cfg.rollout, limit)
    rollouts = _in_columns_of(uses_of(cfg), rollouts, version)
    graded = grade(rollouts, task, pool).replace(threshold=cfg.evaluation.threshold)
    allowed = allowed_rows(rollouts, blueprint.controls)
    if not allowed.all():
        log.warning("%s: rollout.control does not allow %d of %d responses", WHERE, (~allowed).sum(), len(allowed))
        graded = graded.replace(keep=graded.keep & allowed)
        if not allowed.any():
            raise UserError(f"{WHERE}: got no response in {replay.start} that rollout.control allows, want one or more")
    if not isinstance(cfg.experience.hints, NoHints):
        none = np.zeros(len(graded.keep), np.int32)
        taught = np.zeros(rollouts.sampled.shape, bool) if cfg.experience.trains_hints else None
        graded = graded.replace(hint=none if selected.hint is None else selected.hint, taught=taught)
    if not graded.kept.any():
        raise UserError(f"{WHERE}: got no response in {replay.start} that could be graded: {pool.first_failure}")
    found = _cut(graded, fresh_sizes(cfg).most, task.pad)
    if len(found.failure) > replay.capacity:
        raise UserError(
            f"experience.replay.capacity: got {replay.capacity}, want {len(found.failure)} or more, the groups in {replay.start}"
        )
    return found


def _in_columns_of(uses: tuple[str, ...], rollouts: Rollouts, version: int) -> Rollouts:
    """Return the rollouts with the columns of the run."""
    sampled, logprobs = rollouts.sampled, np.nan_to_num(rollouts.behavior_logprobs, nan=0.0)
    if "truncation" in uses and rollouts.kept_tokens is None:
        raise UserError(
            f"{WHERE}: got responses without kept_tokens, want them, or rollout.top_p 1, top_k 0 and min_p 0: this run scores "
            "tokens under truncation"
        )
    fallback = {"raw_logprobs": logprobs, "kept_tokens": rollouts.kept_tokens}
    columns = {}
    for column in COLUMNS:
        if column.rollouts and column.when:
            mine = getattr(rollouts, column.name)
            columns[column.name] = (fallback[column.name] if mine is None else mine) if column.when in uses else None
    return rollouts.replace(
        behavior_logprobs=logprobs,
        version=np.where(sampled, version, 0).astype(np.int32),
        **columns,
    )


def _cut(groups: Groups, most: int, pad: int) -> Groups:
    """Return the groups with a kept row, none of more than `most` rows."""
    size, kept = groups.rollouts.size, groups.kept
    parts = [
        (p, rows)
        for p, whole in enumerate(np.split(np.arange(size.sum()), np.cumsum(size)[:-1]))
        if kept[p]
        for rows in np.split(whole, range(most, len(whole), most))
    ]
    prompt, rows = zip(*parts, strict=True)
    return compose([groups], Composition(np.array(prompt), list(rows), sum(map(len, rows))), pad)

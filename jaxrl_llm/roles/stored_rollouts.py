"""Sampled groups as rows of a trajectory file, and back as groups: a pure change of form, to the last bit."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxrl_llm.environments.worker import Failure
from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks import trajectories
from jaxrl_llm.tasks.rows import Row
from jaxrl_llm.tasks.stream import pad_rows
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.tasks.trajectories import Trajectory, tokenizer_name
from jaxrl_llm.tasks.trajectory_writer import writing
from jaxrl_llm.types import COLUMNS, Finish, Groups, Prompts, Rollouts, number_rows

# Columns of `Rollouts` and their names in files, where those differ.
NAMES = {"tokens": "ids", "behavior_logprobs": "logprobs"}


def trajectory_rows(task: Task, rows: Sequence[Row], groups: Groups) -> list[dict[str, Any]]:
    """Return one row of a trajectory file per sampled row; filler rows have none.

    Args:
        task: decodes the tokens.
        rows: with the answers; `groups.rollouts.prompts.row` is an index into them.
        groups: NumPy.
    """
    rollouts, prompts, name = groups.rollouts, groups.rollouts.prompts, tokenizer_name(task.tokenizer)
    success = groups.measure("success")
    texts, asked = task.decode(rollouts.tokens, rollouts.length), task.decode(prompts.tokens, prompts.length)
    forms = [_form(rows, prompts, p) for p in range(len(asked))]
    found = []
    for b in np.flatnonzero(rollouts.prompt >= 0).tolist():
        p, n, version = int(rollouts.prompt[b]), int(rollouts.length[b]), rollouts.version[b]
        row, failure = int(prompts.row[p]), Failure(groups.failure[p])
        found.append(
            {
                "tokenizer": name,
                "uid": int(prompts.uid[p]),
                "sample": int(rollouts.sample[b]),
                "row": row,
                "prompt": asked[p],
                "completion": texts[b],
                **({"answer": rows[row].answer} if 0 <= row < len(rows) else {}),
                **({"task": rows[row].task} if 0 <= row < len(rows) and rows[row].task else {}),
                **({"form": forms[p]} if forms[p] else {}),
                "prompt_ids": prompts.tokens[p, : prompts.length[p]].tolist(),
                "ids": rollouts.tokens[b, :n].tolist(),
                "logprobs": rollouts.behavior_logprobs[b, :n],
                "entropy": rollouts.entropy[b, :n],
                "version": int(version[0]) if n and (version[:n] == version[0]).all() else version[:n].tolist(),
                **_optional(groups, b, n),
                "temperature": rollouts.temperature[b],
                "reward": groups.reward[b],
                **(
                    {"components": dict(zip(groups.graders, groups.components[b], strict=True))}
                    if groups.graders
                    else {}
                ),
                "success": None if np.isnan(success[b]) else bool(success[b]),
                "vote": int(groups.vote[b]),
                "finish": Finish(rollouts.finish[b]).name.lower(),
                **({"failure": failure.name.lower(), "failed_by": int(groups.failed_by[p])} if failure else {}),
            }
        )
    return found


def _form(rows: Sequence[Row], prompts: Prompts, p: int) -> str:
    """Name of the form of prompt p; "" for that of the evaluation, and if the row is not known."""
    row = int(prompts.row[p])
    if not 0 <= row < len(rows):
        return ""
    asks = rows[row].asked_by(prompts.uid[p], prompts.tokens[p, : prompts.length[p]]).asks
    return asks.form if asks else ""


def _optional(groups: Groups, b: int, n: int) -> dict[str, Any]:
    """Columns of row b that say something only in some runs."""
    rollouts, found = groups.rollouts, {}
    if not rollouts.sampled[b, :n].all():
        found["sampled"] = rollouts.sampled[b, :n]
    if groups.hint is not None and groups.hint[b]:
        found["hint_tokens"] = int(groups.hint[b])
    if rollouts.trunk is not None and rollouts.trunk[b] != rollouts.sample[b]:
        found |= {"trunk": int(rollouts.trunk[b]), "fork": int(rollouts.fork[b])}
    if rollouts.kept_tokens is not None:
        found["kept_tokens"] = [kept[kept >= 0].tolist() for kept in rollouts.kept_tokens[b, :n]]
    if rollouts.control_state is not None:
        found["control_state"] = rollouts.control_state[b, :n]
    if rollouts.raw_logprobs is not None:
        found["raw_logprobs"] = rollouts.raw_logprobs[b, :n]
    return found if groups.step_reward is None else found | {"step_reward": groups.step_reward[b, :n]}


def write_trajectories(path: str | Path, task: Task, groups: Groups, rows: Sequence[Row] | None = None) -> None:
    """Write sampled groups to a new .jsonl or .parquet file, from which `rl.read_trajectories` gets them back to the last bit.

        rl.write_trajectories("rollouts.parquet", task, groups)

    Args:
        path: of the file, which appears when it is whole.
        task: decodes the tokens.
        groups: graded, NumPy.
        rows: of the prompts; None: `task.train`.

    Raises:
        UserError: the file exists or cannot be written.
    """
    with writing(Path(path)) as write:
        write(trajectory_rows(task, task.train if rows is None else rows, groups))


def read_trajectories(
    path: str | Path,
    task: Task,
    slots: tuple[int, int] = (0, 0),
    kept: int = 0,
    needs_logprobs: bool = True,
    threshold: float = 1.0,
) -> Groups:
    """Return the responses of a file, NumPy; those to one visit of a prompt (equal uid and prompt) are a group.

        groups = rl.read_trajectories("rollouts.parquet", task)

    `row` is the index of the first training row that has the prompt's tokens in one of its forms, or drew them at that visit; -1 if
    there is none. Rows without a reward are not kept,
    unless nobody graded the file: no row has one. In a file of texts alone each response is complete and ends with the end
    token, its temperature is 1, and equal prompts are a group.

    Args:
        path: a .jsonl or .parquet file of `jaxrl sample --out` or `rl.write_trajectories`, a run's rollouts.jsonl, or one with the
            texts `prompt` and `completion`, or `messages`.
        task: with the tokenizer of the ids.
        slots: S and C, prompt and completion slots; 0: the longest.
        kept: K, slots of kept tokens; 0: the most that a token has.
        needs_logprobs: refuse responses without log-probs. If False, those of their sampled tokens are NaN.
        threshold: as in `Groups`.

    Raises:
        UserError: names file, line, what was found and what is wanted.
    """
    found = trajectories.read(Path(path), task.tokenizer)
    bare = [t for t in found if t.logprobs is None]
    if needs_logprobs and bare:
        raise UserError(
            f"{bare[0].where}: got a response without logprobs, and so have {len(bare)} of {len(found)}, want the log-prob of each "
            "token as it was sampled; texts alone serve for supervised training (task: {kind: rollouts, path: ..., keep: all})"
        )
    groups: dict[Any, list[Trajectory]] = {}
    for t in found:
        groups.setdefault(t.group, []).append(t)
    ordered = list(groups.values())
    in_order = [t for group in ordered for t in group]
    prompt, sample = number_rows(np.array([len(group) for group in ordered]))
    sample = np.array([i if t.sample is None else t.sample for i, t in zip(sample, in_order, strict=True)], np.int32)
    prompts = _prompts(task, [group[0] for group in ordered], slots[0])
    columns = _columns(in_order, (len(in_order), _longest(in_order, "ids", slots[1])), kept, task.pad)
    rollouts = Rollouts(
        prompts=prompts,
        prompt=prompt,
        sample=sample,
        length=np.array([len(t.ids) for t in in_order], np.int32),
        temperature=np.array([t.temperature for t in in_order], np.float32),
        finish=np.array([Finish[t.finish.upper()] for t in in_order], np.int32),
        **columns,
        **_trunks(in_order, prompt, sample),
    )
    return _graded(rollouts, ordered, in_order, threshold)


def _trunks(
    found: Sequence[Trajectory], prompt: Int[np.ndarray, " B"], sample: Int[np.ndarray, " B"]
) -> dict[str, Int[np.ndarray, " B"]]:
    """`trunk` and `fork`, if a response left another one of the file. Where that one is missing it is as if sampled by itself."""
    trunk = np.array([t.trunk for t in found], np.int32)
    there = set(zip(prompt.tolist(), sample.tolist(), strict=True))
    left = np.array([each in there for each in zip(prompt.tolist(), trunk.tolist(), strict=True)])
    fork = np.where(left, np.array([t.fork for t in found], np.int32), 0)
    return {"trunk": np.where(left, trunk, sample), "fork": fork.astype(np.int32)} if left.any() else {}


def _prompts(task: Task, found: Sequence[Trajectory], slots: int) -> Prompts:
    """Prompts of the groups that begin with these responses."""
    tokens, length = pad_rows([t.prompt_ids for t in found], _longest(found, "prompt_ids", slots), task.pad)
    row_of = {
        tokens.tobytes(): i
        for i, row in reversed([*enumerate(task.train)])
        for tokens in (*(form.tokens for form in row.forms), row.tokens)
    }
    return Prompts(
        tokens=tokens,
        length=length,
        uid=np.array([i if t.uid is None else t.uid for i, t in enumerate(found)], np.int32),
        row=np.array([row_of.get(t.prompt_ids.tobytes(), _drawn(task, t)) for t in found], np.int32),
    )


def _drawn(task: Task, t: Trajectory) -> int:
    """The row that the file names, if it draws this prompt at the visit; else -1."""
    if t.uid is None or not 0 <= t.row < len(task.train):
        return -1
    return t.row if np.array_equal(task.train[t.row].asked(t.uid).tokens, t.prompt_ids) else -1


def _longest(found: Sequence[Trajectory], name: str, slots: int) -> int:
    """The slots asked for; 0: as many as the longest needs."""
    longest = max(found, key=lambda t: len(getattr(t, name)))
    if slots and len(getattr(longest, name)) > slots:
        raise UserError(f"{longest.where}: got {len(getattr(longest, name))} {name}, want {slots} at most")
    return slots or len(getattr(longest, name))


def _columns(found: Sequence[Trajectory], shape: tuple[int, int], kept: int, pad: int) -> dict[str, np.ndarray]:
    """Columns per token, by their names in `Rollouts`. One that a run need not have is there if all responses have it."""
    columns = {}
    for column in (column for column in COLUMNS if column.rollouts and not column.dims):
        each = [getattr(t, NAMES.get(column.name, column.name)) for t in found]
        if column.when and any(x is None for x in each):
            continue
        columns[column.name] = x = np.full(shape, pad if column.name == "tokens" else column.fill, column.dtype)
        for b, (values, t) in enumerate(zip(each, found, strict=True)):
            x[b, : len(t.ids)] = np.where(t.sampled, np.nan, 0) if values is None else values
    if any(t.kept_tokens for t in found):
        columns["kept_tokens"] = _kept_tokens(found, shape, kept)
    return columns


def _kept_tokens(found: Sequence[Trajectory], shape: tuple[int, int], slots: int) -> np.ndarray:
    if bare := next((t.where for t in found if t.kept_tokens is None), ""):
        raise UserError(
            f"{bare}: got a response without kept_tokens, want them in all responses or in none: they were sampled together"
        )
    t, longest = max(((t, max(map(len, t.kept_tokens))) for t in found), key=lambda x: x[1])
    if slots and longest > slots:
        raise UserError(f"{t.where}: got {longest} kept_tokens of one token, want {slots} at most")
    x = np.full((*shape, slots or longest), -1, np.int32)
    for b, t in enumerate(found):
        for c, kept in enumerate(t.kept_tokens):
            x[b, c, : len(kept)] = kept
    return x


def _graded(
    rollouts: Rollouts, ordered: Sequence[Sequence[Trajectory]], found: Sequence[Trajectory], threshold: float
) -> Groups:
    """Rollouts with the grades of the file. `found`: the responses of the groups `ordered`, one behind the other."""
    graders = tuple(dict.fromkeys(name for t in found for name in t.components))
    reward = np.array([np.nan if t.reward is None else t.reward for t in found], np.float32)
    components = np.array([[t.components.get(name, np.nan) for name in graders] for t in found], np.float32)
    failure, steps = np.array([_failure(group[0]) for group in ordered], np.int32), None
    hint = np.array([t.hint_tokens for t in found], np.int32)
    if all(t.step_reward is not None for t in found):
        steps = np.full(rollouts.tokens.shape, np.nan, np.float32)
        for b, t in enumerate(found):
            steps[b, : len(t.ids)] = t.step_reward
    return Groups(
        rollouts=rollouts,
        reward=reward,
        components=components if graders else reward[:, None],
        failure=failure,
        failed_by=np.array([group[0].failed_by for group in ordered], np.int32),
        vote=np.array([t.vote for t in found], np.int32),
        keep=~np.isnan(reward) | (np.isnan(reward).all() and not failure.any()),
        graders=graders,
        threshold=threshold,
        step_reward=steps,
        hint=hint if hint.any() else None,
    )


def _failure(found: Trajectory) -> Failure:
    name = found.failure.upper() or "NONE"
    if name not in Failure.__members__:
        words = ", ".join(failure.name.lower() for failure in Failure)
        raise UserError(f"{found.where}: failure: got {found.failure!r}, want one of {words}")
    return Failure[name]

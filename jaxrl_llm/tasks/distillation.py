"""Rows for supervised training from stored responses: which are learned, and which prompts are held out."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks import trajectories
from jaxrl_llm.tasks.config import RolloutsTask
from jaxrl_llm.tasks.records import refuse
from jaxrl_llm.tasks.rows import Row, limit_prompts
from jaxrl_llm.tasks.tokenizer import Tokenizer
from jaxrl_llm.tasks.trajectories import Trajectory


def read_rows(cfg: RolloutsTask, tokenizer: Tokenizer, seed: int) -> tuple[tuple[Row, ...], tuple[Row, ...], int]:
    """Return training rows, one per response to learn; held-out rows, one per held-out prompt, with its response of the highest
    reward; and the number of rows that were dropped because their prompt is too long.

    A prompt is known by its tokens: all its responses are trained on, or none.

    Raises:
        UserError: bad data, with file and line; or nothing is left to learn.
    """
    try:
        found = trajectories.read(Path(cfg.path), tokenizer)
    except UserError as error:
        raise UserError(f"task.path: {error}") from None
    learned = _kept(cfg, found)
    forced = "got tokens that no policy sampled, want none: they would be learned too"
    refuse([f"{t.where}: {forced}" for t in learned if not t.sampled.all()])
    rows = [_row(t, tokenizer) for t in learned]
    rows, dropped = limit_prompts(rows, rows, cfg.max_prompt_tokens, cfg.too_long)
    of_prompt: dict[bytes, list[Row]] = {}
    for row in rows:
        of_prompt.setdefault(row.tokens.tobytes(), []).append(row)
    if cfg.held_out >= len(of_prompt):
        raise UserError(
            f"task.held_out: got {cfg.held_out}, want less than the {len(of_prompt)} prompts with a response to learn in {cfg.path}"
        )
    groups = [_chosen(cfg, group) for group in of_prompt.values()]
    order = np.random.default_rng(seed).permutation(len(groups)).tolist()
    held_out = tuple(max(groups[i], key=_reward) for i in order[: cfg.held_out])
    return tuple(row for i in order[cfg.held_out :] for row in groups[i]), held_out, dropped


def _kept(cfg: RolloutsTask, found: list[Trajectory]) -> list[Trajectory]:
    if cfg.keep == "all":
        return found
    if all(t.success is None for t in found):
        raise UserError(f"task.keep: got success, and {cfg.path} has no column success, want keep: all")
    if right := [t for t in found if t.success]:
        return right
    raise UserError(
        f"task.keep: got success, and none of the {len(found)} responses in {cfg.path} is one, want keep: all or another file"
    )


def _row(found: Trajectory, tokenizer: Tokenizer) -> Row:
    """The row of a response. Its tokens are those of the file: text that is encoded again may have others."""
    return Row(
        prompt=found.prompt or tokenizer.decode(found.prompt_ids.tolist()),
        answer=found.answer,
        response=found.completion or tokenizer.decode(found.ids.tolist()),
        tokens=found.prompt_ids,
        target=found.ids,
        columns=found.columns,
        where=found.where,
    )


def _reward(row: Row) -> float:
    return row.columns.get("reward", -np.inf)


def _chosen(cfg: RolloutsTask, group: Sequence[Row]) -> list[Row]:
    """The responses to one prompt that are learned, in the order of the file; of equal rewards the first."""
    rows = list({row.target.tobytes(): row for row in reversed(group)}.values())[::-1] if cfg.distinct else list(group)
    if not cfg.best:
        return rows
    order = sorted(range(len(rows)), key=lambda i: -_reward(rows[i]))
    return [rows[i] for i in sorted(order[: cfg.best])]

"""Rows of a task to batches of prompts, and to the noisy responses of a warm start."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from jaxrl_llm.tasks.rows import Row
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import Prompts


def pad_rows(rows: Sequence[np.ndarray], slots: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens i32[n, slots], right-padded with `pad`, and lengths i32[n]."""
    tokens = np.full((len(rows), slots), pad, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens, np.array([len(row) for row in rows], np.int32)


def make_prompts(task: Task, rows: tuple[Row, ...], index: np.ndarray, uid: np.ndarray) -> Prompts:
    """Return a batch of prompts, each in the form of its visit, right-padded to the task's prompt slots.

    Args:
        task: Gives the padding token and the number of slots.
        rows: The rows to choose from, e.g. `task.train`.
        index: i[P], indices into `rows`.
        uid: i[P], one number per visit of a prompt; it keys the sampling noise, and the form of the prompt.
    """
    asked = [rows[i].asked(visit).tokens for i, visit in zip(index, uid, strict=True)]
    tokens, length = pad_rows(asked, task.prompt_slots, task.pad)
    return Prompts(tokens=tokens, length=length, uid=np.asarray(uid, np.int32), row=np.asarray(index, np.int32))


def rows_asked(rows: Sequence[Row], prompts: Prompts) -> list[Row]:
    """Return the row of each prompt, in the form in which it was asked. `prompts.row` is an index into `rows`."""
    return [
        rows[i].asked_by(visit, tokens[:length])
        for i, visit, tokens, length in zip(prompts.row, prompts.uid, prompts.tokens, prompts.length, strict=True)
    ]


def completion_limits(rows: Sequence[Row], index: np.ndarray, most: int) -> np.ndarray:
    """Return the maximum completion tokens of each row at `index`; `most` where the row's task has no limit of its own."""
    return np.array([rows[i].max_new_tokens or most for i in index])


def noisy_rows(task: Task, order: Callable[[int], int], positions: Iterable[int], noise: float, seed: int) -> list[Row]:
    """Return training rows for a deliberately imperfect warm start, a fraction of them with a wrong response.

    Each visit of a row redraws the noise: a policy trained on this gives the right response about (1 - noise) of the time, to
    unseen prompts too. (Wrong responses that stayed the same would be memorized.)

    Args:
        task: Source of the rows and of the replacing responses.
        order: Row index at each position of the stream of rows.
        positions: Positions of the stream to return.
        noise: Probability of replacing a row's response by that of a random row of the same task.
        seed: With the position, determines the noise.
    """
    rows = []
    for position in positions:
        rng = np.random.default_rng((seed, position))
        row = task.train[order(position)].asked(position)
        if rng.random() < noise:
            own = task.parts[row.task].rows
            other = task.train[own[rng.integers(len(own))]]
            row = dataclasses.replace(row, answer=other.answer, response=other.response, target=other.target)
        rows.append(row)
    return rows

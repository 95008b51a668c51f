"""The endless stream of prompts: its order a pure function of the seed, equal on every host."""

from collections.abc import Callable, Sequence

import grain
import numpy as np

from jaxrl_llm.tasks.rows import Row
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import Prompts

Order = Callable[[int], int]


def make_order(num_rows: int, seed: int) -> Order:
    """Place in the stream to row: every row once an epoch, a new order each epoch."""
    stream = grain.MapDataset.range(num_rows).seed(seed).shuffle().repeat()
    return lambda place: int(stream[place])


def pad_rows(rows: Sequence[np.ndarray], slots: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens i32[n, slots], right-padded, and lengths i32[n]."""
    tokens = np.full((len(rows), slots), pad, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens, np.array([len(row) for row in rows], np.int32)


def make_prompts(task: Task, rows: tuple[Row, ...], index: np.ndarray, uid: np.ndarray) -> Prompts:
    """Prompts of the rows at `index`, each with its `uid`: the rows' tokens, right-padded to the task's prompt slots."""
    tokens, length = pad_rows([rows[i].tokens for i in index], task.prompt_slots, task.pad)
    return Prompts(tokens=tokens, length=length, uid=np.asarray(uid, np.int32), row=np.asarray(index, np.int32))

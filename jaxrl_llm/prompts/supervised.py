"""Rows with noisy answers for the warm start: what makes the first policy deliberately imperfect."""

from collections.abc import Iterable

import numpy as np

from jaxrl_llm.prompts.stream import Order
from jaxrl_llm.prompts.task import Row, Task


def noisy_rows(task: Task, order: Order, places: Iterable[int], noise: float, seed: int) -> list[Row]:
    """Training rows at these places of the stream, a share `noise` of them with the answer of a row drawn at random.

    Each visit draws anew: a policy that has learnt this gives the right answer about (1 - noise) of the time, to prompts that
    it never saw as well. (Wrong answers that stay the same are learnt by heart, and nothing else is.)
    """
    rows = []
    for place in places:
        rng = np.random.default_rng((seed, place))
        row = task.train[order(place)]
        rows.append(Row(row.prompt, task.train[rng.integers(len(task.train))].answer) if rng.random() < noise else row)
    return rows

"""Rows with noisy responses for the warm start: what makes the first policy deliberately imperfect."""

import dataclasses
from collections.abc import Iterable

import numpy as np

from jaxrl_llm.tasks.rows import Row
from jaxrl_llm.tasks.stream import Order
from jaxrl_llm.tasks.task import Task


def noisy_rows(task: Task, order: Order, places: Iterable[int], noise: float, seed: int) -> list[Row]:
    """Training rows at these places of the stream, a share `noise` of them with the response of a row drawn at random.

    Each visit draws anew: a policy that has learned this gives the right response about (1 - noise) of the time, to prompts that
    it never saw as well. (Wrong responses that stay the same are learned by heart, and nothing else is.)
    """
    rows = []
    for place in places:
        rng = np.random.default_rng((seed, place))
        row = task.train[order(place)]
        if rng.random() < noise:
            other = task.train[rng.integers(len(task.train))]
            row = dataclasses.replace(row, answer=other.answer, response=other.response, target=other.target)
        rows.append(row)
    return rows

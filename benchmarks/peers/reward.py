"""The trivial reward of every trainer: the number of digits 7 in a response. Standard library only."""

from collections.abc import Sequence
from typing import Any


def sevens(text: str) -> float:
    """Return digits 7 / 128. Responses are numbered words, so samples of one prompt differ in it."""
    return text.count("7") / 128


def grade(sample: Any) -> float:
    """The reward as one of our graders."""
    return sevens(sample.completion)


def rewards(completions: Sequence[str], **others: Any) -> list[float]:
    """The reward as a function of TRL and Tunix."""
    return [sevens(text) for text in completions]

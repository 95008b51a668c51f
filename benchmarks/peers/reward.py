"""The trivial reward of every trainer: how often the digit 7 stands in a response. Standard library alone."""

from collections.abc import Sequence
from typing import Any


def sevens(text: str) -> float:
    """Responses are numbered words, so that samples of one prompt differ in it."""
    return text.count("7") / 128


def grade(sample: Any) -> float:
    """As our graders are called."""
    return sevens(sample.completion)


def rewards(completions: Sequence[str], **others: Any) -> list[float]:
    """As TRL and Tunix call theirs."""
    return [sevens(text) for text in completions]

"""Charts of what the curriculum chose, from the metrics `curriculum/...`, whose names are the curriculum's."""

from collections.abc import Iterable, Mapping
from typing import Any

PREFIX, SHARE = "curriculum/", "curriculum/share/"
MAX_CHARTS = 8
"""Charts of numbers that are no shares, at most."""


def is_of_choice(name: str) -> bool:
    """True for a metric of the curriculum."""
    return name.startswith(PREFIX)


def strata(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the metrics that are shares of a step's prompts, in the order in which they were logged."""
    return [name for name in dict.fromkeys(name for row in rows for name in row) if name.startswith(SHARE)]


def choice_charts(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, tuple[str, ...]]]:
    """Return (title, metrics) of a chart for each other number of the curriculum."""
    known = dict.fromkeys(name for row in rows for name in row if is_of_choice(name) and not name.startswith(SHARE))
    return [(f"curriculum: {name.removeprefix(PREFIX).replace('_', ' ')}", (name,)) for name in known][:MAX_CHARTS]

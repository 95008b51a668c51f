"""What the destinations of a run's records have in common."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Writer(Protocol):
    """A destination of the records of one run. A method neither raises nor waits when the destination fails: training continues."""

    def scalars(self, step: int, phase: str, row: Mapping[str, Any]) -> None:
        """Write the metrics of one step; `row` holds JSON types and includes the phase."""

    def rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write sampled responses; keys as in `Recorder.rollouts`."""

    def close(self, failed: bool) -> None:
        """Finish within a minute. `failed`: the run ended with an error."""


def numbers(row: Mapping[str, Any]) -> dict[str, int | float]:
    """The entries of `row` that can be plotted."""
    return {name: value for name, value in row.items() if isinstance(value, int | float)}

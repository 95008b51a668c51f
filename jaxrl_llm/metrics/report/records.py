"""Readers of metrics.jsonl and rollouts.jsonl, also of torn or edited files: lines that are not rows are left out.

A yielded row can be plotted: its step is a whole number, numbers are finite or None (a gap), texts are text. Keys that no chart and
no table reads are unchanged.
"""

import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from jaxrl_llm.metrics.report.choice import is_of_choice
from jaxrl_llm.metrics.report.tasks import is_of_task
from jaxrl_llm.metrics.report.visits import REPLAYED
from jaxrl_llm.metrics.terminal import printable

Row = dict[str, Any]
LARGEST, SMALLEST = 1e100, 1e-100
"""Larger numbers become gaps and smaller ones 0, because charts subtract, add and divide them."""
LAST_STEP = 2**53
SHOWN = 60


class Reader:
    """Rows of one file, in order. After iterating, `omissions` says what was left out and where it began."""

    def __init__(self, path: Path, check: Callable[[Row], Row]):
        self._path, self._check = path, check
        self._left_out: list[str] = []
        self._back: list[str] = []

    def __iter__(self) -> Iterator[Row]:
        last = 0
        with open(self._path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = self._check(_object(line))
                except ValueError as why:
                    self._left_out.append(f"{self._path}:{number}: {why}")
                    continue
                if row["step"] < last:
                    self._back.append(f"{self._path}:{number}: step {row['step']} after step {last}")
                last = row["step"]
                yield row

    @property
    def omissions(self) -> list[str]:
        kinds = ((self._left_out, "left out"), (self._back, "out of order, shown in the order of steps"))
        return [f"{_lines(len(places))} {what}; the first: {places[0]}" for places, what in kinds if places]


def _lines(count: int) -> str:
    return "1 line is" if count == 1 else f"{count:,} lines are"


def _object(line: bytes) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("not JSON" if line.endswith(b"\n") else "cut off, or not JSON") from None
    if not isinstance(row, dict):
        raise ValueError(f"got {_shown(row)}, want an object, {{...}}")
    return row | {"step": _step(row)}


def _step(row: Row) -> int:
    step = row.get("step")
    if not _is_number(step) or step != step // 1 or not 0 <= step < LAST_STEP:
        raise ValueError(f"step: got {_shown(step) if 'step' in row else 'nothing'}, want a whole number, 0 or more")
    return int(step)


def metrics_row(row: Row, plotted: Collection[str]) -> Row:
    """A row whose values under the names in `plotted` and of timers are numbers. Raises ValueError with the reason."""
    if not _is_list(row.get("warnings"), str):
        raise ValueError(f"warnings: got {_shown(row['warnings'])}, want a list of texts")
    if not _is_list(row.get(REPLAYED), int):
        raise ValueError(f"{REPLAYED}: got {_shown(row[REPLAYED])}, want a list of whole numbers")
    return {
        printable(name): _number(name, value)
        if name in plotted or name.startswith(("time/", "filter/")) or is_of_choice(name) or is_of_task(name)
        else value
        for name, value in row.items()
    }


def rollouts_row(row: Row) -> Row:
    """Row of a sampled response. Raises ValueError with the reason."""
    for name in ("prompt", "completion", "finish"):
        if not isinstance(row.get(name, ""), str):
            raise ValueError(f"{name}: got {_shown(row[name])}, want text")
    for name in ("trunk", "fork"):
        if isinstance(row.get(name), bool) or not isinstance(row.get(name), int | None):
            raise ValueError(f"{name}: got {_shown(row[name])}, want a whole number")
    for name in ("uid", "sample", "row"):
        if not isinstance(row.get(name), int | str | None):
            raise ValueError(f"{name}: got {_shown(row[name])}, want a whole number")
    if not _is_list(row.get("tokens"), str):
        raise ValueError(f"tokens: got {_shown(row['tokens'])}, want a list of texts")
    if not _is_list(row.get("sampled"), bool):
        raise ValueError(f"sampled: got {_shown(row['sampled'])}, want a list of true and false")
    if not _is_list(row.get("allowed"), object):
        raise ValueError(f"allowed: got {_shown(row['allowed'])}, want a list of lists of texts")
    for shown in row.get("allowed") or ():
        if not _is_list(shown, str):
            raise ValueError(f"allowed: got {_shown(shown)}, want a list of texts")
    numbers = {name: _number(name, row.get(name)) for name in ("reward", "advantage")}
    per_token = ("logprobs", "entropy", "num_allowed")
    return row | numbers | {name: _numbers(name, row.get(name)) for name in per_token}


def _is_list(values: Any, kind: type) -> bool:
    return values is None or (isinstance(values, list) and all(isinstance(value, kind) for value in values))


def _numbers(name: str, values: Any) -> list[float | None]:
    if not _is_list(values, object):
        raise ValueError(f"{name}: got {_shown(values)}, want a list of numbers")
    return [_number(name, value) for value in values or ()]


def _number(name: str, value: Any) -> float | None:
    """A number that can be plotted; None if it is not finite or too large."""
    if value is None:
        return None
    if not _is_number(value):
        raise ValueError(f"{name}: got {_shown(value)}, want a number")
    if value != value or abs(value) > LARGEST:
        return None
    return value if abs(value) >= SMALLEST else 0.0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    text = printable(json.dumps(value)[: 10 * SHOWN])
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."

"""History of the task's rows that were visited several times: what came of each visit, and when stored groups came back."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxrl_llm.metrics.terminal import printable_lines

Row = Mapping[str, Any]
MOST_ROWS, MOST_VISITS, LONGEST = 12, 24, 300
"""Rows in the table, visits of each, the last ones, and characters of a prompt, at most."""
REPLAYED = "replay/task_rows"


class History(NamedTuple):
    """A line of the table."""

    prompt: str
    sampled: int
    """Recorded visits that sampled new responses."""
    replayed: int
    """Steps in which a stored group of the row came back."""
    visits: list[tuple[str, str, float | None]]
    """(step, what came of it, share of right responses or None), oldest first."""
    left_out: int
    """Earlier visits, which are not shown."""


class Visits:
    """Counts the recorded responses of each row of the task as they are read."""

    def __init__(self) -> None:
        self._prompts: dict[Any, str] = {}
        self._counts: dict[Any, dict[tuple[int, Any], list[float]]] = {}

    def counting(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yield the rows of rollouts.jsonl as they are. Those without the number of their row are told apart by their prompts."""
        for row in rows:
            number, prompt = row.get("row"), row.get("prompt", "")
            key = number if isinstance(number, int) else prompt
            self._prompts.setdefault(key, prompt[:LONGEST])
            count = self._counts.setdefault(key, {}).setdefault((row["step"], row.get("uid")), [0, 0, 0, 0.0])
            reward = row["reward"]
            # What followed a hint is no success of the policy alone.
            if isinstance(row.get("success"), bool) and not row.get("hint_tokens") and row.get("trunk") is None:
                count[0] += row["success"]
                count[1] += 1
            if reward is not None:
                count[2] += 1
                count[3] += reward
            yield row

    def most_visited(self, metrics: Iterable[Row]) -> list[History]:
        """Return the rows with two visits or more, the most visited first. `metrics`: rows of metrics.jsonl, which name the rows of
        the task whose stored groups came back."""
        came_back: dict[int, list[int]] = {}
        for row in metrics:
            for number in row.get(REPLAYED) or ():
                came_back.setdefault(number, []).append(row["step"])
        found = []
        for key, counts in self._counts.items():
            replays = came_back.get(key, []) if isinstance(key, int) else []
            visits = [(step, *_result(count)) for (step, _), count in counts.items()]
            visits = sorted([*visits, *((step, "replayed", None) for step in replays)], key=lambda visit: visit[0])
            if len(visits) > 1:
                shown = [(str(step), text, share) for step, text, share in visits[-MOST_VISITS:]]
                prompt = printable_lines(self._prompts[key])
                found.append(History(prompt, len(counts), len(replays), shown, len(visits) - len(shown)))
        return sorted(found, key=lambda row: -(row.sampled + row.replayed))[:MOST_ROWS]


def _result(count: list[float]) -> tuple[str, float | None]:
    """Return a visit's result in words, and its share of right responses."""
    right, judged, graded, reward = count
    if judged:
        return f"{right:.0f} of {judged:.0f}", right / judged
    return (f"reward {reward / graded:.2f}" if graded else "not graded"), None

"""Charts of a mixture and of forms of the prompts: one line for each of its tasks, or for each form."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

TASK = re.compile(r"(?:task|form|eval)/([\w.-]+)/([\w@]+)", re.ASCII)
TITLES = {
    "task/{}/reward": "reward by task",
    "task/{}/success": "success by task",
    "eval/{}/exact": "evaluation by task: exact",
    "eval/{}/pass@1": "evaluation by task: pass@1",
    "task/{}/groups": "share of the groups by task",
    "task/{}/mean_length": "completion length by task (tokens)",
    "form/{}/reward": "reward by form of the prompt",
    "form/{}/success": "success by form of the prompt",
    "form/{}/groups": "share of the groups by form of the prompt",
    "form/{}/mean_length": "completion length by form of the prompt (tokens)",
}


def is_of_task(name: str) -> bool:
    """True for a metric of one task of a mixture, or of one form of the prompts."""
    return TASK.fullmatch(name) is not None


def task_charts(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, tuple[str, ...]]]:
    """Return (title, metrics) of each chart by task or form that the rows hold numbers for; none without several."""
    known = dict.fromkeys(name for row in rows for name in row)
    tasks = dict.fromkeys(found[1] for name in known if (found := TASK.fullmatch(name)))
    charts = (
        (title, tuple(n for task in tasks if (n := form.format(task)) in known)) for form, title in TITLES.items()
    )
    return [(title, names) for title, names in charts if names]

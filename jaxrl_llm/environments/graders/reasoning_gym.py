"""Grader of reasoning-gym tasks: the scorer of the data set."""

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from jaxrl_llm.environments.grader import Sample
from jaxrl_llm.environments.graders.text import FinalText, compile_pattern


@dataclass(frozen=True, kw_only=True)
class ReasoningGym(FinalText):
    """Score of reasoning-gym's `score_answer(answer, entry)`, 0 to 1: many data sets give partial credit for a near miss.

    The row's columns are the entry (question, answer, metadata). "reasoning_gym" names the data set, "reasoning_gym_config" holds
    its settings, which some scorers read. The answer is the final text without surrounding spaces, or the last match of
    `pattern`. No answer earns 0.
    """

    needs: ClassVar[str] = "reasoning_gym"

    pattern: str = ""
    """Regular expression with at most one group that matches the answer in the final text: "<answer>(.*?)</answer>"."""
    dataset: str = ""
    """Name of the data set; empty: the column "reasoning_gym"."""
    config: dict[str, Any] = field(default_factory=dict)
    """Settings of the data set; empty: the column "reasoning_gym_config"."""

    def __post_init__(self) -> None:
        if self.pattern and (groups := compile_pattern(self.pattern).groups) > 1:
            raise ValueError(f"pattern: got {groups} groups, want at most one; (?:...) groups without capturing")

    def start(self) -> None:
        import reasoning_gym  # noqa: F401

    def problem(self, row: Sample) -> str:
        """Return why a row cannot be graded; "" if it can."""
        if not self._name(row):
            return 'the row has no column "reasoning_gym", and the option dataset is empty'
        if missing := [key for key in ("question", "answer", "metadata") if key not in row.columns]:
            return f"the row has no {', '.join(missing)}, want the columns of a reasoning-gym entry"
        return ""

    def __call__(self, sample: Sample) -> float:
        if why := self.problem(sample):
            raise ValueError(why)
        name, answer = self._name(sample), self.extract(sample)
        settings = self.config or sample.columns.get("reasoning_gym_config", {})
        dataset = _dataset(name, json.dumps(settings, sort_keys=True))
        return float(dataset.score_answer(answer, _entry(sample.columns))) if answer else 0.0

    def _name(self, sample: Sample) -> object:
        return self.dataset or sample.columns.get("reasoning_gym")

    def extract(self, sample: Sample) -> str:
        text = self.final_text(sample)
        if self.pattern:
            found = [match.group(match.re.groups) or "" for match in re.finditer(self.pattern, text)]
            text = found[-1] if found else ""
        return text.strip()


def _entry(columns: Mapping[str, object]) -> dict[str, object]:
    """Return the row as reasoning-gym made it: in a Parquet file its metadata may be JSON."""
    metadata = columns["metadata"]
    return dict(columns) | {"metadata": json.loads(metadata) if isinstance(metadata, str) else metadata}


@functools.cache
def _dataset(name: str, config: str) -> Any:
    from reasoning_gym import create_dataset

    return create_dataset(name, **json.loads(config))

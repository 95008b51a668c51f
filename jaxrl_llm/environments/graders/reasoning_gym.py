"""The grader of reasoning-gym's tasks: the data set's own scorer."""

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from jaxrl_llm.environments.grader import Sample
from jaxrl_llm.environments.graders.text import FinalText, compiled


@dataclass(frozen=True, kw_only=True)
class ReasoningGym(FinalText):
    """What reasoning-gym's `score_answer(answer, entry)` gives, 0 to 1: many data sets pay something for a near miss.

    The row's columns are the entry (question, answer, metadata). "reasoning_gym" names the data set, "reasoning_gym_config"
    holds its settings, which some scorers read. The answer is the final text without spaces around it, or what `pattern` finds
    last. No answer earns 0.
    """

    needs: ClassVar[str] = "reasoning_gym"

    pattern: str = ""
    """A regular expression with one group at most, which finds the answer in the final text: "<answer>(.*?)</answer>"."""
    dataset: str = ""
    """The data set's name where the column "reasoning_gym" lacks."""
    config: dict[str, Any] = field(default_factory=dict)
    """Its settings where the column "reasoning_gym_config" lacks."""

    def __post_init__(self) -> None:
        if self.pattern and (groups := compiled(self.pattern).groups) > 1:
            raise ValueError(f"pattern: got {groups} groups, want one at most; (?:...) groups without counting")

    def start(self) -> None:
        import reasoning_gym  # noqa: F401

    def problem(self, row: Sample) -> str:
        """What a row lacks; nothing if it can be graded."""
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
    """The row as reasoning-gym made it: a Parquet file may hold the metadata as JSON."""
    metadata = columns["metadata"]
    return dict(columns) | {"metadata": json.loads(metadata) if isinstance(metadata, str) else metadata}


@functools.cache
def _dataset(name: str, config: str) -> Any:
    from reasoning_gym import create_dataset

    return create_dataset(name, **json.loads(config))

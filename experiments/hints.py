"""Hints against a start that is hardly ever right: running sums of five digits.

    python -m experiments.hints              # the runs that the results file lacks, then the plot and the tables
    python -m experiments.hints --report     # the plot and the tables alone

The prompt <3+4+5+6+2> has the response `7 12 18 20#`, which is graded as a whole. The warm start is cut short, so that the policy knows
the form of a response and little of the sums. All arms draw equally many responses per step; the accuracy is exact, and without hints.
"""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments import report
from experiments.arithmetic import HELD_OUT, SETUP, Arm, command
from experiments.results_file import DIRECTORY
from jaxrl_llm.experience.config import ExperienceConfig
from jaxrl_llm.experience.hints import CosineHints, HintRule, LevelHints, NoHints, StagedHints
from jaxrl_llm.objective.loss_config import PolicyGradient
from jaxrl_llm.tasks.config import ArithmeticTask, FileTask

RESULTS = DIRECTORY / "hints.json"
STEPS, SAMPLES, REACHED = 150, 38_400, (0.05, 0.2)


class RunningSums(NamedTuple):
    """Prompts of five digits, whose response is every sum on the way."""

    rows: int = 8_000

    @property
    def path(self) -> Path:
        return Path("runs/running_sums.jsonl")

    @property
    def task(self) -> FileTask:
        return FileTask(str(self.path), held_out=HELD_OUT, response="{sums}")

    def write(self) -> None:
        """Write the file, in random order."""
        digits = np.random.default_rng(0).permutation(list(itertools.product(range(10), repeat=5)))[: self.rows]
        rows = [(ArithmeticTask.prompt([str(x) for x in d]), " ".join(map(str, np.cumsum(d)[1:]))) for d in digits]
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(
            "".join(f"{json.dumps({'prompt': prompt, 'answer': f'{sums}#', 'sums': sums})}\n" for prompt, sums in rows)
        )


POOL = RunningSums()
SPARSE = dataclasses.replace(
    SETUP,
    steps=STEPS,
    task=POOL.task,
    warm_start=dataclasses.replace(SETUP.warm_start, noise=0.0, steps=100),
    rollout=dataclasses.replace(SETUP.rollout, max_new_tokens=12),
)


def arm(hints: NoHints | HintRule) -> Arm:
    shaping = 0.1 if getattr(hints, "train", False) else None
    objective = dataclasses.replace(SPARSE.objective, loss=PolicyGradient(shaping=shaping))
    return Arm(dataclasses.replace(SPARSE, experience=ExperienceConfig(hints=hints), objective=objective))


ARMS = {
    "no hints": arm(NoHints()),
    "cosine (Prefix-RFT)": arm(CosineHints()),
    "cosine, trained on": arm(CosineHints(train=True)),
    "stages (QuestA)": arm(StagedHints()),
    "levels (StepHint)": arm(LevelHints()),
}


def tables(runs: list[dict]) -> str:
    whole = report.table(runs, list(ARMS), STEPS, SAMPLES)
    return "\n\n".join([whole, *(report.reached_table(runs, list(ARMS), level) for level in REACHED)])


if __name__ == "__main__":
    command(__doc__, RESULTS, ARMS, tables, {"hints from a start without reward": list(ARMS)}, pools=(POOL,))

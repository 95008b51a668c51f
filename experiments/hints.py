"""Hints against a start that is hardly ever right: running sums of eight digits.

    python -m experiments.hints              # the runs that the results file lacks, then the plot and the tables
    python -m experiments.hints --report     # the plot and the tables alone

The prompt <3+4+5+6+2+1+9+5> has the response `7 12 18 20 21 30 35#`, which is graded as a whole. The warm start learned from
responses of which each addition is wrong six times in ten, so the policy can add, and seven additions in a row are hardly ever
right. All arms draw equally many responses per step; the accuracy is exact, and without hints.
"""

import dataclasses
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
DIGITS, STEPS, SAMPLES, REACHED = 8, 120, 30_720, (0.001, 0.1)


class RunningSums(NamedTuple):
    """Prompts of several digits, whose response is every sum on the way."""

    name: str
    rows: int
    wrong: float = 0.0
    """Share of the additions whose digit is a random one; what follows continues from their sum."""
    digits: int = DIGITS

    @property
    def path(self) -> Path:
        return Path("runs") / f"{self.name}.jsonl"

    @property
    def task(self) -> FileTask:
        return FileTask(str(self.path), held_out=HELD_OUT, response="{sums}")

    def write(self) -> None:
        """Write the file."""
        rng = np.random.default_rng(0)
        digits, others = rng.integers(0, 10, (2, self.rows, self.digits))
        added = np.where(rng.random(digits.shape) < self.wrong, others, digits)
        rows = [
            {"prompt": ArithmeticTask.prompt([str(x) for x in prompt]), "sums": " ".join(map(str, sums))}
            for prompt, sums in zip(digits, np.cumsum(added, axis=1)[:, 1:], strict=True)
        ]
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text("".join(f"{json.dumps(row | {'answer': row['sums'] + '#'})}\n" for row in rows))


POOL, NOISY = RunningSums("running_sums", 8_000), RunningSums("noisy_running_sums", 40_000, wrong=0.6)
SPARSE = dataclasses.replace(
    SETUP,
    steps=STEPS,
    task=POOL.task,
    warm_start=dataclasses.replace(SETUP.warm_start, noise=0.0, steps=750),
    rollout=dataclasses.replace(SETUP.rollout, max_new_tokens=21),
)


def arm(hints: NoHints | HintRule) -> Arm:
    shaping = 0.1 if getattr(hints, "train", False) else None
    objective = dataclasses.replace(SPARSE.objective, loss=PolicyGradient(shaping=shaping))
    cfg = dataclasses.replace(SPARSE, experience=ExperienceConfig(hints=hints), objective=objective)
    return Arm(cfg, warm=dataclasses.replace(SPARSE, task=NOISY.task))


ARMS = {
    "no hints": arm(NoHints()),
    "cosine, one of eight, trained on (Prefix-RFT)": arm(CosineHints(train=True)),
    "cosine, all": arm(CosineHints(samples=0)),
    "stages (QuestA)": arm(StagedHints()),
    "levels (StepHint)": arm(LevelHints()),
}


def tables(runs: list[dict]) -> str:
    whole = report.table(runs, list(ARMS), STEPS, SAMPLES)
    return "\n\n".join([whole, *(report.reached_table(runs, list(ARMS), level) for level in REACHED)])


if __name__ == "__main__":
    command(__doc__, RESULTS, ARMS, tables, {"hints from a start without reward": list(ARMS)}, pools=(POOL, NOISY))

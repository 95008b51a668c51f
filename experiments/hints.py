"""Hints against a start without reward: running sums of five digits, of which the first policy gets one in thousands right.

The prompt <3+4+5+6+2> has the response `7 12 18 20#`, graded as a whole. The warm start has learned responses to other prompts
alone, so the first policy knows their form and nothing of the sums. Without hints no response is right, no group has a signal, and
no step learns. All arms draw as many responses; the accuracy is exact, and without hints.

    python -m experiments.hints
"""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.arithmetic import HELD_OUT, SETUP, Arm
from jaxrl_llm.experience.config import ExperienceConfig
from jaxrl_llm.experience.hints import CosineHints, LevelHints, NoHints, StagedHints
from jaxrl_llm.objective.loss_config import PolicyGradient
from jaxrl_llm.tasks.config import ArithmeticTask, FileTask

RESULTS = Path("experiments/results/hints.json")
STEPS = 300


class RunningSums(NamedTuple):
    """Prompts of five digits, whose response is every sum on the way."""

    name: str = "running_sums"
    rows: int = 8000

    @property
    def path(self) -> Path:
        return Path("runs") / f"{self.name}.jsonl"

    @property
    def task(self) -> FileTask:
        return FileTask(str(self.path), held_out=HELD_OUT, response="{sums}")

    def write(self) -> None:
        """Write the file."""
        digits = np.random.default_rng(0).permutation(list(itertools.product(range(10), repeat=5)))[: self.rows]
        rows = [(ArithmeticTask.prompt([str(x) for x in d]), " ".join(map(str, np.cumsum(d)[1:]))) for d in digits]
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(
            "".join(f"{json.dumps({'prompt': prompt, 'answer': f'{sums}#', 'sums': sums})}\n" for prompt, sums in rows)
        )


POOL = RunningSums()
BASE = dataclasses.replace(
    SETUP,
    steps=STEPS,
    task=POOL.task,
    warm_start=dataclasses.replace(SETUP.warm_start, noise=1.0, steps=300),
    rollout=dataclasses.replace(SETUP.rollout, max_new_tokens=12),
)
SHAPED = dataclasses.replace(BASE.objective, loss=PolicyGradient(shaping=0.1))
RULES = {
    "none": NoHints(),
    "cosine": CosineHints(first=0.95, last=0.05),
    "cosine, trained": CosineHints(first=0.95, last=0.05, train=True),
    "stages": StagedHints(shares=(0.5, 0.25)),
    "levels": LevelHints(levels=4),
}
ARMS = {
    name: Arm(
        dataclasses.replace(
            BASE,
            experience=ExperienceConfig(hints=rule),
            objective=SHAPED if getattr(rule, "train", False) else BASE.objective,
        )
    )
    for name, rule in RULES.items()
}


if __name__ == "__main__":
    pass

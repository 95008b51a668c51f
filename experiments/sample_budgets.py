"""Budgets: how many samples each prompt gets, the total constant, on a pool of which half is far too hard.

    python -m experiments.sample_budgets              # the runs that the results file lacks, then the plot and the tables
    python -m experiments.sample_budgets --report     # the plot and the tables alone

Half of the prompts are sums of three digits, on which the policy was warmed up, half are sums of four, which it has never seen.
All arms have 32 prompts and 256 samples per step.
"""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from experiments import report
from experiments.arithmetic import SETUP, Arm, command
from experiments.results_file import DIRECTORY
from jaxrl_llm.experience.config import (
    ExperienceConfig,
    Knapsack,
    ReinforceAda,
    Rounds,
    Screening,
    Signal,
    UniformBudget,
    Vip,
)
from jaxrl_llm.tasks.config import ArithmeticTask, FileTask

RESULTS, POOL = DIRECTORY / "sample_budgets.json", Path("runs/sums_of_three_and_four.jsonl")
STEPS, SAMPLES, EACH = 100, 25_600, 500


def write_pool(path: Path) -> None:
    """Write EACH sums of three and of four digits, in random order."""
    rng = np.random.default_rng(0)
    sums = [
        digits
        for terms in (3, 4)
        for digits in rng.permutation(list(itertools.product(range(10), repeat=terms)))[:EACH]
    ]
    rows = [
        {
            "prompt": ArithmeticTask.prompt([str(d) for d in digits]),
            "answer": f"{sum(digits)}#",
            "sum": str(sum(digits)),
        }
        for digits in sums
    ]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{json.dumps(rows[i])}\n" for i in rng.permutation(len(rows))))


MIXED = replace(SETUP, steps=STEPS, task=FileTask(str(POOL), held_out=128, response="{sum}"))
BUDGETS = {
    "uniform": UniformBudget(),
    "VIP": Vip(high=32),
    "Knapsack": Knapsack(high=32),
    "screening": Screening(initial=4, high=32),
    "Reinforce-Ada": ReinforceAda(per_round=4, rounds=8, keep=4),
    "rounds until right": Rounds(per_round=4, rounds=8),
}
ARMS = {
    name: Arm(replace(MIXED, experience=ExperienceConfig(filter=Signal(), budget=budget)), warm=SETUP)
    for name, budget in BUDGETS.items()
}


def tables(runs: list[dict]) -> str:
    return report.table(runs, list(ARMS), STEPS, SAMPLES)


if __name__ == "__main__":
    command(__doc__, RESULTS, ARMS, tables, {"budgets": list(ARMS)}, prepare=lambda: write_pool(POOL))

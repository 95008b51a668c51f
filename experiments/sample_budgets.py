"""Budgets: how many samples each prompt gets, the total constant, on a pool of which half is far too hard.

    python -m experiments.sample_budgets              # the runs that the results file lacks, then the plot and the tables
    python -m experiments.sample_budgets --report     # the plot and the tables alone

Half of the prompts are sums of three digits, on which the policy was warmed up, half are sums of four, which it has never seen.
All arms have 32 prompts and 256 samples per step. In a pool of 200 prompts each is visited five times as often as in one of 872.
"""

from dataclasses import replace

from experiments import report
from experiments.arithmetic import HELD_OUT, SETUP, Arm, Pool, command
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

RESULTS = DIRECTORY / "sample_budgets.json"
STEPS, SAMPLES = 100, 25_600
MANY, FEW = Pool("sums_of_three_and_four", (3, 4), 1_000), Pool("few_sums_of_three_and_four", (3, 4), 200 + HELD_OUT)

BUDGETS = {
    "uniform": UniformBudget(),
    "VIP": Vip(high=32),
    "Knapsack": Knapsack(high=32),
    "screening": Screening(initial=4, high=32),
    "Reinforce-Ada": ReinforceAda(per_round=4, rounds=8, keep=4),
    "rounds until right": Rounds(per_round=4, rounds=8),
}
WITH_FEW = {name: BUDGETS[name] for name in ("uniform", "VIP", "Knapsack")} | {
    "Knapsack with a prior": Knapsack(high=32, prior=1.0, memory=0.8)
}
ARMS = {
    f"{name}{where}": Arm(
        replace(SETUP, steps=STEPS, task=pool.task, experience=ExperienceConfig(filter=Signal(), budget=budget)),
        warm=SETUP,
    )
    for where, pool, budgets in (("", MANY, BUDGETS), (", 200 prompts", FEW, WITH_FEW))
    for name, budget in budgets.items()
}
PANELS = {"budgets": list(ARMS)[: len(BUDGETS)], "of 200 prompts": list(ARMS)[len(BUDGETS) :]}


def tables(runs: list[dict]) -> str:
    return "\n\n".join(report.table(runs, arms, STEPS, SAMPLES) for arms in PANELS.values())


if __name__ == "__main__":
    command(__doc__, RESULTS, ARMS, tables, PANELS, pools=(MANY, FEW))

"""Samples per prompt, K: at a fixed number of samples per step, and at a fixed number of prompts per step.

    python -m experiments.samples_per_prompt              # the runs that the results file lacks, then the plot and the tables
    python -m experiments.samples_per_prompt --report     # the plot and the tables alone

With 256 samples per step, more samples per prompt mean fewer prompts; all arms draw the same number of samples. With 32 prompts per
step, they mean more samples: an arm then has the steps for both comparisons, 80 steps and the samples of 80 steps with K = 8.
"""

from dataclasses import replace

from experiments import report
from experiments.arithmetic import SETUP, Arm, command
from experiments.results_file import DIRECTORY
from jaxrl_llm.config.run_config import RunConfig

RESULTS = DIRECTORY / "samples_per_prompt.json"
STEPS, SAMPLES, PROMPTS, SEEDS = 80, 256, 32, (0, 1, 2, 3, 4)
BUDGETS = (5_120, 10_240, 20_480)


def config(prompts: int, samples: int, steps: int) -> RunConfig:
    return replace(SETUP, steps=steps, rollout=replace(SETUP.rollout, prompts=prompts, samples=samples))


FIXED_SAMPLES = {f"{SAMPLES // k} x {k}": Arm(config(SAMPLES // k, k, STEPS)) for k in (2, 4, 8, 16, 32)}
"""Arms by prompts x samples per prompt."""
FIXED_PROMPTS = {f"{PROMPTS} x {k}": Arm(config(PROMPTS, k, max(STEPS, STEPS * 8 // k))) for k in (2, 4, 8, 16)}
ARMS = FIXED_SAMPLES | FIXED_PROMPTS
PANELS = {
    f"{SAMPLES} samples per step": list(FIXED_SAMPLES),
    f"{PROMPTS} prompts per step": list(FIXED_PROMPTS),
}


def tables(runs: list[dict]) -> str:
    return "\n".join(
        f"\n{title}, prompts x samples per prompt\n\n{report.table(runs, arms, STEPS, STEPS * SAMPLES)}"
        f"\n\n{report.budget_table(runs, arms, BUDGETS)}"
        for title, arms in PANELS.items()
    )


if __name__ == "__main__":
    command(__doc__, RESULTS, ARMS, tables, PANELS, SEEDS)

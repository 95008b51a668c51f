"""Samples per prompt, K: at a fixed number of samples per step, and at a fixed number of prompts per step.

    python -m experiments.samples_per_prompt              # the runs that the results file lacks, then the plot and the tables
    python -m experiments.samples_per_prompt --report     # the plot and the tables alone

With 256 samples per step, more samples per prompt mean fewer prompts; all arms draw the same number of samples. With 32 prompts per
step, they mean more samples: an arm then has the steps for both comparisons, 80 steps and the samples of 80 steps with K = 8.
"""

import argparse
from dataclasses import replace

from experiments import report
from experiments.arithmetic import SETUP, Arm, train_arms
from experiments.results_file import DIRECTORY, read
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="no runs: the plot and the tables from the results file")
    if not parser.parse_args().report:
        train_arms(RESULTS, ARMS, SEEDS)
    runs = read(RESULTS)
    panels = {f"{SAMPLES} samples per step": FIXED_SAMPLES, f"{PROMPTS} prompts per step": FIXED_PROMPTS}
    for title, arms in panels.items():
        print(f"\n{title}, prompts x samples per prompt\n\n{report.table(runs, list(arms), STEPS, STEPS * SAMPLES)}")
        print(f"\n{report.budget_table(runs, list(arms), BUDGETS)}")
    report.plot(RESULTS.with_suffix(".png"), runs, panels)


if __name__ == "__main__":
    main()

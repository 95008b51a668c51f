"""Dynamic sampling (DAPO), and gates that skip prompts before they are sampled (GRESO, and leaving out what is solved).

    python -m experiments.dynamic_sampling              # the runs that the results file lacks, then the plot and the tables
    python -m experiments.dynamic_sampling --report     # the plot and the tables alone

All arms train on 32 groups of 8 per step at most. Without refill, groups without signal leave the batch smaller; with it each is
replaced until the batch is full. A gate spares some of the prompts that would be rejected.
"""

from dataclasses import replace

from experiments import report
from experiments.arithmetic import SETUP, Arm, command
from experiments.results_file import DIRECTORY
from jaxrl_llm.experience.config import ExcludeSolved, ExperienceConfig, Greso, KeepAll, RefillConfig, Signal

RESULTS = DIRECTORY / "dynamic_sampling.json"
STEPS, SAMPLES, REACHED = 100, 25_600, 0.8
FULL = ExperienceConfig(filter=Signal(), refill=RefillConfig(filter=Signal(), attempts=20))
STAGES = {
    "all groups": ExperienceConfig(filter=KeepAll()),
    "with signal": ExperienceConfig(filter=Signal()),
    "refill": FULL,
    "refill, GRESO": replace(FULL, gate=Greso()),
    "refill, without solved": replace(FULL, gate=ExcludeSolved(visits=1, hopeless=None, returns_after=30)),
}
ARMS = {name: Arm(replace(SETUP, steps=STEPS, experience=stages)) for name, stages in STAGES.items()}


def tables(runs: list[dict]) -> str:
    return f"{report.table(runs, list(ARMS), STEPS, SAMPLES)}\n\n{report.reached_table(runs, list(ARMS), REACHED)}"


if __name__ == "__main__":
    command(__doc__, RESULTS, ARMS, tables, {"dynamic sampling": list(ARMS)})

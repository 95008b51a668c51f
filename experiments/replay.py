"""Replay from a hard start: stored groups and responses against fresh ones alone, on sums of four digits.

    python -m experiments.replay              # the runs that the results file lacks, then the plot and the tables
    python -m experiments.replay --report     # the plot and the tables alone

The policy was warmed up on sums of three digits and gets 2 in 100 of the others right: five of six groups have no right response.
All arms drop groups without signal and correct for age: truncated importance weights, the ratio to the proximal policy. "half
stored" samples half as much as the others.
"""

from dataclasses import replace

from experiments import report
from experiments.arithmetic import SETUP, Arm, Pool, command
from experiments.results_file import DIRECTORY
from jaxrl_llm.experience.config import ExperienceConfig, JoinConfig, PrioritizedDraw, ReplayConfig, Signal
from jaxrl_llm.objective.loss_config import PolicyGradient, TruncatedImportance

RESULTS = DIRECTORY / "replay.json"
STEPS, SAMPLES, REACHED, SEEDS = 150, 19_200, (0.2, 0.4), range(8)
POOL = Pool("sums_of_four", (4,), 1_500)
MOST = ReplayConfig(capacity=512, max_age=100)
HARD = replace(
    SETUP,
    steps=STEPS,
    task=POOL.task,
    objective=replace(SETUP.objective, loss=PolicyGradient(correction=TruncatedImportance())),
    experience=ExperienceConfig(filter=Signal()),
)


def arm(prompts: int = 32, **changes) -> Arm:
    stored = ExperienceConfig(filter=Signal(), replay=replace(MOST, **changes))
    return Arm(replace(HARD, rollout=replace(HARD.rollout, prompts=prompts), experience=stored), warm=SETUP)


ARMS = {
    "no replay": Arm(HARD, warm=SETUP),
    "dropped replaced": arm(),
    "dropped replaced, PER": arm(draw=PrioritizedDraw(), correction=0.4),
    "swap if all wrong (AR3PO)": arm(replace_dropped=False, join=JoinConfig(when="all_wrong", right=True, swap=True)),
    "two stored right ones (RLEP)": arm(replace_dropped=False, join=JoinConfig(most=2, choose="random", right=True)),
    "half stored (DOTS)": arm(prompts=16, replace_dropped=False, groups=16),
}


def tables(runs: list[dict]) -> str:
    whole = report.table(runs, list(ARMS), STEPS, SAMPLES)
    return "\n\n".join([whole, *(report.reached_table(runs, list(ARMS), level) for level in REACHED)])


if __name__ == "__main__":
    command(__doc__, RESULTS, ARMS, tables, {"replay from a hard start": list(ARMS)}, seeds=SEEDS, pools=(POOL,))

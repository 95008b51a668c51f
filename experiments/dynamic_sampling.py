"""Dynamic sampling (DAPO), and gates that skip prompts before they are sampled (GRESO, and leaving out what is solved).

    python -m experiments.dynamic_sampling              # the runs that the results file lacks, then the plot and the tables
    python -m experiments.dynamic_sampling --report     # the plot and the tables alone

All arms train on 32 groups of 8 per step at most. Without refill, groups without signal leave the batch smaller; with it each is
replaced until the batch is full. A gate spares some of the prompts that would be rejected: more of them the more often prompts come
again, in longer runs or in a pool of 200 prompts.
"""

from dataclasses import replace

from experiments import report
from experiments.arithmetic import HELD_OUT, SETUP, Arm, Pool, command
from experiments.results_file import DIRECTORY
from jaxrl_llm.experience.config import ExcludeSolved, ExperienceConfig, Greso, KeepAll, RefillConfig, Signal

RESULTS = DIRECTORY / "dynamic_sampling.json"
STEPS, SAMPLES, REACHED = 100, 25_600, (0.8, 0.9)
LONG, MORE_SAMPLES = 200, 150_000
FEW = Pool("few_sums_of_three", (3,), 200 + HELD_OUT)
FULL = ExperienceConfig(filter=Signal(), refill=RefillConfig(filter=Signal(), attempts=20))
STAGES = {
    "all groups": ExperienceConfig(filter=KeepAll()),
    "with signal": ExperienceConfig(filter=Signal()),
    "refill": FULL,
    "refill, GRESO": replace(FULL, gate=Greso()),
    "refill, without solved": replace(FULL, gate=ExcludeSolved(visits=1, hopeless=None, returns_after=30)),
}
GATED = ("refill", "refill, GRESO")
SHORT = {name: Arm(replace(SETUP, steps=STEPS, experience=stages)) for name, stages in STAGES.items()}
OF_FEW = {f"{name}, 200 prompts": Arm(replace(SHORT[name].cfg, task=FEW.task), warm=SETUP) for name in GATED}
LONGER = {f"{name}, {LONG} steps": Arm(replace(SHORT[name].cfg, steps=LONG)) for name in GATED}
PANELS = {"dynamic sampling": list(SHORT), "of 200 prompts": list(OF_FEW), "longer": list(LONGER)}


def tables(runs: list[dict]) -> str:
    ends = ((SHORT, STEPS, SAMPLES), (OF_FEW, STEPS, SAMPLES), (LONGER, LONG, MORE_SAMPLES))
    found = [report.table(runs, list(arms), steps, samples) for arms, steps, samples in ends]
    return "\n\n".join(found + [report.reached_table(runs, list(SHORT | OF_FEW | LONGER), level) for level in REACHED])


if __name__ == "__main__":
    command(__doc__, RESULTS, SHORT | OF_FEW | LONGER, tables, PANELS, pools=(FEW,))

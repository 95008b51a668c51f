"""What dynamic sampling judges groups by: the task's success, or a shaped sum in which length counts too.

    python -m experiments.filter_metric              # the runs that the results file lacks, then the plot and the tables
    python -m experiments.filter_metric --report     # the plot and the tables alone

The reward is 1 for the right sum, less 0.3 for a response that is not one character long, as no right one is. The warm start is
right in a few percent of its responses, so most groups are all wrong: by the sum they differ in length, by success not at all.
Only the filter's measure differs between the arms. Advantages are GRPO's, which are divided by the group's standard deviation.
"""

from dataclasses import replace

from experiments import report
from experiments.arithmetic import SETUP, Arm, command
from experiments.results_file import DIRECTORY
from jaxrl_llm.environments.config import GraderConfig, RewardConfig
from jaxrl_llm.experience.config import ExperienceConfig, KeepAll, RefillConfig, Signal
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.group_estimators import Grpo

RESULTS = DIRECTORY / "filter_metric.json"
STEPS, SAMPLES = 100, 25_600
SHAPED = RewardConfig(
    (
        GraderConfig("exact_match"),
        GraderConfig("length", weight=0.3, options={"target": 1, "unit": "characters"}),
    )
)
HARD = replace(
    SETUP,
    steps=STEPS,
    warm_start=replace(SETUP.warm_start, noise=0.92),
    reward=SHAPED,
    objective=ObjectiveConfig(advantage=Grpo()),
)


def judged(by: str) -> ExperienceConfig:
    return ExperienceConfig(filter=Signal(by=by), refill=RefillConfig(filter=Signal(by=by), attempts=10))


ARMS = {
    "by success": Arm(replace(HARD, experience=judged("success"))),
    "by the sum": Arm(replace(HARD, experience=judged("reward"))),
    "no filter": Arm(replace(HARD, experience=ExperienceConfig(filter=KeepAll()))),
}


def tables(runs: list[dict]) -> str:
    return report.table(runs, list(ARMS), STEPS, SAMPLES)


if __name__ == "__main__":
    command(__doc__, RESULTS, ARMS, tables, {"measure of the filter": list(ARMS)})

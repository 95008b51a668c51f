"""A mixture of an easy and a hard task, with and without a curriculum: sums of three and of four digits.

    python -m experiments.mixture              # the runs that the results file lacks, then the plot and the tables
    python -m experiments.mixture --report     # the plot and the tables alone

The policy was warmed up on sums of three digits. All arms draw 32 prompts of 8 samples per step and drop groups without signal.
Held out are 128 prompts of each task, so that "exact" is the mean of both tasks.
"""

from dataclasses import replace

from experiments import report
from experiments.arithmetic import SETUP, Arm, Pool, command
from experiments.results_file import DIRECTORY
from jaxrl_llm.experience.config import CurriculumConfig, ExperienceConfig, Learnability, Sec, Shuffled, Signal, Staged
from jaxrl_llm.experience.staged import RowsOfStage
from jaxrl_llm.tasks.config import MixtureTask, TaskPart

RESULTS = DIRECTORY / "mixture.json"
STEPS, SAMPLES, REACHED = 150, 38_400, (0.4,)
HARD = Pool("sums_of_four", (4,), 1_500)
STAGES = tuple(RowsOfStage(values=(name,)) for name in ("easy", "hard"))


def arm(easy: float = 1.0, hard: float = 1.0, curriculum: CurriculumConfig | None = None) -> Arm:
    parts = TaskPart("easy", SETUP.task, weight=easy), TaskPart("hard", HARD.task, weight=hard)
    experience = ExperienceConfig(filter=Signal(), curriculum=curriculum or Shuffled())
    return Arm(replace(SETUP, steps=STEPS, task=MixtureTask(parts), experience=experience), warm=SETUP)


ARMS = {
    "equal weights": arm(),
    "easy three times": arm(easy=3.0),
    "hard three times": arm(hard=3.0),
    "SEC over the tasks": arm(curriculum=Sec(column="task", tau=0.3)),
    "learnability": arm(curriculum=Learnability()),
    "stages": arm(curriculum=Staged(column="task", stages=STAGES, reaches=0.6, after=75)),
}


def tables(runs: list[dict]) -> str:
    whole = report.table(runs, list(ARMS), STEPS, SAMPLES)
    return "\n\n".join([whole, *(report.reached_table(runs, list(ARMS), level) for level in REACHED)])


if __name__ == "__main__":
    command(__doc__, RESULTS, ARMS, tables, {"an easy and a hard task": list(ARMS)}, pools=(HARD,))

"""Curricula: which prompts come next, on a pool of sums of two, three and four digits.

    python -m experiments.curricula              # the runs that the results file lacks, then the plot and the tables
    python -m experiments.curricula --report     # the plot and the tables alone

The policy was warmed up on sums of three digits. All arms draw 32 prompts of 8 samples per step, and drop groups without signal;
held out are sums of all three kinds.
"""

from dataclasses import replace

from experiments import report
from experiments.arithmetic import SETUP, Arm, Pool, command
from experiments.results_file import DIRECTORY
from jaxrl_llm.experience.config import (
    AdaRft,
    DifficultyTargeted,
    ExperienceConfig,
    Learnability,
    Sec,
    Shuffled,
    Signal,
    StratifiedByDifficulty,
    Unsolved,
)

RESULTS = DIRECTORY / "curricula.json"
STEPS, SAMPLES, REACHED = 100, 25_600, (0.3,)
POOL = Pool("sums_of_two_to_four", (2, 3, 4), 1_500)

CURRICULA = {
    "shuffled": Shuffled(),
    "unsolved": Unsolved(),
    "learnability": Learnability(),
    "difficulty targeted": DifficultyTargeted(),
    "strata of difficulty": StratifiedByDifficulty(shares=(1, 1, 2, 1)),
    # The paper's step for difficulties from 0 to 100, for some from 2 to 4.
    "AdaRFT": AdaRft(column="digits", start=2, step=1, low=2, high=4),
    "SEC": Sec(column="digits", tau=0.3),
}
ARMS = {
    name: Arm(
        replace(
            SETUP, steps=STEPS, task=POOL.task, experience=ExperienceConfig(filter=Signal(), curriculum=curriculum)
        ),
        warm=SETUP,
    )
    for name, curriculum in CURRICULA.items()
}


def tables(runs: list[dict]) -> str:
    whole = report.table(runs, list(ARMS), STEPS, SAMPLES)
    return "\n\n".join([whole, *(report.reached_table(runs, list(ARMS), level) for level in REACHED)])


if __name__ == "__main__":
    command(__doc__, RESULTS, ARMS, tables, {"curricula": list(ARMS)}, pools=(POOL,))

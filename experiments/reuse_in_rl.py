"""RL whose responses begin with those of a prompt's last visit, against RL that samples all afresh: running sums of four digits.

    python -m experiments.reuse_in_rl              # the runs that the results file lacks, then the plot and the tables
    python -m experiments.reuse_in_rl --report     # the plot and the tables alone

Task and warm start are those of `experiments.trees`, with 512 prompts to train on: each is visited every 16 steps, of 4 updates
each. Tokens are those that were decoded.
"""

import dataclasses
from collections.abc import Callable

from experiments import report
from experiments.arithmetic import Arm, runs_of
from experiments.hints import RunningSums
from experiments.results_file import DIRECTORY
from experiments.trees import CHAINS, NOISY
from jaxrl_llm.rollout.config import ExactReuse, InexactReuse, NoReuse, Reuse
from jaxrl_llm.train import Run
from jaxrl_llm.types import PyTree

RESULTS = DIRECTORY / "reuse_in_rl.json"
STEPS, TOKENS = 160, 78_000
POOL = RunningSums("few_additions", 640, digits=4)
CFG = dataclasses.replace(CHAINS, steps=STEPS, task=POOL.task)


def kept(run: Run) -> Callable[[PyTree], dict[str, float]]:
    """Shares of tokens and of responses that the last step kept."""
    names = ("reuse/tokens", "reuse/whole")
    return lambda params: {name: run.source.metrics[name] for name in names if name in run.source.metrics}


def arm(reuse: Reuse) -> Arm:
    cfg = dataclasses.replace(CFG, rollout=dataclasses.replace(CFG.rollout, reuse=reuse))
    return Arm(cfg, warm=dataclasses.replace(CFG, task=NOISY.task), metrics=("ratio/max",), measures=kept)


ARMS = {
    "fresh": arm(NoReuse()),
    "exact": arm(ExactReuse()),
    "exact, one repetition": arm(ExactReuse(max_repeats=1)),
    "inexact, leniency 0": arm(InexactReuse(leniency=0.0)),
    "inexact, leniency 0.5": arm(InexactReuse(leniency=0.5)),
}


def tables(runs: list[dict]) -> str:
    return report.token_table(runs, list(ARMS), STEPS, TOKENS)


if __name__ == "__main__":
    found = runs_of(__doc__, RESULTS, ARMS, pools=(POOL, NOISY))
    print(tables(found))
    report.plot(RESULTS.with_suffix(".png"), found, {"three additions": list(ARMS)}, beside="tokens")

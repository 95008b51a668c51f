"""RL with trees against RL with chains, at equal updates and at equal tokens: running sums of four digits.

    python -m experiments.trees              # the runs that the results file lacks, then the plot and the tables
    python -m experiments.trees --report     # the plot and the tables alone

The prompt <3+4+5+6> has the response `7 12 18#`: three additions, graded as a whole. The warm start learned from responses of
which each addition is wrong six times in ten. Every arm samples about as many tokens per step: 8 chains per prompt, or trees of 4
roots and 8 branches, which share about half of their tokens.
"""

import dataclasses

from experiments import report
from experiments.arithmetic import SETUP, Arm, runs_of
from experiments.hints import RunningSums
from experiments.results_file import DIRECTORY
from jaxrl_llm.objective.estimator import Estimator
from jaxrl_llm.objective.group_estimators import Rloo
from jaxrl_llm.objective.tree_estimators import Spo, TreePo, TreeRl
from jaxrl_llm.rollout.config import NoTree, PointTree, SegmentTree, Tree

RESULTS = DIRECTORY / "trees.json"
STEPS, TOKENS = 120, 240_000
POOL, NOISY = (
    RunningSums("three_additions", 8_000, digits=4),
    RunningSums("noisy_three_additions", 40_000, 0.6, digits=4),
)
CHAINS = dataclasses.replace(
    SETUP,
    steps=STEPS,
    task=POOL.task,
    warm_start=dataclasses.replace(SETUP.warm_start, noise=0.0, steps=750),
    rollout=dataclasses.replace(SETUP.rollout, max_new_tokens=9),
    update=dataclasses.replace(SETUP.update, packing=dataclasses.replace(SETUP.update.packing, kind="shared_prefix")),
)
ROWS = 12


def arm(tree: Tree, advantage: Estimator) -> Arm:
    rollout = (
        CHAINS.rollout if isinstance(tree, NoTree) else dataclasses.replace(CHAINS.rollout, tree=tree, samples=ROWS)
    )
    objective = dataclasses.replace(CHAINS.objective, advantage=advantage)
    cfg = dataclasses.replace(CHAINS, rollout=rollout, objective=objective)
    return Arm(cfg, warm=dataclasses.replace(CHAINS, task=NOISY.task))


POINTS = PointTree(roots=4, branches=2)
ARMS = {
    "chains, rloo": arm(NoTree(), Rloo()),
    "entropy, tree_rl": arm(POINTS, TreeRl()),
    "entropy, spo": arm(POINTS, Spo()),
    "entropy, rloo": arm(POINTS, Rloo()),
    "surprisal, tree_rl": arm(dataclasses.replace(POINTS, by="surprisal"), TreeRl()),
    "random, tree_rl": arm(dataclasses.replace(POINTS, by="random"), TreeRl()),
    "segments of 3, tree_po": arm(SegmentTree(tokens=3, roots=4), TreePo()),
}


def tables(runs: list[dict]) -> str:
    return report.token_table(runs, list(ARMS), STEPS, TOKENS)


if __name__ == "__main__":
    found = runs_of(__doc__, RESULTS, ARMS, pools=(POOL, NOISY))
    print(tables(found))
    report.plot(RESULTS.with_suffix(".png"), found, {"three additions": list(ARMS)}, beside="tokens")

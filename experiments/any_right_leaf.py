"""Probability that some response of a prompt is right, by the tokens that were sampled for it: trees against chains.

    python -m experiments.any_right_leaf              # the runs that the results file lacks, then the table
    python -m experiments.any_right_leaf --report     # the table alone

The task and the warm start are those of `experiments.trees`; there is no RL. Chains at equal tokens: the unbiased estimate of
pass@k from 32 chains, between whole k on a straight line.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence

import jax
import numpy as np

from experiments.arithmetic import SEEDS, warm_start
from experiments.results_file import DIRECTORY, complete, read
from experiments.trees import CHAINS, NOISY, POOL
from jaxrl_llm.config.run_config import to_dict
from jaxrl_llm.metrics.estimates import pass_at_k
from jaxrl_llm.model import params as model_params
from jaxrl_llm.parallel import hosts
from jaxrl_llm.roles.start_or_restore import start_rl
from jaxrl_llm.rollout.config import PointTree
from jaxrl_llm.rollout.engine import Engine
from jaxrl_llm.tasks.stream import make_prompts
from jaxrl_llm.train import Run, open_run
from jaxrl_llm.types import Policy, Rollouts

RESULTS = DIRECTORY / "any_right_leaf.json"
PROMPTS, MOST = 2_048, 32
SHAPES = {"4 roots, 8 branches": (4, 12), "6 roots, 24 branches": (6, 30)}
BY = ("entropy", "surprisal", "random")


def run_seed(seed: int) -> list[dict]:
    """Return tokens and shares of prompts with a right response, of each shape and rule."""
    cfg = dataclasses.replace(CHAINS, seed=seed)
    warm = warm_start(dataclasses.replace(cfg, task=NOISY.task))
    with (
        tempfile.TemporaryDirectory() as run_dir,
        open_run(dataclasses.replace(cfg, run_dir=run_dir), must_resume=False, given=None, ends_process=False) as run,
    ):
        shardings = model_params.shardings(run.blueprint.specs, run.blueprint.train)
        policy = run.learner.publish(_state(run, hosts.put(jax.tree.map(np.array, warm), shardings)), None)
        chains = sampled(run, policy, samples=MOST)
        right, length = right_rows(run, chains).reshape(PROMPTS, MOST), chains.length.mean()
        at = np.arange(1, MOST + 1)
        of_chains = np.array([pass_at_k(right, int(k)).value for k in at])
        found = []
        for shape, (roots, rows) in SHAPES.items():
            for by in BY:
                tree = sampled(run, policy, samples=rows, tree=PointTree(roots=roots, branches=2, by=by))
                tokens = np.count_nonzero(tree.sampled) / PROMPTS
                any_right = right_rows(run, tree).reshape(PROMPTS, rows).any(axis=1).mean()
                found.append(
                    {
                        "shape": shape,
                        "by": by,
                        "tokens": float(tokens),
                        "tree": float(any_right),
                        "chains": float(np.interp(tokens, at * length, of_chains)),
                        "leaves": float(right_rows(run, tree).mean()),
                        "policy": float(right.mean()),
                    }
                )
        return found


def _state(run: Run, params: object) -> object:
    return start_rl(run.blueprint, run.learner, run.source.state, params, run.keys.train).train


def sampled(run: Run, policy: Policy, **options: object) -> Rollouts:
    """Responses to the first training prompts."""
    blueprint, task = run.blueprint, run.evaluator.task
    engine = Engine(blueprint.engine_model, blueprint.cfg.rollout, blueprint.prompt_slots, prompts=256, **options)
    places = np.arange(PROMPTS)
    return engine.generate(policy, make_prompts(task, task.train, places, places), run.keys.train)


def right_rows(run: Run, rollouts: Rollouts) -> np.ndarray:
    """Return True for right responses."""
    task = run.evaluator.task
    texts = task.decode(rollouts.tokens, rollouts.length)
    row = rollouts.prompts.row[rollouts.prompt]
    return np.array([text == task.train[r].answer for text, r in zip(texts, row.tolist(), strict=True)])


def table(runs: Sequence[dict]) -> str:
    """Markdown table: means over seeds; the difference with the half width of its 95 % interval over the seeds."""
    lines = [
        "| tree | left by | tokens per prompt | some leaf right | chains, as many tokens | difference | leaves / chains right |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape in SHAPES:
        for by in BY:
            of = [found for run in runs for found in run["found"] if (found["shape"], found["by"]) == (shape, by)]
            mean = {name: np.mean([x[name] for x in of]) for name in ("tokens", "tree", "chains", "leaves", "policy")}
            away = np.array([x["tree"] - x["chains"] for x in of])
            # Student's t for 2 degrees of freedom.
            half = 4.303 * away.std(ddof=1) / np.sqrt(len(away)) if len(away) == 3 else np.nan
            lines.append(
                f"| {shape} | {by} | {mean['tokens']:.1f} | {mean['tree']:.4f} | {mean['chains']:.4f} "
                f"| {away.mean():+.4f} ± {half:.4f} | {mean['leaves'] / mean['policy']:.3f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="no runs: the table from the results file")
    if not parser.parse_args().report:
        for pool in (POOL, NOISY):
            pool.write()
        settings = {"setup": to_dict(CHAINS), "prompts": PROMPTS, "chains": MOST}
        complete(
            RESULTS, settings, SEEDS, lambda run: run["seed"], lambda seed: {"seed": seed, "found": run_seed(seed)}
        )
    print(table(read(RESULTS)))


if __name__ == "__main__":
    main()

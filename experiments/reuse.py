"""Exact reuse over a training run: how many tokens a later policy draws again with the same noise, by the updates between.

    python -m experiments.reuse              # the runs that the results file lacks, then the tables
    python -m experiments.reuse --report     # the tables alone

The task, the model and the warm start are those of `experiments.thinking_budgets`; RL is free of controls, with one update per
step. Responses to the held-out prompts are sampled at some steps, and reused by the policies of later ones.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence

import jax
import numpy as np

from experiments.arithmetic import warm_start
from experiments.results_file import DIRECTORY, complete, read
from experiments.thinking_budgets import ROWS, SEEDS, START, write_pool
from jaxrl_llm.config.run_config import to_dict
from jaxrl_llm.model import params as model_params
from jaxrl_llm.parallel import hosts
from jaxrl_llm.roles.start_or_restore import start_rl
from jaxrl_llm.tasks.stream import make_prompts
from jaxrl_llm.train import Run, first_policy, open_run, step
from jaxrl_llm.types import Policy, Rollouts

RESULTS = DIRECTORY / "reuse.json"
BASES, LAGS = (0, 16, 32, 48), (1, 4, 16)
"""Steps at which responses are sampled, and steps until they are reused."""
RUN = dataclasses.replace(
    START, steps=max(BASES) + max(LAGS), update=dataclasses.replace(START.update, epochs=1, minibatches=1)
)


def run_seed(seed: int) -> list[dict]:
    """Return what was reused in a run."""
    cfg, warm = dataclasses.replace(RUN, seed=seed), warm_start(dataclasses.replace(RUN, seed=seed))
    with (
        tempfile.TemporaryDirectory() as run_dir,
        open_run(dataclasses.replace(cfg, run_dir=run_dir), must_resume=False, given=None, ends_process=False) as run,
    ):
        shardings = model_params.shardings(run.blueprint.specs, run.blueprint.train)
        params = hosts.put(jax.tree.map(np.array, warm), shardings)
        state = start_rl(run.blueprint, run.learner, run.source.state, params, run.keys.train)
        policy, known, found = first_policy(run, state.train), {}, []
        for now in range(cfg.steps + 1):
            if now in BASES:
                known[now] = sampled(run, policy, now)
            for base in known:
                if now - base in LAGS:
                    found.append({"base": base, "lag": now - base, **reused(run, policy, known[base], base)})
            if now < cfg.steps:
                done = step(run.learner, run.source, state, policy, np.random.default_rng((seed, int(state.step))))
                state, policy = done.state, done.policy
        return found


def sampled(run: Run, policy: Policy, base: int) -> Rollouts:
    """Responses to the held-out prompts, with noise of their own for each base."""
    task, engine = run.evaluator.task, run.evaluator.collect.engine
    places = np.arange(len(task.held_out))
    return engine.generate(
        policy, make_prompts(task, task.held_out, places, places + base * len(places)), run.evaluator.key
    )


def reused(run: Run, policy: Policy, known: Rollouts, base: int) -> dict[str, float]:
    """Shares of tokens and of whole responses that are kept, and of responses that equal those of a fresh call."""
    got, fresh = run.evaluator.collect.engine.reuse(policy, known, run.evaluator.key), sampled(run, policy, base)
    return {
        "tokens": float(got.kept.sum() / got.rollouts.length.sum()),
        "whole": float(np.mean(got.kept == got.rollouts.length)),
        "as_fresh": float(np.mean((got.rollouts.tokens == fresh.tokens).all(axis=1))),
        "length": float(got.rollouts.length.mean()),
    }


def table(runs: Sequence[dict]) -> str:
    """Markdown table with a row for each number of updates: means over seeds and steps, with the range."""
    lines = ["| updates between | tokens kept | whole responses kept | equal to a fresh call |", "|---|---|---|---|"]
    for lag in LAGS:
        of = [run for run in runs if run["lag"] == lag]
        cells = [[run[name] for run in of] for name in ("tokens", "whole", "as_fresh")]
        shown = [f"{np.mean(x):.3f} ({min(x):.3f} to {max(x):.3f})" for x in cells]
        lines.append(f"| {lag} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="no runs: the tables from the results file")
    if not parser.parse_args().report:
        write_pool()
        settings = {"run": to_dict(RUN), "rows": ROWS}
        complete(
            RESULTS, settings, SEEDS, lambda run: run["seed"], lambda seed: {"seed": seed, "reused": run_seed(seed)}
        )
    print(table([found for run in read(RESULTS) for found in run["reused"]]))


if __name__ == "__main__":
    main()

"""Captured against recomputed old log-probs: the effect of the ratio, measured by removing it.

    python docs/experiments/old_logprobs.py              # the runs that the JSON lacks, then the plot and the tables
    python docs/experiments/old_logprobs.py --report     # the plot and the tables alone

The arms differ in the old log-probs and the clip only:

    captured     `batch.behavior_logprobs` as captured while sampling
    recomputed   rescored under the current parameters before each update: the famous bug
    once         rescored once per batch, before its first update: the ratio does not reflect the lag
    unclipped    as captured, with bounds that no ratio exceeds: a ratio, but no clip

Each arm samples with the newest policy (lag 0) or with the one published 4 steps earlier (lag 4). The arms of a seed share the
held-out prompts, the warm start, the stream of prompts and every random key. Results: docs/old_logprobs.md.
"""

import argparse
import dataclasses
import json
import os
import platform
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.metrics.guards import RatioAlarm
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.group_estimators import Rloo
from jaxrl_llm.objective.loss_config import Clip, PolicyGradient
from jaxrl_llm.parallel import hosts
from jaxrl_llm.roles import inputs
from jaxrl_llm.roles.blueprint import Blueprint, blueprint_of
from jaxrl_llm.roles.build import make_keys, make_scorer, make_supervised
from jaxrl_llm.roles.scorer import Scorer
from jaxrl_llm.roles.start_or_restore import start_params, start_rl, start_supervised
from jaxrl_llm.roles.updates import as_floats, without_zero_gradients
from jaxrl_llm.rollout.config import RolloutConfig
from jaxrl_llm.tasks.config import ArithmeticTask
from jaxrl_llm.train import Run, open_run
from jaxrl_llm.types import Experience, Groups, PyTree, TrainState
from jaxrl_llm.update.batch import fill_batch, minibatches
from jaxrl_llm.update.config import UpdateConfig, WarmStartConfig
from jaxrl_llm.update.optimizer.config import AdamW
from jaxrl_llm.update.step import Update, jit_update

ARMS, LAGS, SEEDS, RATE = ("captured", "recomputed"), (0, 4), (0, 1, 2), 3e-4
CASES = [(arm, lag, RATE, seed) for seed in SEEDS for lag in LAGS for arm in ARMS]
"""arm, lag, learning rate, seed."""
HIGHER_RATE = [(arm, lag, 1e-3, 0) for lag in LAGS for arm in ARMS]
CAUSES = [(arm, lag, RATE, seed) for seed in SEEDS for arm, lag in (("once", 4), ("unclipped", 0), ("unclipped", 4))]
UNCLIPPED = ObjectiveConfig(advantage=Rloo(), loss=PolicyGradient(surrogate=Clip(low=1.0, high=1e9)))
EVERY = 20
"""Steps between evaluations."""
HERE = Path(__file__).parent
RESULTS, PLOT = HERE / "old_logprobs.json", HERE / "old_logprobs.png"

SETUP = dataclasses.replace(
    RunConfig(),
    steps=100,
    task=ArithmeticTask(terms=3, held_out=128),
    model=ModelConfig(vocab_size=16, layers=2, d_model=64, heads=4, kv_heads=2, head_dim=16, d_mlp=256),
    warm_start=WarmStartConfig(
        steps=500, rows=128, noise=0.56, optimizer=AdamW(lr=2e-3, warmup_steps=20, weight_decay=0.1)
    ),
    rollout=RolloutConfig(prompts=32, samples=8, max_new_tokens=4, temperature=1.0),
    objective=ObjectiveConfig(advantage=Rloo()),
    update=UpdateConfig(epochs=2, minibatches=2),
)
"""Everything except the seed and the learning rate."""


def config(arm: str, rate: float, seed: int, run_dir: str) -> RunConfig:
    objective = UNCLIPPED if arm == "unclipped" else SETUP.objective
    update = dataclasses.replace(SETUP.update, optimizer=AdamW(lr=rate))
    return dataclasses.replace(SETUP, seed=seed, objective=objective, update=update, run_dir=run_dir)


def experiment(cases: list[tuple[str, int, float, int]]) -> None:
    """Run the cases that the JSON lacks; each is added to it when it ends."""
    warm: dict[int, PyTree] = {}
    for case in cases:
        if case in {key(r) for r in stored()}:
            continue
        arm, lag, rate, seed = case
        with tempfile.TemporaryDirectory() as run_dir:
            cfg = config(arm, rate, seed, run_dir)
            warm[seed] = warm.get(seed) or warm_up(cfg)
            with open_run(cfg, must_resume=False, given=None, ends_process=False) as run:
                begun, used = time.monotonic(), time.process_time()
                found = learn(run, warm[seed], arm, lag)
        spent = {"seconds": round(time.monotonic() - begun, 1), "cpu_seconds": round(time.process_time() - used, 1)}
        found = {"arm": arm, "lag": lag, "lr": rate, "seed": seed, **spent, **found}
        print(time.strftime("%H:%M:%S"), line(found), flush=True)
        store([*stored(), found])


def key(run: dict) -> tuple[str, int, float, int]:
    return run["arm"], run["lag"], run["lr"], run["seed"]


def stored() -> list[dict]:
    return json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []


def store(runs: list[dict]) -> None:
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), shared; jax {jax.__version__}"
    found = {"machine": machine, "setup": dataclasses.asdict(SETUP), "runs": sorted(runs, key=key)}
    RESULTS.write_text(json.dumps(found, separators=(",", ":"), allow_nan=False) + "\n")


def warm_up(cfg: RunConfig) -> PyTree:
    """Parameters from which all arms of a seed start."""
    given = inputs.read(cfg, trains=True)
    blueprint = blueprint_of(cfg, given)
    supervised = make_supervised(blueprint, given.task)
    state = start_supervised(blueprint, start_params(blueprint, make_keys(cfg.seed).train))
    while state.step < cfg.warm_start.steps:
        state, metrics = supervised(state)
        if state.step % 100 == 0:
            print(f"seed {cfg.seed}: warm start {state.step}, loss {metrics['loss']:.3f}", flush=True)
    return state.train.params


class Programs(NamedTuple):
    update: Update
    score_step: Scorer
    score_minibatch: Scorer


def learn(run: Run, warm: PyTree, arm: str, lag: int) -> dict:
    """One run of RL: the stages of `train.step`, with a queue of policies and, in one arm, the bug."""
    blueprint, source, learner, cfg = run.blueprint, run.source, run.learner, run.blueprint.cfg
    programs = Programs(
        jit_update(blueprint.learner_specs, blueprint.loss, blueprint.optimizer, blueprint.scoring),
        *(make_scorer(blueprint, shape) for shape in (blueprint.shapes.experience, blueprint.shapes.update)),
    )
    state = start_rl(blueprint, learner, source.state, jax.tree.map(jnp.copy, warm), run.keys.train)
    policies = deque([learner.publish(state.train, None)], maxlen=lag + 1)
    exact = {0: run.evaluator(state.train.params, policies[-1])["eval/exact"]}
    steps, rings, alarm = [], 0, RatioAlarm()
    for step in range(cfg.steps):
        rng = np.random.default_rng((cfg.seed, step))
        source.use(policies[0])
        _, groups, _ = learner.filter.apply(state.filters, source.take(step))
        scores = learner.score(state, groups)
        experience = Experience(groups, scores, learner.advantage(groups, scores))
        train, updates = update(blueprint, programs, state.train, experience, arm, rng)
        for i, metrics in enumerate(updates):
            stale = i > 0 or bool(groups.rollouts.version.max() < int(train.step) - cfg.update.updates)
            alarm, ring = alarm.observe(metrics["ratio/min"], metrics["ratio/max"], stale)
            rings += ring
        steps.append(describe(groups, updates))
        policies.append(learner.publish(train, policies[0] if len(policies) > lag else None))
        state = state._replace(train=train)
        if (step + 1) % EVERY == 0:
            exact[step + 1] = run.evaluator(train.params, policies[-1])["eval/exact"]
    series = {name: [float(f"{s[name]:.4g}") if np.isfinite(s[name]) else None for s in steps] for name in steps[0]}
    return {"exact": {str(k): round(v, 4) for k, v in exact.items()}, "alarm_rings": rings, "steps": series}


def update(
    blueprint: Blueprint,
    programs: Programs,
    train: TrainState,
    experience: Experience,
    arm: str,
    rng: np.random.Generator,
) -> tuple[TrainState, list[dict[str, float]]]:
    """Epochs x minibatches of updates, and the metrics of those with at least one token in the loss."""
    cfg, loss, found = blueprint.cfg.update, blueprint.loss, []
    if arm == "once":
        experience = rescored(programs.score_step, train.params, experience)
    for _ in range(cfg.epochs):
        for part in minibatches(experience, cfg.minibatches, rng):
            if arm == "recomputed":
                part = rescored(programs.score_minibatch, train.params, part)
            batch, _ = fill_batch(part, blueprint.shapes.update, blueprint.vocab.pad, loss.aggregation, loss.length)
            train, metrics = programs.update(train, hosts.put(batch, blueprint.train.sharding(("rows", None))))
            metrics, _ = without_zero_gradients(as_floats(jax.device_get(metrics)))
            if tokens := batch.loss_mask.sum():
                found.append(metrics | {"tokens": int(tokens)})
    return train, found


def rescored(score: Scorer, params: PyTree, part: Experience) -> Experience:
    """The bug: log-probs under the current policy replace those captured while sampling."""
    rollouts = part.groups.rollouts.replace(behavior_logprobs=score(params, part.groups).logprobs)
    return part._replace(groups=part.groups.replace(rollouts=rollouts))


def describe(groups: Groups, updates: list[dict[str, float]]) -> dict[str, float]:
    """Metrics of one step of RL. Clip fractions and ratios are over the tokens of the groups that have a signal.

    `off_one`, max |r - 1|, is -inf if no minibatch has such a group, and null in the JSON.
    """
    tokens = [m["tokens"] for m in updates]
    clipped = [m["clip_ratio/low"] + m["clip_ratio/high"] for m in updates]

    def off_one(some: list[dict[str, float]]) -> float:
        return max((max(m["ratio/max"] - 1, 1 - m["ratio/min"]) for m in some), default=-np.inf)

    return {
        "reward": groups.reward.mean(),
        "groups_kept": groups.kept.sum(),
        "clip_fraction": np.average(clipped, weights=tokens) if updates else np.nan,
        "off_one_first": off_one(updates[:1]),
        "off_one_later": off_one(updates[1:]),
        "entropy": np.mean([m["entropy"] for m in updates]),
        "grad_norm": np.mean([m["grad_norm"] for m in updates]),
    }


def line(run: dict) -> str:
    """One-line summary of a run."""
    name = f"lr {run['lr']:g}, {run['arm']}, lag {run['lag']}, seed {run['seed']}"
    path = " ".join(f"{v:.3f}" for v in run["exact"].values())
    steps = {name: np.array(values, float) for name, values in run["steps"].items()}
    first, later = np.nanmax(steps["off_one_first"]), np.nanmax(steps["off_one_later"])
    return (
        f"{name}: exact {path}; clipped {steps['clip_fraction'].mean():.4f}; max |r-1| {first:.2g} / {later:.2g}; "
        f"entropy {steps['entropy'][-1]:.3f}; alarms {run['alarm_rings']} ({run['seconds']} s, {run['cpu_seconds']} s of CPU)"
    )


def table(runs: list[dict]) -> str:
    """Markdown table with a row per arm, lag and learning rate. "late" is the mean over the evaluations of steps 60, 80 and 100."""
    rows = [
        "| lr | lag | old log-probs | exact accuracy, each seed | mean | late | clip fraction | max \\|r - 1\\|, first update "
        "| later updates | median step, later updates |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for rate, lag, arm in sorted({(r["lr"], r["lag"], r["arm"]) for r in runs}):
        some = [r for r in runs if key(r)[:3] == (arm, lag, rate)]
        exact = np.array([list(r["exact"].values()) for r in some])
        series = {name: np.array([r["steps"][name] for r in some], float) for name in some[0]["steps"]}
        first, later, clipped = (series[name] for name in ("off_one_first", "off_one_later", "clip_fraction"))
        last = ", ".join(f"{v:.3f}" for v in exact[:, -1])
        rows.append(
            f"| {rate:g} | {lag} | {arm} | {last} | **{exact[:, -1].mean():.3f}** | {exact[:, -3:].mean():.3f} "
            f"| {clipped.mean():.3f} | {np.nanmax(first):.2g} | {np.nanmax(later):.2g} | {np.nanmedian(later):.2g} |"
        )
    return "\n".join(rows)


def plot(runs: list[dict]) -> None:
    """Plot accuracy, clip fraction and the ratio's distance from 1, a row per lag; thin lines are seeds, thick lines their mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(LAGS), 3, figsize=(12, 6.4), sharex=True, sharey="col", layout="constrained")
    titles = ("exact held-out accuracy", "clip fraction", "max |r - 1|, updates 2 to 4 of a step")
    for row, lag in zip(axes, LAGS, strict=True):
        for arm, color in zip(ARMS, ("#1f77b4", "#d62728"), strict=True):
            some = [r for r in runs if key(r)[:3] == (arm, lag, RATE)]
            x = [int(s) for s in some[0]["exact"]]
            step = 1 + np.arange(len(some[0]["steps"]["reward"]))
            curves = (
                (x, [list(r["exact"].values()) for r in some]),
                (step, [r["steps"]["clip_fraction"] for r in some]),
                (step, np.array([r["steps"]["off_one_later"] for r in some], float)),
            )
            for axis, (where, lines) in zip(row, curves, strict=True):
                axis.plot(where, np.transpose(lines), color=color, lw=0.7, alpha=0.4)
                middle = np.median(lines, axis=0) if axis is row[2] else np.mean(lines, axis=0)
                axis.plot(where, middle, color=color, lw=2, label=arm)
        row[0].set_ylabel(f"lag {lag}")
        # Logarithmic, but linear below 0.01: exactly 0 must show as 0.
        row[2].set_yscale("symlog", linthresh=1e-2)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    for axis in axes[-1]:
        axis.set_xlabel("step of RL")
    axes[0, 0].legend(frameon=False, loc="lower right")
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="no runs: the plot and the table from the JSON")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="only the runs of these seeds")
    options = parser.parse_args()
    if not options.report:
        experiment([case for case in CASES + HIGHER_RATE + CAUSES if case[-1] in options.seeds])
    print(table(stored()))
    plot(stored())


if __name__ == "__main__":
    main()

"""Every preset on the arithmetic task, from one warm start: final accuracy, also relative to GRPO.

    python docs/experiments/presets.py                       # the runs that the JSON lacks, then the table
    python docs/experiments/presets.py --presets verl:grpo   # only these
    python docs/experiments/presets.py --once                # one update per batch: is off-policy data the cause?
    python docs/experiments/presets.py --report              # the tables alone

All share the warm start, the stream of prompts, the random keys, the optimizer and its learning rate; only the objective differs.
There are four updates per batch; with --once a single one on the whole batch.
Results: docs/objectives.md.
"""

import argparse
import dataclasses
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.config import loading, run_config
from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.metrics.config import MetricsConfig
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.objective.presets import PRESETS
from jaxrl_llm.roles import inputs
from jaxrl_llm.roles.blueprint import blueprint_of
from jaxrl_llm.roles.build import make_keys, make_supervised
from jaxrl_llm.roles.start_or_restore import start_params, start_rl, start_supervised
from jaxrl_llm.rollout.config import RolloutConfig
from jaxrl_llm.tasks.config import ArithmeticTask
from jaxrl_llm.train import first_policy, open_run, step, summary
from jaxrl_llm.types import PyTree
from jaxrl_llm.update.config import PackingConfig, UpdateConfig, WarmStartConfig
from jaxrl_llm.update.optimizer.config import AdamW

STEPS, EVERY, BESIDE = 100, 20, "trl:grpo"
ONCE = ("trl:grpo", "paper:rloo", "paper:max_rl", "paper:dpo", "verl:gpg", "verl:cispo", "verl:pass_at_k", "skyrl:dppo")
"""The presets below 0.9 of GRPO's accuracy with four updates per batch, and GRPO."""
RESULTS = Path(__file__).parent / "presets.json"
SETUP = dataclasses.replace(
    RunConfig(),
    steps=STEPS,
    task=ArithmeticTask(terms=3, held_out=128),
    model=ModelConfig(vocab_size=16, layers=2, d_model=64, heads=4, kv_heads=2, head_dim=16, d_mlp=256),
    warm_start=WarmStartConfig(
        steps=500, rows=128, noise=0.56, optimizer=AdamW(lr=2e-3, warmup_steps=20, weight_decay=0.1)
    ),
    rollout=RolloutConfig(prompts=32, samples=8, max_new_tokens=4, temperature=1.0),
    update=UpdateConfig(epochs=2, minibatches=2, packing=PackingConfig("shared_prefix"), optimizer=AdamW(lr=3e-4)),
    metrics=MetricsConfig(console_every=1000, samples_every=0, rollouts_every=0, tensorboard=False),
)
"""All but the objective."""


def config(preset: str, updates: int, run_dir: str) -> RunConfig:
    update = SETUP.update if updates == 4 else dataclasses.replace(SETUP.update, epochs=1, minibatches=1)
    values = run_config.to_dict(dataclasses.replace(SETUP, run_dir=run_dir, update=update)) | {"objective": preset}
    return loading.validate(values, preset)


def warm_up() -> PyTree:
    """Parameters from which all presets start."""
    cfg = config(BESIDE, 4, SETUP.run_dir)
    given = inputs.read(cfg, trains=True)
    blueprint = blueprint_of(cfg, given)
    supervised = make_supervised(blueprint, given.task)
    state = start_supervised(blueprint, start_params(blueprint, make_keys(cfg.seed).train))
    while state.step < cfg.warm_start.steps:
        state, _ = supervised(state)
    return state.train.params


def learn(preset: str, updates: int, warm: PyTree) -> dict:
    """One run of RL."""
    with tempfile.TemporaryDirectory() as run_dir:
        cfg = config(preset, updates, run_dir)
        with open_run(cfg, must_resume=False, given=None, ends_process=False) as run:
            start = time.monotonic()
            state = start_rl(run.blueprint, run.learner, run.source.state, jax.tree.map(jnp.copy, warm), run.keys.train)
            policy = first_policy(run, state.train)
            exact, reward = {0: run.evaluator(state.train.params, policy)["eval/exact"]}, []
            for number in range(1, cfg.steps + 1):
                rng = np.random.default_rng((cfg.seed, int(state.step)))
                done = step(run.learner, run.source, state, policy, rng)
                state, policy = done.state, done.policy
                reward.append(summary(run, done)["reward"])
                if number % EVERY == 0:
                    exact[number] = run.evaluator(state.train.params, policy)["eval/exact"]
            seconds = time.monotonic() - start
    return {
        "preset": preset,
        "updates": updates,
        "seconds": round(seconds, 1),
        "exact": {str(step): round(value, 4) for step, value in exact.items()},
        "reward": [round(float(r), 4) for r in reward],
    }


def stored() -> dict[tuple[int, str], dict]:
    """Runs by updates per batch and preset."""
    return {(r["updates"], r["preset"]): r for r in json.loads(RESULTS.read_text())["runs"]} if RESULTS.exists() else {}


def store(found: dict) -> None:
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), shared; jax {jax.__version__}"
    runs = stored() | {(found["updates"], found["preset"]): found}
    ordered = [runs[updates, name] for updates in (4, 1) for name in PRESETS if (updates, name) in runs]
    setup = dataclasses.asdict(SETUP)
    RESULTS.write_text(
        json.dumps({"machine": machine, "setup": setup, "runs": ordered}, separators=(",", ":"), allow_nan=False) + "\n"
    )


def late(run: dict) -> float:
    """Mean accuracy of the last three evaluations."""
    return float(np.mean(list(run["exact"].values())[-3:]))


def table(updates: int) -> str:
    """Markdown table with a row per preset."""
    runs = {name: run for (n, name), run in stored().items() if n == updates}
    own = late(runs[BESIDE])
    rows = [
        "| preset | exact accuracy after 20, 40, 60, 80, 100 steps | late | relative to GRPO |",
        "|---|---|---|---|",
    ]
    for name, run in runs.items():
        path = ", ".join(f"{value:.3f}" for step, value in run["exact"].items() if step != "0")
        rows.append(f"| `{name}` | {path} | {late(run):.3f} | {late(run) / own:.2f} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="no runs; print the table from the JSON")
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=list(PRESETS), help="only these")
    parser.add_argument("--once", action="store_true", help="one update per batch, for the presets in ONCE")
    options = parser.parse_args()
    updates, names = (1, ONCE) if options.once else (4, options.presets)
    missing = [] if options.report else [name for name in names if (updates, name) not in stored()]
    warm = warm_up() if missing else None
    for name in missing:
        found = learn(name, updates, warm)
        print(time.strftime("%H:%M:%S"), name, found["exact"], found["seconds"], flush=True)
        store(found)
    for n in sorted({n for n, _ in stored()}, reverse=True):
        print(table(n), end="\n\n")


if __name__ == "__main__":
    main()

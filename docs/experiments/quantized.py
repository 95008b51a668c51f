"""RL with rollouts in 8 bits, with and without truncated importance sampling, compared with rollouts in the trainer's dtype.

    python docs/experiments/quantized.py                 # the runs that the JSON lacks, then the plot and the table
    python docs/experiments/quantized.py --report        # the plot and the table alone

The arms share seed, warm start, stream of prompts and random keys.

    compute            the sampling policy has f32 weights, as the trainer; no correction
    int8               weights in int8, corrected by truncated importance sampling, the default for quantized sampling
    int8 uncorrected   weights in int8; PPO's ratio is relative to the sampler's log-probs, and nothing else corrects the difference
    int8 kv ...        either of the two, with keys and values in int8 too

Results: docs/quantized.md.
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
import numpy as np

from jaxrl_llm.config.run_config import CheckpointConfig, EvaluationConfig, RunConfig
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.group_estimators import Rloo
from jaxrl_llm.objective.loss_config import AutoCorrection, NoCorrection, PolicyGradient
from jaxrl_llm.rollout.config import EngineConfig, RolloutConfig
from jaxrl_llm.tasks.config import ArithmeticTask
from jaxrl_llm.train import train
from jaxrl_llm.update.config import UpdateConfig, WarmStartConfig
from jaxrl_llm.update.optimizer.config import AdamW

ARMS = {
    "compute": (EngineConfig(), AutoCorrection()),
    "int8": (EngineConfig(weights="int8"), AutoCorrection()),
    "int8 uncorrected": (EngineConfig(weights="int8"), NoCorrection()),
    "int8 kv": (EngineConfig(weights="int8", cache="int8"), AutoCorrection()),
    "int8 kv uncorrected": (EngineConfig(weights="int8", cache="int8"), NoCorrection()),
}
SEEDS = (0, 1, 2)
EVERY = 20
"""Steps between evaluations."""
HERE = Path(__file__).parent
RESULTS, PLOT = HERE / "quantized.json", HERE / "quantized.png"

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
    update=UpdateConfig(epochs=2, minibatches=2, optimizer=AdamW(lr=3e-4)),
    evaluation=EvaluationConfig(every=EVERY),
    checkpoint=CheckpointConfig(every=1000),
)
"""Everything except the arm and the seed."""
SERIES = (
    "mismatch/kl",
    "mismatch/mean_abs_dlogp",
    "mismatch/max_abs_dlogp",
    "mismatch/truncated",
    "ratio/max",
    "reward",
)


def config(arm: str, seed: int, run_dir: str) -> RunConfig:
    engine, correction = ARMS[arm]
    rollout = dataclasses.replace(SETUP.rollout, engine=engine)
    objective = dataclasses.replace(SETUP.objective, loss=PolicyGradient(correction=correction))
    return dataclasses.replace(SETUP, seed=seed, run_dir=run_dir, rollout=rollout, objective=objective)


def experiment(cases: list[tuple[str, int]]) -> None:
    """Run the cases that the JSON lacks; each is added to it when it ends."""
    for arm, seed in cases:
        if (arm, seed) in {(r["arm"], r["seed"]) for r in stored()}:
            continue
        with tempfile.TemporaryDirectory() as run_dir:
            begun, used = time.monotonic(), time.process_time()
            train(config(arm, seed, run_dir))
            rows = [json.loads(row) for row in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
        spent = {"seconds": round(time.monotonic() - begun, 1), "cpu_seconds": round(time.process_time() - used, 1)}
        store([*stored(), {"arm": arm, "seed": seed, **spent, **describe(rows)}])


def describe(rows: list[dict]) -> dict:
    """Curves of a run: exact accuracy at each evaluation, and each of `SERIES` that the run has, one number per step."""
    steps = [row for row in rows if row.get("phase") == "rl"]
    exact = {str(i): round(row["eval/exact"], 4) for i, row in enumerate(steps, 1) if "eval/exact" in row}
    number = lambda x: None if x is None or not np.isfinite(x) else float(f"{x:.4g}")  # noqa: E731
    return {"exact": exact, "steps": {n: [number(s.get(n)) for s in steps] for n in SERIES if n in steps[0]}}


def stored() -> list[dict]:
    return json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []


def store(runs: list[dict]) -> None:
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), shared; jax {jax.__version__}"
    found = {"machine": machine, "setup": dataclasses.asdict(SETUP), "runs": sorted(runs, key=place)}
    RESULTS.write_text(json.dumps(found, separators=(",", ":"), allow_nan=False) + "\n")


def place(run: dict) -> tuple[int, int]:
    return list(ARMS).index(run["arm"]), run["seed"]


def table(runs: list[dict]) -> str:
    """Markdown table, a row per arm. "late" is the mean of the evaluations at steps 60, 80 and 100; mismatch is over all steps."""
    rows = [
        "| sampler | exact accuracy, each seed | mean | late | mismatch KL, nats per token | mean \\|Δ log p\\| | largest "
        "| fraction truncated |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        some = [r for r in runs if r["arm"] == arm]
        if not some:
            continue
        exact = np.array([list(r["exact"].values()) for r in some])
        series = {name: np.array([r["steps"][name] for r in some], float) for name in some[0]["steps"]}
        kl, mean, largest = (series[f"mismatch/{name}"] for name in ("kl", "mean_abs_dlogp", "max_abs_dlogp"))
        cut = f"{np.nanmean(series['mismatch/truncated']):.2g}" if "mismatch/truncated" in series else ""
        each = ", ".join(f"{v:.3f}" for v in exact[:, -1])
        rows.append(
            f"| {arm} | {each} | **{exact[:, -1].mean():.3f}** | {exact[:, -3:].mean():.3f} | {np.nanmean(kl):.2g} "
            f"| {np.nanmean(mean):.2g} | {np.nanmax(largest):.2g} | {cut} |"
        )
    return "\n".join(rows)


def plot(runs: list[dict]) -> None:
    """Plot accuracy and mismatch over the steps; thin lines are seeds, thick lines their mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for i, arm in enumerate(ARMS):
        some = [r for r in runs if r["arm"] == arm]
        if not some:
            continue
        exact = np.array([list(r["exact"].values()) for r in some])
        kl = np.array([r["steps"]["mismatch/kl"] for r in some], float)
        for axis, x, lines in (
            (axes[0], [int(s) for s in some[0]["exact"]], exact),
            (axes[1], 1 + np.arange(kl.shape[1]), np.maximum(kl, 1e-14)),
        ):
            axis.plot(x, lines.T, color=f"C{i}", lw=0.7, alpha=0.4)
            axis.plot(x, np.nanmean(lines, axis=0), color=f"C{i}", lw=2, label=arm)
    axes[1].set_yscale("log")
    for axis, title in zip(
        axes, ("exact held-out accuracy", "KL of sampler from trainer, nats per token"), strict=True
    ):
        axis.set_title(title)
        axis.set_xlabel("step of RL")
    axes[0].legend(frameon=False, loc="lower right")
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="no runs; make the plot and the table from the JSON")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), help="only the runs of these arms")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="only the runs of these seeds")
    options = parser.parse_args()
    if not options.report:
        experiment([(arm, seed) for seed in options.seeds for arm in options.arms])
    print(table(stored()))
    plot(stored())


if __name__ == "__main__":
    main()

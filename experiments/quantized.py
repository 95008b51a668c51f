"""Rollouts in 8 bits, and in 4, under corrections of the sampler's mismatch; what the clip cuts, by the sign of the advantage.

    python -m experiments.quantized              # the runs that the results file lacks, then the plot and the tables
    python -m experiments.quantized --report     # the plot and the tables alone

int8 are weights, keys and values of the sampler. 4 bits are an emulation, for a larger mismatch: the sampler's matrices are rounded
to 15 values per output channel and multiplied in f32. The trainer is f32 in all arms.
"""

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array

from experiments import report
from experiments.arithmetic import SETUP, Arm, runs_of
from experiments.ratios import METRICS, with_ratios
from experiments.results_file import DIRECTORY
from jaxrl_llm.model.quantized_weights import map_matrices
from jaxrl_llm.objective.loss_config import (
    AutoCorrection,
    MaskedImportance,
    NoCorrection,
    PolicyGradient,
    TruncatedImportance,
)
from jaxrl_llm.rollout.config import EngineConfig
from jaxrl_llm.train import Run
from jaxrl_llm.types import ArrayLike, Policy, TrainState

RESULTS = DIRECTORY / "quantized.json"
STEPS, LEVELS = 100, 7
"""LEVELS: of 4 bits, on either side of 0."""
F32, INT8 = EngineConfig(), EngineConfig(weights="int8", cache="int8")


def to_4_bits(w: ArrayLike, inner: tuple[int, ...]) -> Array:
    """Return a matrix rounded to 15 values, with one scale for all dimensions `inner`, which a product sums over."""
    scale = jnp.max(jnp.abs(w), axis=inner, keepdims=True) / LEVELS
    return jnp.round(w / scale) * scale


def in_4_bits(run: Run) -> Run:
    """Return the run whose policy has rounded matrices."""
    publish, model = run.learner.publish, run.blueprint.model

    def matrix(w: Array, inner: tuple[int, ...], groups: int) -> Array:
        return to_4_bits(w, inner)

    def publish_rounded(train: TrainState, old: Policy | None) -> Policy:
        return publish(train.replace(params=map_matrices(matrix, lambda x: x, train.params, model)), old)

    return run._replace(learner=run.learner._replace(publish=publish_rounded))


def arm(engine: EngineConfig, loss: PolicyGradient, coarse: bool = False) -> Arm:
    cfg = replace(
        SETUP,
        steps=STEPS,
        rollout=replace(SETUP.rollout, engine=engine),
        objective=replace(SETUP.objective, loss=loss),
    )
    return Arm(cfg, lambda run: with_ratios(in_4_bits(run) if coarse else run), metrics=METRICS)


NONE = PolicyGradient(correction=NoCorrection())
RECOMPUTED = PolicyGradient(anchor="proximal", correction=NoCorrection())
TOKEN = PolicyGradient(correction=TruncatedImportance())
SEQUENCE = PolicyGradient(correction=TruncatedImportance(level="sequence"))
MASKED = PolicyGradient(correction=MaskedImportance())
ARMS = {
    "f32": arm(F32, NONE),
    "int8, none": arm(INT8, NONE),
    "int8, auto": arm(INT8, PolicyGradient(correction=AutoCorrection())),
    "int8, sequence": arm(INT8, SEQUENCE),
    "int8, masked": arm(INT8, MASKED),
    "4 bits, none": arm(F32, NONE, coarse=True),
    "4 bits, recomputed": arm(F32, RECOMPUTED, coarse=True),
    "4 bits, token": arm(F32, TOKEN, coarse=True),
    "4 bits, sequence": arm(F32, SEQUENCE, coarse=True),
    "4 bits, masked": arm(F32, MASKED, coarse=True),
}
"""`auto` is token-level truncated importance sampling, as the sampler is in 8 bits. `recomputed`: the ratio is to the trainer's own
log-probs before the first update, as with the corrections, but nothing has a weight."""
PANELS = {bits: ["f32", *(name for name in ARMS if name.startswith(bits))] for bits in ("int8", "4 bits")}
COLUMNS = {
    "exact": "exact held-out accuracy",
    "clipped/negative": "A < 0: share clipped",
    "clipped/positive": "A > 0: share clipped",
}


def tables(runs: list[dict]) -> str:
    of_mismatch = {
        "mismatch/kl": "KL", "mismatch/mean_abs_dlogp": "mean \\|Δ log p\\|", "fresh/max": "largest r, fresh",
        "mismatch/weight_mean": "mean weight", "mismatch/truncated": "truncated or masked", "entropy": "entropy",
    }  # fmt: skip
    of_clip = {
        "negative": "tokens with A < 0", "fresh/negative": "outside while fresh, A < 0", "fresh/positive": "A > 0",
        "clipped/negative": "clipped, A < 0", "clipped/positive": "clipped, A > 0",
    }  # fmt: skip
    return "\n\n".join(
        [
            report.late_table(runs, list(ARMS), {"exact": "exact"}),
            report.mean_table(runs, list(ARMS), of_mismatch),
            report.mean_table(runs, list(ARMS), of_clip),
        ]
    )


if __name__ == "__main__":
    found = runs_of(__doc__, RESULTS, ARMS)
    print(tables(found))
    report.plot_columns(RESULTS.with_suffix(".png"), found, PANELS, COLUMNS)

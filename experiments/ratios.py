"""Ratios of fresh tokens before the first update, and the shares of tokens that the clip cuts, by the sign of the advantage."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from jaxrl_llm.objective.loss_config import Clip
from jaxrl_llm.roles import build
from jaxrl_llm.roles.state import RunState
from jaxrl_llm.roles.updates import Learned
from jaxrl_llm.train import Run
from jaxrl_llm.types import Experience, TrainState

METRICS = (
    "ratio/mean", "ratio/max", "entropy", "grad_norm", "mismatch/kl", "mismatch/mean_abs_dlogp", "mismatch/weight_mean",
    "mismatch/truncated", "fresh/ratio", "fresh/max", "fresh/negative", "fresh/positive", "negative", "clipped/negative",
    "clipped/positive",
)  # fmt: skip
"""Metrics of the updates, and those of `with_ratios`."""


class Outside(NamedTuple):
    """Shares of the tokens of either sign for which the clip leaves no gradient."""

    negative: float
    """Share of those with A < 0 with r < 1 - low."""
    positive: float
    """Share of those with A > 0 with r > 1 + high."""


def outside(
    log_r: Float[np.ndarray, "B C"], advantage: Float[np.ndarray, "B C"], mask: Bool[np.ndarray, "B C"], clip: Clip
) -> Outside:
    """Return what a clip cuts at given ratios; NaN where there is no such token.

    Args:
        log_r: log-ratios.
        advantage: of the tokens.
        mask: tokens in the loss.
        clip: the surrogate.
    """
    down, up = mask & (advantage < 0), mask & (advantage > 0)
    return Outside(
        np.mean(log_r[down] < np.log1p(-clip.low)) if down.any() else np.nan,
        np.mean(log_r[up] > np.log1p(clip.high)) if up.any() else np.nan,
    )


def with_ratios(run: Run) -> Run:
    """Return the run with more metrics of its updates, whose surrogate has to be `Clip`.

    `fresh/ratio`, `fresh/max`: mean and largest p / p_sampler before the first update; `fresh/negative`, `fresh/positive`: what
    the clip would cut at these ratios, of the tokens with A < 0 and with A > 0. `negative`: share of tokens with A < 0.
    `clipped/negative`, `clipped/positive`: what the clip cut in the updates, of the tokens of either sign.
    """
    clip, update = run.blueprint.cfg.objective.loss.surrogate, run.learner.update
    score = build.make_scorer(run.blueprint, run.blueprint.shapes.experience)

    def measured(state: RunState, experience: Experience, rng: np.random.Generator) -> tuple[TrainState, Learned]:
        mask, advantage = experience.loss_mask, experience.credit.advantage
        now = score(state.train.params, experience.groups).logprobs
        log_r = np.where(mask, now - experience.groups.rollouts.behavior_logprobs, 0)
        train, learned = update(state, experience, rng)
        if not mask.any():
            return train, learned
        fresh, ratio = outside(log_r, advantage, mask, clip), np.exp(log_r[mask])
        found = {"fresh/ratio": ratio.mean(), "fresh/max": ratio.max(), "negative": np.mean(advantage[mask] < 0)}
        found |= {"fresh/negative": fresh.negative, "fresh/positive": fresh.positive}
        # Every epoch has every token once, so the shares of all updates are those of the batch.
        low, high = (learned.metrics[f"clip_ratio/{side}"] for side in ("low", "high"))
        found |= {"clipped/negative": low / found["negative"], "clipped/positive": high / np.mean(advantage[mask] > 0)}
        return train, learned._replace(metrics=learned.metrics | {name: float(x) for name, x in found.items()})

    return run._replace(learner=run.learner._replace(update=measured))

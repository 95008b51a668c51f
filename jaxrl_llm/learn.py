"""From experience to a new TrainState: scores of the models beside the policy, advantages, epochs of minibatches of updates."""

import time
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from jaxrl_llm.describe import as_floats
from jaxrl_llm.life import Life
from jaxrl_llm.metrics import RatioAlarm
from jaxrl_llm.model import lora
from jaxrl_llm.model.work import TrainFlops
from jaxrl_llm.objective.credit import mean_kl
from jaxrl_llm.objective.losses import with_own
from jaxrl_llm.rates import batch_flops
from jaxrl_llm.run import Run, score
from jaxrl_llm.types import Experience, Groups, Scores, TrainState
from jaxrl_llm.update.batch import make_batch, minibatches
from jaxrl_llm.update.optimizer.state import ZERO_GRADIENT

# Numbers of an update as a whole; every other is a mean over its tokens, or over its sequences, or an extreme.
OF_UPDATES = ("loss", "grad_norm", "nonfinite")


class Seen(NamedTuple):
    """What one update said, which had a token to learn from."""

    metrics: dict[str, float]
    tokens: int
    """To learn from."""
    sequences: int
    """With such a token."""


class Learned(NamedTuple):
    state: TrainState
    alarm: int
    """Stale updates in a row whose ratios were all exactly 1."""
    metrics: dict[str, float]
    """Of the updates that had a token to learn from; a number of tokens is absent where none had one."""
    advantage: Float[np.ndarray, "B C"]
    zero_gradient: dict[str, bool]
    """Of each parameter: its gradient was exactly 0 in every update that counts, one that was finite and had a token to learn
    from. Empty where none was."""
    flops: TrainFlops
    """Of the updates that had a token to learn from."""
    seconds: float
    """That these took, batches on their way and metrics back."""


def learn(run: Run, life: Life, groups: Groups, rng: np.random.Generator) -> Learned:
    """Epochs x minibatches of updates on the rows that are kept.

    Every update compares with the log-probs captured while sampling, or scored before the first, the last as well as the first.
    An update is stale, to the alarm, from the second on, or when the data is old: some token was drawn by an earlier policy.
    One without a token to learn from changes nothing, and says nothing.
    """
    cfg, state, alarm, rings = run.cfg.update, life.state, RatioAlarm(life.alarm), False
    each: list[Seen] = []
    zero, flops, seconds = [], [], 0.0
    scores = score_groups(run, life, groups)
    credit, metrics = run.advantage(groups, scores), mean_kl(run.cfg.objective.reward_kl, groups, scores)
    experience = Experience(groups, scores, credit)
    old = is_old(groups, int(state.step))
    # Anchored on the trainer of before these updates, the first has ratio 1 on old data too.
    stale = old and not run.anchored_on_proximal
    reference = life.reference if run.cfg.objective.reads_reference_distribution else None
    for _ in range(cfg.epochs):
        for part in minibatches(experience, cfg.minibatches, rng):
            batch, _ = make_batch(
                part, run.shapes.update, run.task.pad, run.loss.aggregation, run.loss.length, run.loss.own
            )
            begun = time.monotonic()
            state, found = run.update(state, run.put_batch(batch), reference)
            found, gradients = without_zero_gradients(as_floats(jax.device_get(found)))
            took = time.monotonic() - begun
            if not batch.loss_mask.any():
                continue
            seconds += took
            flops.append(batch_flops(run, batch))
            each.append(Seen(found, int(batch.loss_mask.sum()), int(part.loss_mask.any(axis=1).sum())))
            if found["nonfinite"] == 0:
                zero.append(gradients)
            alarm, ring = alarm.observe(found["ratio/min"], found["ratio/max"], stale=stale or len(each) > 1)
            rings |= ring
    metrics |= over_updates(each, old) | {"alarm/ratio": float(rings), "updates": len(each)}
    never = {path: all(gradients[path] for gradients in zero) for path in zero[0]} if zero else {}
    work = TrainFlops(*np.sum(flops, axis=0)) if flops else TrainFlops(0, 0, 0)
    return Learned(state, alarm.streak, metrics, credit.advantage, never, work, seconds)


def over_updates(each: list[Seen], old: bool) -> dict[str, float]:
    """A step's numbers: means over all tokens, sequences or updates that they speak of, and extremes; {} without an update.

    `mismatch/*` compares the sampler with the trainer at the same parameters: the first update alone does, on fresh data.
    """
    if not each:
        return {}

    def mean(name: str) -> float:
        counts = [1 if name in OF_UPDATES else s.sequences if name.startswith("dpo/") else s.tokens for s in each]
        return float(np.average([s.metrics[name] for s in each], weights=counts))

    first = each[0].metrics
    found = {name: mean(name) for name in first if not name.startswith("mismatch/")}
    found |= {"ratio/max": max(s.metrics["ratio/max"] for s in each)}
    found |= {"ratio/min": min(s.metrics["ratio/min"] for s in each)}
    return found | ({} if old else {name: x for name, x in first.items() if name.startswith("mismatch/")})


def without_zero_gradients(metrics: dict[str, float]) -> tuple[dict[str, float], dict[str, bool]]:
    """An update's metrics for the eye, and which parameters had a gradient of exactly 0."""
    zero = {name: x for name, x in metrics.items() if name.startswith(ZERO_GRADIENT)}
    rest = {name: x for name, x in metrics.items() if name not in zero}
    return rest, {name.removeprefix(ZERO_GRADIENT): x == 1 for name, x in zero.items()}


def score_groups(run: Run, life: Life, groups: Groups) -> Scores:
    """What the objective reads of the models beside the policy."""
    objective, reference, values, proximal = run.cfg.objective, None, None, None
    if objective.reads_reference_logprobs:
        params = lora.join(life.reference, lora.split(life.state.params)[1])
        reference = score(run, params, groups).logprobs
    if run.scores_proximal or objective.has_critic:
        scores = score(run, life.state.params, groups)
        proximal, values = scores.logprobs if run.scores_proximal else None, scores.values
    return with_own(Scores(reference, proximal, values), groups, run.loss.own)


def is_old(groups: Groups, version: int) -> bool:
    """Some token to learn from was drawn by an earlier policy."""
    learn = groups.rollouts.sampled & groups.keep[:, None]
    return bool((groups.rollouts.version[learn] < version).any())

"""From experience to a new TrainState: scores of the models beside the policy, advantages, epochs of minibatches of updates."""

import time
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float

from jaxrl_llm.describe import as_floats
from jaxrl_llm.experience.advantages import Outcome, estimate, reward_kl
from jaxrl_llm.experience.batch import Sequences, make_batch, minibatches, of_sequences, sequences_of
from jaxrl_llm.life import Life
from jaxrl_llm.metrics import RatioAlarm
from jaxrl_llm.model import lora
from jaxrl_llm.model.distribution import TokenScores
from jaxrl_llm.model.work import TrainFlops
from jaxrl_llm.parallel import hosts
from jaxrl_llm.rates import batch_flops
from jaxrl_llm.run import Run
from jaxrl_llm.types import Experience, PyTree, TrainState
from jaxrl_llm.update.config import PolicyGradient
from jaxrl_llm.update.optimizer.state import ZERO_GRADIENT


class Learned(NamedTuple):
    state: TrainState
    alarm: int
    """Stale updates in a row whose ratios were all exactly 1."""
    metrics: dict[str, float]
    advantage: Float[np.ndarray, "B C"]
    zero_gradient: dict[str, bool]
    """Of each parameter: its gradient was exactly 0 in every update that counts, one that was finite and had a token to learn
    from. Empty where none was."""
    flops: TrainFlops
    """Of all updates."""
    seconds: float
    """That these took, batches on their way and metrics back."""


def learn(
    run: Run, life: Life, experience: Experience, counts: Bool[np.ndarray, " P"], rng: np.random.Generator
) -> Learned:
    """Epochs x minibatches of updates on the groups that count.

    Every update compares with the log-probs captured while sampling, or scored before the first, the last as well as the first.
    An update is stale, to the alarm, from the second on, or when the data is old: some token was drawn by an earlier policy.
    """
    cfg, state, alarm, rings, each, zero = run.cfg.update, life.state, RatioAlarm(life.alarm), False, [], []
    flops, seconds = [], 0.0
    sequences, metrics = assess(run, life, experience, counts)
    old = is_old(experience, counts, int(state.step))
    # Anchored on the trainer of before these updates, the first has ratio 1 on old data too.
    stale = old and not run.anchored_on_proximal
    reference = life.reference if run.cfg.objective.reads_reference_distribution else None
    for _ in range(cfg.epochs):
        for part in minibatches(sequences, cfg.minibatches, rng):
            batch, _ = make_batch(part, run.shapes.update, run.task.pad, *means_of(run))
            begun = time.monotonic()
            state, found = run.update(state, run.put_batch(batch), reference)
            found, gradients = without_zero_gradients(as_floats(jax.device_get(found)))
            seconds += time.monotonic() - begun
            flops.append(batch_flops(run, batch))
            each.append(found)
            if found["nonfinite"] == 0 and batch.loss_mask.any():
                zero.append(gradients)
            alarm, ring = alarm.observe(each[-1]["ratio/min"], each[-1]["ratio/max"], stale=stale or len(each) > 1)
            rings |= ring
    metrics |= {name: float(np.mean([m[name] for m in each])) for name in each[0]}
    metrics |= {"ratio/max": max(m["ratio/max"] for m in each), "ratio/min": min(m["ratio/min"] for m in each)}
    # Only the first update on fresh data compares the same parameters: what is left is the sampler's own error.
    metrics |= {name: float("nan") if old else x for name, x in each[0].items() if name.startswith("mismatch/")}
    metrics |= {"alarm/ratio": float(rings), "updates": len(each)}
    never = {path: all(gradients[path] for gradients in zero) for path in zero[0]} if zero else {}
    work = TrainFlops(*map(sum, zip(*flops, strict=True)))
    return Learned(state, alarm.streak, metrics, sequences.advantage, never, work, seconds)


def without_zero_gradients(metrics: dict[str, float]) -> tuple[dict[str, float], dict[str, bool]]:
    """An update's metrics for the eye, and which parameters had a gradient of exactly 0."""
    zero = {name: x for name, x in metrics.items() if name.startswith(ZERO_GRADIENT)}
    rest = {name: x for name, x in metrics.items() if name not in zero}
    return rest, {name.removeprefix(ZERO_GRADIENT): x == 1 for name, x in zero.items()}


def means_of(run: Run) -> tuple[str, int]:
    """The aggregation and its constant length; whole pairs for a loss of pairs."""
    loss = run.cfg.objective.loss
    if not isinstance(loss, PolicyGradient):
        return ("token" if loss.kind == "distillation" else "sequence"), 1
    return loss.aggregation, loss.length or run.cfg.rollout.max_new_tokens


def assess(
    run: Run, life: Life, experience: Experience, counts: Bool[np.ndarray, " P"]
) -> tuple[Sequences, dict[str, float]]:
    """The sequences to learn from, with advantages and all that the loss reads, and what there is to say of these."""
    objective, sequences, metrics = run.cfg.objective, sequences_of(experience, counts), {}
    sampled, behavior = experience.rollouts.sampled, sequences.behavior_logprobs
    token_reward = np.zeros(behavior.shape)
    if objective.reads_reference_logprobs:
        reference = lora.join(life.reference, lora.split(life.state.params)[1])
        sequences = sequences._replace(reference_logprobs=score(run, reference, sequences).logprobs)
    if run.scores_proximal or objective.has_critic:
        scores = score(run, life.state.params, sequences)
        sequences = sequences._replace(
            proximal_logprobs=scores.logprobs if run.scores_proximal else None, values=scores.values
        )
    if objective.reward_kl.weight > 0:
        token_reward = reward_kl(behavior, sequences.reference_logprobs, sequences.learn, objective.reward_kl)
        metrics["reward_kl"] = float(-token_reward.sum() / max(sequences.learn.sum(), 1) / objective.reward_kl.weight)
    late, shape = objective.reward_kl.to == "advantage", (len(counts), -1)
    weights = [grader.weight for grader in run.cfg.reward.graders]
    found = estimate(
        objective.advantage,
        Outcome(
            reward=experience.reward.reshape(shape),
            parts=experience.parts.reshape(*shape, len(weights)),
            part_weights=np.array(weights),
            counts=counts,
            mask=sampled,
            token_reward=np.zeros(behavior.shape) if late else token_reward,
            late_reward=token_reward if late else None,
            values=sequences.values,
        ),
    )
    sequences = sequences._replace(advantage=found.advantage.astype(np.float32))
    if found.returns is not None:
        sequences = sequences._replace(returns=found.returns.astype(np.float32))
    if objective.loss.kind == "dpo":
        # The pair alone: what is neither best nor worst takes no part.
        sequences = sequences._replace(learn=sequences.learn & (found.advantage != 0))
    return sequences, metrics


def score(run: Run, params: PyTree, sequences: Sequences) -> TokenScores:
    """Of the completions' tokens [B C] under `params`, on the host."""
    batch, where = make_batch(sequences, run.shapes.experience, run.task.pad)
    scores = hosts.gather(run.score_experience(params, run.put_batch(batch)))
    return jax.tree.map(lambda x: of_sequences(x, where, sequences), scores)


def is_old(experience: Experience, counts: Bool[np.ndarray, " P"], version: int) -> bool:
    """Some token to learn from was drawn by an earlier policy."""
    rollouts = experience.rollouts
    learn = rollouts.sampled & np.repeat(counts, len(rollouts.length) // len(counts))[:, None]
    return bool((rollouts.version[learn] < version).any())

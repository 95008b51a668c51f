"""Updates of one RL step: epochs of minibatches over its experience."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding

from jaxrl_llm.distribution.control_tables import ControlTables
from jaxrl_llm.distribution.loss_terms import Loss
from jaxrl_llm.metrics.guards import RatioAlarm
from jaxrl_llm.objective.credit import reward_kl_metrics
from jaxrl_llm.objective.reward_kl import RewardKl
from jaxrl_llm.parallel import hosts
from jaxrl_llm.parallel.compiled_ahead import CompiledAhead
from jaxrl_llm.perf.work import TrainFlops
from jaxrl_llm.roles.state import RunState
from jaxrl_llm.types import Batch, Experience, TrainState
from jaxrl_llm.update.batch import fill_batch, minibatches
from jaxrl_llm.update.config import UpdateConfig
from jaxrl_llm.update.optimizer.state import ZERO_GRADIENT
from jaxrl_llm.update.packing import BatchShape

# Metrics of a whole update; every other is a mean over its tokens or sequences, or an extreme.
OF_UPDATES = ("loss", "grad_norm", "nonfinite", "ess/sequences", "ess/tokens", "lr/ess_scale")


class UpdateMetrics(NamedTuple):
    """Metrics of one update with at least one token in its loss."""

    metrics: dict[str, float]
    tokens: int
    """Tokens in the loss."""
    sequences: int
    """Sequences with such a token."""


class Learned(NamedTuple):
    metrics: dict[str, float]
    """Means over the updates that had a token in the loss; a mean over tokens is absent if none had one."""
    alarm: int
    """Consecutive stale updates whose ratios were all exactly 1."""
    zero_gradient: dict[str, bool]
    """Parameter path -> True if its gradient was exactly 0 in every finite update with a token in the loss. Empty if there was no
    such update."""
    flops: TrainFlops
    """FLOPs of the updates that had a token in the loss."""
    seconds: float
    """Seconds of these updates, with the transfer of batches and metrics."""


@dataclass(frozen=True)
class Updates:
    program: CompiledAhead
    """`update.step.jit_update`."""
    loss: Loss
    cfg: UpdateConfig
    shape: BatchShape
    """Shape of a minibatch."""
    pad: int
    rows: Sharding
    """Sharding of a batch."""
    anchored_on_proximal: bool
    """The ratio is to the policy before these updates, so the first one has ratio 1 on old data too."""
    reads_distribution: bool
    """The loss reads the reference's whole distribution, so the update runs the reference too."""
    reward_kl: RewardKl
    flops: Callable[[Batch], TrainFlops]
    """FLOPs of an update on a batch."""
    tables: ControlTables | None = None
    """On the devices; None: nothing is controlled."""

    def __call__(self, state: RunState, experience: Experience, rng: np.random.Generator) -> tuple[TrainState, Learned]:
        """Epochs x minibatches of updates on the kept rows; `state.train` is donated.

        Every update, also the last, compares with the log-probs captured while sampling, or scored before the first update.
        To the alarm an update is stale if it is not the first, or if some token was sampled by an earlier policy. An update without
        a token in the loss changes nothing and has no metrics.
        """
        program = self.program.ready()
        train, alarm, rings = state.train, RatioAlarm(int(state.guards.alarm)), False
        each: list[UpdateMetrics] = []
        zero, flops, seconds = [], [], 0.0
        old = is_old(experience, int(train.step))
        reference = state.reference if self.reads_distribution else None
        for _ in range(self.cfg.epochs):
            for part in minibatches(experience, self.cfg.minibatches, rng):
                batch = self._batch(part)
                begun = time.monotonic()
                train, found = program(train, hosts.put(batch, self.rows), reference, self.tables)
                found, gradients = without_zero_gradients(as_floats(jax.device_get(found)))
                took = time.monotonic() - begun
                if not batch.loss_mask.any():
                    continue
                seconds += took
                flops.append(self.flops(batch))
                each.append(UpdateMetrics(found, int(batch.loss_mask.sum()), int(part.loss_mask.any(axis=1).sum())))
                if found["nonfinite"] == 0:
                    zero.append(gradients)
                stale = len(each) > 1 or (old and not self.anchored_on_proximal)
                alarm, ring = alarm.observe(found["ratio/min"], found["ratio/max"], stale)
                rings |= ring
        metrics = reward_kl_metrics(self.reward_kl, experience.groups, experience.scores) | over_updates(each, old)
        metrics |= {"alarm/ratio": float(rings), "updates": len(each)}
        never = {path: all(gradients[path] for gradients in zero) for path in zero[0]} if zero else {}
        work = TrainFlops(*np.sum(flops, axis=0)) if flops else TrainFlops(0, 0, 0)
        return train, Learned(metrics, alarm.streak, never, work, seconds)

    def _batch(self, part: Experience) -> Batch:
        loss = self.loss
        return fill_batch(part, self.shape, self.pad, loss.aggregation, loss.length, loss.own)[0]


def over_updates(each: list[UpdateMetrics], old: bool) -> dict[str, float]:
    """Metrics of a step: means over all tokens, sequences or updates, and extremes; {} without an update.

    `mismatch/*` compares the sampler with the trainer at the same parameters, so it is of the first update, on fresh data.
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
    """Split an update's metrics into those to record, and whether each parameter had a gradient of exactly 0."""
    zero = {name: x for name, x in metrics.items() if name.startswith(ZERO_GRADIENT)}
    rest = {name: x for name, x in metrics.items() if name not in zero}
    return rest, {name.removeprefix(ZERO_GRADIENT): x == 1 for name, x in zero.items()}


def as_floats(metrics: dict) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def is_old(experience: Experience, version: int) -> bool:
    """True if some token of a kept row was sampled by an earlier policy, or by another one: rows that a buffer started with
    have the version of the first policy, and tokens of hints that are trained on have none."""
    groups = experience.groups
    old = groups.rollouts.version < version
    if groups.reused is not None:
        old |= groups.reused[:, None]
    if groups.taught is not None:
        old |= groups.taught
    return bool(old[groups.trainable_tokens].any())

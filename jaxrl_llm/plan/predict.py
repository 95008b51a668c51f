"""Predicted times of a step, from arithmetic and published peaks: nothing here was measured.

A program takes max(FLOPs / peak, bytes / memory bandwidth) and, not overlapped with it, what it receives / bandwidth of one axis of
the slice. Kernels are taken to reach the peak, rollouts to run to their full length, batches to be full.
"""

from typing import NamedTuple

import numpy as np

from jaxrl_llm.model import params as model_params
from jaxrl_llm.perf.chips import Chip
from jaxrl_llm.perf.work import (
    Seen,
    TrainFlops,
    Work,
    adapters_of,
    causal_pairs,
    decode_step,
    forward_flops,
    held,
    train_flops,
    weight_bytes,
)
from jaxrl_llm.plan.programs import Job, Program


class Time(NamedTuple):
    """Seconds of one run of a program on one chip."""

    compute: float
    memory: float
    wire: float
    compiler: float = 0.0
    """The compiler's own estimate: its cycles over the clock of the matrix units, collectives mostly left out. 0: it gives none."""

    @property
    def total(self) -> float:
        return max(self.compute, self.memory) + self.wire

    def times(self, n: float) -> "Time":
        return Time(*(n * x for x in self))


class Prediction(NamedTuple):
    """Of one step."""

    rollout: Time
    publish: Time
    update: Time
    """All updates of a step together."""
    rollout_tokens_per_s: float
    """Completion tokens, all chips."""
    mfu: float
    """Of the update: `update_flops` over what the chips could do meanwhile. What is computed again does not count."""

    @property
    def step(self) -> float:
        return self.rollout.total + self.publish.total + self.update.total


def predict(job: Job, chip: Chip, programs: dict[str, Program] | None = None) -> Prediction | None:
    """None where the chip's peaks are not published. Without programs, collectives are estimated as well."""
    if not chip.flops:
        return None
    rollout, publish, update = (f(job, chip, programs) for f in (rollout_time, publish_time, update_time))
    cfg, chips = job.cfg, job.train.mesh.size
    updates = cfg.update.updates
    tokens = cfg.rollout.prompts * cfg.rollout.samples * cfg.rollout.max_new_tokens
    return Prediction(
        rollout, publish, update.times(updates), tokens / rollout.total,
        sum(update_flops(job)) / (update.total * chips * chip.flops),
    )  # fmt: skip


def rollout_time(job: Job, chip: Chip, programs: dict[str, Program] | None) -> Time:
    """All flights of a step one after another: prompts, then so many steps of all rows."""
    cfg, model, layout = job.cfg.rollout, job.model, job.decode
    prompts, units, _ = job.flight
    each, steps = job.engine.sizes.each, cfg.max_new_tokens
    shards = layout.size("rows") * layout.size("heads")
    size = np.dtype(model.compute).itemsize
    full, middle = np.array([job.prompt_slots - 1]), np.array([steps // 2])
    of_unit = decode_step(model, full, middle, each, job.engine.programs.caching.form.number_bytes(model))
    work = Work(units * of_unit.bytes, units * of_unit.flops)
    weights = weight_bytes(job.policy.params, model)
    reading = (
        forward_flops(model, prompts * causal_pairs(model, job.prompt_slots), prompts * job.prompt_slots, 0)
        / shards
        / chip.flops
    )
    decode = Time(work.flops / shards / chip.flops, (weights + work.bytes / shards) / chip.hbm, 0.0)
    if programs is None:
        rows = units * each // layout.size("rows")
        through = 2 * 2 * (1 - 1 / layout.size("heads")) + (2 * (layout.size("expert") - 1) if model.experts else 0)
        wire, cycles = steps * through * model.layers * rows * model.d_model * size / chip.wire, 0.0
    else:
        segments = steps / job.engine.decoding.steps
        wire = (segments * programs["segment"].reading.received + programs["prefill"].reading.received) / chip.wire
        counted = segments * programs["segment"].reading.cycles + programs["prefill"].reading.cycles
        cycles = counted / chip.clock if chip.clock else 0.0
    flights = -(-cfg.prompts // prompts)
    one = Time(steps * decode.compute + reading, steps * decode.memory, wire, cycles)
    return one.times(flights)


def publish_time(job: Job, chip: Chip, programs: dict[str, Program] | None) -> Time:
    """Masters are read, the policy is received, written and, as the TPU compiler does it, copied."""
    policy = held(job.policy.params)
    moved = (held(job.state.params) + 3 * policy) / chip.hbm
    if programs is None:
        return Time(0.0, moved, policy * (1 - 1 / job.train.mesh.shape["fsdp"]) / chip.wire)
    reading = programs["publish"].reading
    return Time(0.0, moved, reading.received / chip.wire, reading.cycles / chip.clock if chip.clock else 0.0)


def update_time(job: Job, chip: Chip, programs: dict[str, Program] | None) -> Time:
    """One update: forward, backward, and what is computed again; masters, moments and gradients pass through memory."""
    again = {"none": 0, "attention": 0}.get(job.cfg.update.remat, 1)
    longest = update_seen(job)
    # The backward pass makes logits again whatever `remat` says: the head keeps none.
    repeated = forward_flops(job.model, again * longest.pairs, again * longest.tokens, longest.scored)
    flops = (sum(update_flops(job)) + repeated) / job.train.mesh.size
    parts = job.cfg.update.micro_batches
    whole = gathered(job)
    masters = held(job.state.params)
    moved = 2 * (masters + held(job.state.opt_state)) + 2 * parts * masters + (2 + again) * parts * whole
    if programs is None:
        wire, cycles = _update_traffic(job, whole) / chip.wire, 0.0
    else:
        reading = programs["update"].reading
        wire, cycles = reading.received / chip.wire, reading.cycles / chip.clock if chip.clock else 0.0
    return Time(flops / chip.flops, moved / chip.hbm, wire, cycles)


def gathered(job: Job) -> int:
    """Bytes of all weights in the compute dtype, as a chip multiplies by them: whole over `fsdp`."""
    specs = model_params.specs(job.model)
    return held(model_params.abstract(specs, job.train.for_decode("replicated"), np.dtype(job.model.compute)))


def _update_traffic(job: Job, whole: int) -> float:
    """Bytes that a chip receives, estimated: weights gathered twice and gradients scattered in f32 every micro-batch, gradients
    added over `data`, activations over `tensor` four times a layer, and tokens to the experts' shards and back three times."""
    mesh, parts, model = job.train.mesh.shape, job.cfg.update.micro_batches, job.model
    size = np.dtype(model.compute).itemsize
    weights = parts * whole * (2 + 4 / size) * (1 - 1 / mesh["fsdp"])
    gradients = 2 * held(job.state.params) * (1 - 1 / mesh["data"])
    rows, slots = job.batch.tokens.shape
    activations = rows * slots // job.train.size("rows") * model.d_model * size
    through = 2 * 4 * (1 - 1 / mesh["tensor"]) + (2 * 3 * (mesh["expert"] - 1) if model.experts else 0)
    return weights + gradients + through * model.layers * activations


def update_seen(job: Job) -> Seen:
    """In one update, every response at its full length; of the loss dpo a pair of each group."""
    cfg, prompt, own = job.cfg, job.prompt_slots, job.cfg.rollout.max_new_tokens
    groups, packing = cfg.rollout.prompts // cfg.update.minibatches, cfg.update.packing
    samples = 2 if cfg.objective.loss.kind == "dpo" else cfg.rollout.samples
    together = 1
    if packing.kind == "shared_prefix":
        together = min(samples, (packing.slots - prompt) // own) if packing.slots else samples
    # A prompt stands once for so many of its responses.
    times = -(-samples // together)
    of_prompt = causal_pairs(job.model, prompt)
    pairs = times * of_prompt + samples * (causal_pairs(job.model, prompt + own) - of_prompt)
    return Seen(groups * pairs, groups * (times * prompt + samples * own), groups * samples * own)


def update_flops(job: Job) -> TrainFlops:
    """Of one update over all chips, counted as training counts them."""
    return train_flops(job.model, *update_seen(job), adapters_of(job.learner_specs, job.model))

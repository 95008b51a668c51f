"""Predicted times of a step, from arithmetic and published peaks; nothing is measured.

A program takes max(FLOPs / peak, bytes / memory bandwidth) plus, not overlapped, bytes received / bandwidth of one axis of the
slice; of GPUs bytes received / bandwidth of NVLink plus bytes from other hosts / bandwidth of the network. Kernels are assumed to
reach the peak, rollouts to have their full length, and batches to be full.
"""

from collections import Counter
from math import prod
from typing import NamedTuple

import numpy as np

from jaxrl_llm.model import params as model_params
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.perf.chips import Chip
from jaxrl_llm.perf.work import (
    TokenCounts,
    TrainFlops,
    Work,
    bytes_per_device,
    causal_pairs,
    count_adapter_params,
    decode_step,
    forward_flops,
    train_flops,
    weight_bytes,
)
from jaxrl_llm.plan.programs import CompiledProgram
from jaxrl_llm.roles.abstract_run import AbstractRun


class PredictedTime(NamedTuple):
    """Seconds per run of a program."""

    compute: float
    memory: float
    wire: float
    compiler: float = 0.0
    """The compiler's own estimate, cycles / clock of the matrix units, mostly without collectives. 0: it gives none."""

    @property
    def total(self) -> float:
        return max(self.compute, self.memory) + self.wire

    def times(self, n: float) -> "PredictedTime":
        return PredictedTime(*(n * x for x in self))


class Prediction(NamedTuple):
    """Predicted times and rates of one step."""

    rollout: PredictedTime
    publish: PredictedTime
    update: PredictedTime
    """All updates of the step together."""
    rollout_tokens_per_s: float
    """Completion tokens per second of all chips together."""
    mfu: float
    """MFU of the update: `update_flops` / peak FLOPs of the chips in that time. Rematerialization does not count."""

    @property
    def step(self) -> float:
        return self.rollout.total + self.publish.total + self.update.total


def predict(run: AbstractRun, chip: Chip, programs: dict[str, CompiledProgram] | None = None) -> Prediction | None:
    """Predict one step; None if the chip's peaks are unknown. Without compiled programs, collectives are estimated too."""
    if not chip.flops:
        return None
    rollout, publish, update = (f(run, chip, programs) for f in (rollout_time, publish_time, update_time))
    cfg, chips = run.cfg, run.train.mesh.size
    updates = cfg.update.updates
    tokens = cfg.rollout.prompts * cfg.rollout.samples * cfg.rollout.max_new_tokens
    return Prediction(
        rollout, publish, update.times(updates), tokens / rollout.total,
        sum(update_flops(run)) / (update.total * chips * chip.flops),
    )  # fmt: skip


def rollout_time(run: AbstractRun, chip: Chip, programs: dict[str, CompiledProgram] | None) -> PredictedTime:
    """Rollouts of a step: batches of concurrent prompts one after another, each a prefill and then `max_new_tokens` steps."""
    cfg, model, layout = run.cfg.rollout, run.model, run.decode
    prompts, groups, _ = run.capacity
    rows_per_group, steps = run.engine.sizes.rows_per_group, cfg.max_new_tokens
    shards = layout.size("rows") * layout.size("heads")
    size = np.dtype(model.compute).itemsize
    full, middle = np.array([run.prompt_slots - 1]), np.array([steps // 2])
    of_group = decode_step(model, full, middle, rows_per_group, run.engine.programs.caching.format.number_bytes(model))
    work = Work(groups * of_group.bytes, groups * of_group.flops)
    weights = weight_bytes(run.policy.params, model)
    prefill = (
        forward_flops(model, prompts * causal_pairs(model, run.prompt_slots), prompts * run.prompt_slots, 0)
        / shards
        / chip.flops
    )
    decode = PredictedTime(work.flops / shards / chip.flops, (weights + work.bytes / shards) / chip.hbm, 0.0)
    if programs is None:
        rows = groups * rows_per_group // layout.size("rows")
        through = 2 * 2 * gather_seconds(layout, "heads", chip)
        through += 2 * layout.size("expert") * gather_seconds(layout, "expert", chip) if model.experts else 0
        wire, cycles = steps * through * model.layers * rows * model.d_model * size, 0.0
    else:
        chunks = steps / run.engine.decoding.steps
        wire = chunks * programs["decode_chunk"].cost.wire_seconds(chip) + programs["prefill"].cost.wire_seconds(chip)
        counted = chunks * programs["decode_chunk"].cost.cycles + programs["prefill"].cost.cycles
        cycles = counted / chip.clock if chip.clock else 0.0
    one = PredictedTime(steps * decode.compute + prefill, steps * decode.memory, wire, cycles)
    return one.times(-(-cfg.prompts // prompts))


def publish_time(run: AbstractRun, chip: Chip, programs: dict[str, CompiledProgram] | None) -> PredictedTime:
    """Publishing the policy: masters are read; the policy is received, written and (by the TPU compiler) copied."""
    policy = bytes_per_device(run.policy.params)
    moved = (bytes_per_device(run.state.params) + 3 * policy) / chip.hbm
    if programs is None:
        return PredictedTime(0.0, moved, policy * gather_seconds(run.train, "embed", chip))
    cost = programs["publish"].cost
    return PredictedTime(0.0, moved, cost.wire_seconds(chip), cost.cycles / chip.clock if chip.clock else 0.0)


def update_time(run: AbstractRun, chip: Chip, programs: dict[str, CompiledProgram] | None) -> PredictedTime:
    """One update: forward, backward and rematerialization; masters, moments and gradients are read and written."""
    again = {"none": 0, "attention": 0}.get(run.cfg.update.remat, 1)
    longest = update_seen(run)
    # The backward pass recomputes the logits whatever `remat` is: the head keeps none.
    repeated = forward_flops(run.model, again * longest.pairs, again * longest.tokens, longest.scored)
    flops = (sum(update_flops(run)) + repeated) / run.train.mesh.size
    parts = run.cfg.update.micro_batches
    whole = gathered(run)
    masters = bytes_per_device(run.state.params)
    moved = 2 * (masters + bytes_per_device(run.state.opt_state)) + 2 * parts * masters + (2 + again) * parts * whole
    if programs is None:
        wire, cycles = _update_traffic_seconds(run, whole, chip), 0.0
    else:
        cost = programs["update"].cost
        wire, cycles = cost.wire_seconds(chip), cost.cycles / chip.clock if chip.clock else 0.0
    return PredictedTime(flops / chip.flops, moved / chip.hbm, wire, cycles)


def gathered(run: AbstractRun) -> int:
    """Bytes per chip of all weights in the compute dtype, gathered over `fsdp`."""
    specs = model_params.specs(run.model)
    return bytes_per_device(
        model_params.abstract(specs, run.train.for_decode("replicated"), np.dtype(run.model.compute))
    )


def gather_seconds(layout: Layout, axis: str, chip: Chip) -> float:
    """Seconds per byte of what each device has after an all-gather over the mesh axes of a logical axis.

    An all-reduce takes twice as long.

    Args:
        layout: of the program.
        axis: a logical axis, or the mesh axis `data`.
        chip: its rates.
    """
    names = "data" if axis == "data" else layout.rules[axis] or ()
    names = (names,) if isinstance(names, str) else names
    places = [layout.mesh.axis_names.index(name) for name in names]
    line = np.moveaxis(layout.mesh.devices, places, range(len(places)))
    line = line.reshape(prod(layout.mesh.shape[name] for name in names), -1)[:, 0]
    on_hosts = Counter(device.process_index for device in line)
    n, fewest = len(line), min(on_hosts.values())
    return (1 - 1 / n) / chip.wire + ((n - fewest) / n / fewest / chip.network if chip.network else 0.0)


def _update_traffic_seconds(run: AbstractRun, whole: int, chip: Chip) -> float:
    """Estimated seconds of the collectives: per micro-batch weights are gathered twice and gradients scattered in f32; gradients
    are summed over `data`, activations over `tensor` four times per layer, and tokens exchanged with the experts three times."""
    parts, model = run.cfg.update.micro_batches, run.model
    size = np.dtype(model.compute).itemsize
    over = lambda axis: gather_seconds(run.train, axis, chip)  # noqa: E731
    weights = parts * whole * (2 + 4 / size) * over("embed")
    gradients = 2 * bytes_per_device(run.state.params) * over("data")
    rows, slots = run.batch.tokens.shape
    activations = rows * slots // run.train.size("rows") * model.d_model * size
    through = 2 * 4 * over("heads")
    through += 2 * 3 * run.train.mesh.shape["expert"] * over("expert") if model.experts else 0
    return weights + gradients + through * model.layers * activations


def update_seen(run: AbstractRun) -> TokenCounts:
    """Attention pairs and tokens of one update with responses of full length; with the loss dpo, one pair per group."""
    cfg, prompt, own = run.cfg, run.prompt_slots, run.cfg.rollout.max_new_tokens
    groups, packing = cfg.rollout.prompts // cfg.update.minibatches, cfg.update.packing
    samples = 2 if cfg.objective.loss.kind == "dpo" else cfg.rollout.samples
    together = 1
    if packing.kind == "shared_prefix":
        together = min(samples, (packing.slots - prompt) // own) if packing.slots else samples
    # A prompt is repeated for every `together` of its responses.
    times = -(-samples // together)
    of_prompt = causal_pairs(run.model, prompt)
    pairs = times * of_prompt + samples * (causal_pairs(run.model, prompt + own) - of_prompt)
    return TokenCounts(groups * pairs, groups * (times * prompt + samples * own), groups * samples * own)


def update_flops(run: AbstractRun) -> TrainFlops:
    """FLOPs of one update on all chips together, counted as in training."""
    return train_flops(run.model, *update_seen(run), count_adapter_params(run.learner_specs, run.model))

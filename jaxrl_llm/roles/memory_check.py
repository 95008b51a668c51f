"""Device and host memory that a run needs at least, from shapes and shardings, before anything compiles.

Counted are the exact parts (parameters, optimizer state, KV caches, batches) and what no compiler can avoid: gradients, and the
inputs of the layers for the backward pass. So a run that is refused here cannot work; one that passes may still be too large, as
`jaxrl plan` finds out.
"""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.errors import UserError
from jaxrl_llm.experience.config import OwnReplay, ReplayConfig
from jaxrl_llm.model import lora
from jaxrl_llm.model import params as model_params
from jaxrl_llm.perf import chips
from jaxrl_llm.perf.work import bytes_per_device
from jaxrl_llm.roles.abstract_run import AbstractRun, make_abstract_run
from jaxrl_llm.roles.blueprint import Blueprint, fresh_sizes, group_sizes, make_blueprint, uses_of
from jaxrl_llm.types import COLUMNS

MASTERS, OPTIMIZER, REFERENCE, POLICY = "master parameters", "optimizer state", "reference parameters", "policy"
PROMPTS, ROWS, BATCH, GRADIENTS = "KV cache of prompts", "KV cache of rows", "batch", "gradients"
LAYER_INPUTS, ROLLOUTS, REPLAY = (
    "inputs of layers, kept for the backward pass",
    "rollouts in the host's memory",
    "replay",
)
MODEL_PARTS = (MASTERS, OPTIMIZER, REFERENCE, POLICY, GRADIENTS)
HOST, WARM_START, MIB = "host", "warm start", 2**20
# Bytes per token of the columns that every run has.
ROLLOUT_BYTES = sum(np.dtype(column.dtype).itemsize for column in COLUMNS if column.rollouts and not column.when)
BATCH_BYTES = sum(np.dtype(column.dtype).itemsize for column in COLUMNS if column.batch and not column.when)


class Phase(NamedTuple):
    """Bytes per chip while one program runs, by part, arrays that it does not use included."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


class ResidentBytes(NamedTuple):
    """Bytes per chip of the arrays that exist while a program runs, by part."""

    program: dict[str, int]
    """Arguments and results of the program."""
    other: dict[str, int]
    """Arrays that the program does not use."""


class AvailableMemory:
    """Bytes of each device and of the host; None if unknown. CPU devices share the host's memory."""

    def __init__(self, device: jax.Device, num_devices: int):
        self.shared = device.platform == "cpu"
        self.host, self.num_devices = chips.host_memory(), num_devices
        stats = None if self.shared else device.memory_stats()
        self.device = self.host / num_devices if self.shared else (stats or {}).get("bytes_limit")

    def exceeded_by(self, phase: Phase) -> bool:
        limit = self.limit(phase)
        return limit is not None and phase.total > limit

    def limit(self, phase: Phase) -> float | None:
        return self.host if phase.name == HOST else self.device


def check(blueprint: Blueprint, held_out: int, trains: bool = True) -> None:
    """Raise UserError if a phase of the run needs more memory than there is, or the replay's buffer more than it is given.

    Args:
        blueprint: The run.
        held_out: Number of prompts in an evaluation, which samples all of them at once.
        trains: False if the run only samples.
    """
    if trains and (problem := buffer_problem(blueprint.cfg, blueprint.vocab.size)):
        raise UserError(problem)
    run = make_abstract_run(blueprint)
    available = AvailableMemory(jax.local_devices()[0], jax.local_device_count())
    found = minimum(run, held_out, trains, available.num_devices if available.shared else 0)
    too_large = [phase for phase in found if available.exceeded_by(phase)]
    if too_large:
        worst = max(too_large, key=lambda phase: phase.total / available.limit(phase))
        raise UserError(_message(run, held_out, worst, available))


def minimum(run: AbstractRun, held_out: int, trains: bool, num_sharing: int) -> list[Phase]:
    """Return the memory that each phase needs at least.

    Args:
        run: The run.
        held_out: Number of prompts in an evaluation, which samples all of them at once.
        trains: False if the run only samples.
        num_sharing: Number of devices that share the host's memory, 0 for accelerators.
    """
    found = [Phase(HOST, host_parts(run.cfg, held_out))]
    share = {name: size // num_sharing for name, size in found[0].parts.items()} if num_sharing else {}
    for name, (program, other) in resident_bytes(run).items():
        parts = program | other | share
        if not trains:
            parts = {part: size for part, size in parts.items() if part in (POLICY, PROMPTS, ROWS, ROLLOUTS)}
        if name == "update":
            rows, slots = run.batch.tokens.shape
            inputs = layer_inputs(run, rows // run.cfg.update.micro_batches * slots)
            parts |= {GRADIENTS: gradients(run), LAYER_INPUTS: inputs}
        if trains or name in ("prefill", "decode_chunk", "extend_suffix"):
            found.append(Phase(name, parts))
    if trains and run.cfg.warm_start.steps:
        shape = run.shapes.supervised
        tokens = shape.rows * shape.slots
        batch = tokens // run.train.size("rows") * BATCH_BYTES
        found.append(Phase(WARM_START, {BATCH: batch, LAYER_INPUTS: layer_inputs(run, tokens)}))
    return found


def resident_bytes(run: AbstractRun) -> dict[str, ResidentBytes]:
    """Exact bytes per chip of the arrays that exist while each program runs, by program."""
    state, policy = _state(run), bytes_per_device(run.policy.params)
    _, groups, window = run.capacity
    caches = run.engine.programs.caches
    prompts, rows = (bytes_per_device(cache) for cache in caches(groups, window))
    read = bytes_per_device(caches(run.capacity[0], window)[0])
    decoding = {PROMPTS: prompts, ROWS: rows} if run.queues_prompts else {}
    without_masters = {name: size for name, size in state.items() if name != MASTERS}
    found = {
        "prefill": ResidentBytes({POLICY: policy, PROMPTS: read}, state | decoding),
        "decode_chunk": ResidentBytes({POLICY: policy, PROMPTS: prompts, ROWS: rows}, state),
        "publish": ResidentBytes({POLICY: policy, MASTERS: state[MASTERS]}, without_masters),
        "update": resident_bytes_of_update(run),
    }
    windows = run.engine.sizes.windows
    if len(windows) > 1:
        before = bytes_per_device(caches(groups, windows[-2])[1])
        found["extend_suffix"] = ResidentBytes({ROWS: before + rows}, state | {POLICY: policy, PROMPTS: prompts})
    return found


def resident_bytes_of_update(run: AbstractRun) -> ResidentBytes:
    """The entry `update` of `resident_bytes`, the only one that depends on the number of micro-batches."""
    state, policy = _state(run), bytes_per_device(run.policy.params)
    reference = {REFERENCE: state.pop(REFERENCE)}
    if run.cfg.objective.reads_reference_distribution:
        return ResidentBytes(state | reference | {BATCH: bytes_per_device(run.batch)}, {POLICY: policy})
    return ResidentBytes(state | {BATCH: bytes_per_device(run.batch)}, {POLICY: policy} | reference)


def _state(run: AbstractRun) -> dict[str, int]:
    reference = bytes_per_device(run.reference) if run.reference is not None else 0
    return {
        MASTERS: bytes_per_device(run.state.params),
        OPTIMIZER: bytes_per_device(run.state.opt_state),
        REFERENCE: reference,
    }


def gradients(run: AbstractRun) -> int:
    """Bytes per chip of the f32 gradient accumulators of the trained parameters."""
    return bytes_per_device(lora.split(run.state.params)[0])


def layer_inputs(run: AbstractRun, tokens: int) -> int:
    """Bytes per chip of the layer inputs kept for the backward pass over `tokens` tokens of all chips together."""
    if run.cfg.update.remat == "offload":
        return 0
    inputs = run.model.layers * run.model.d_model * np.dtype(run.model.compute).itemsize
    return tokens // run.train.size("rows") * inputs


def buffer_problem(cfg: RunConfig, num_tokens: int) -> str:
    """Error if the replay's buffer may not hold what one step draws from it; "" if it does.

    Args:
        cfg: of the run.
        num_tokens: size of the vocabulary.
    """
    replay, rollout = cfg.experience.replay, cfg.rollout
    if not isinstance(replay, ReplayConfig) or not replay.capacity:
        return ""
    uses = uses_of(cfg)
    there = [c for c in COLUMNS if c.rollouts and not c.dims and (not c.when or c.when in uses)]
    of_token = (
        sum(np.dtype(c.dtype).itemsize for c in there) + 4 * ("steps" in uses) + 4 * rollout.max_kept_of(num_tokens)
    )
    rows = min(replay.capacity * fresh_sizes(cfg).most, group_sizes(cfg).rows)
    least = np.ceil(1000 * rows * rollout.max_new_tokens * of_token / MIB) / 1000
    if replay.memory_mib >= least:
        return ""
    return (
        f"experience.replay.memory_mib: got {replay.memory_mib:g}, want {least:,.3f} or more: a step may draw {rows:,} responses "
        f"of {rollout.max_new_tokens:,} tokens (rollout.max_new_tokens)"
    )


def host_parts(cfg: RunConfig, held_out: int) -> dict[str, int]:
    """Bytes of host memory, by part."""
    rollout = cfg.rollout
    group = rollout.samples * rollout.max_new_tokens * ROLLOUT_BYTES
    return {
        ROLLOUTS: max(rollout.prompts, held_out) * group,
        REPLAY: _most_of_buffer(cfg.experience.replay, group),
    }


def _most_of_buffer(replay: ReplayConfig | OwnReplay, group: int) -> int:
    """Bytes that the buffer takes at most, if nothing but the columns that every run has is stored; 0 for a custom one.
    `group`: bytes of a group at its longest."""
    return min(replay.capacity * group, int(replay.memory_mib * MIB)) if isinstance(replay, ReplayConfig) else 0


def _message(run: AbstractRun, held_out: int, phase: Phase, available: AvailableMemory) -> str:
    part, size = max(phase.parts.items(), key=lambda item: item[1])
    where = "the host" if phase.name == HOST else "each device"
    need = f"{phase.name} needs at least {_gb(phase.total)} on {where}, {_gb(size)} of it {part}"
    advice = _advice(run, held_out, phase, part, available)
    return f"{advice}: {need}; there are {_gb(available.limit(phase))}"


def _advice(run: AbstractRun, held_out: int, phase: Phase, part: str, available: AvailableMemory) -> str:
    """The setting to change, with its value and what is wanted."""
    cfg, rollout = run.cfg, run.cfg.rollout
    if sum(phase.parts.get(name, 0) for name in MODEL_PARTS) > available.limit(phase):
        count, adapters = (model_params.count(specs) for specs in (run.specs, run.learner_specs))
        if adapters > 2 * count and cfg.lora.rank:
            return f"lora.rank: got {cfg.lora.rank:,}, want less"
        more = "adapters (lora.rank), or more devices to split them over (mesh.fsdp, mesh.tensor)"
        return f"model: got {count:,} parameters, want fewer, {more}"
    rows = f"{rollout.prompts * rollout.samples:,} rows (rollout.prompts x rollout.samples)"
    if phase.name == WARM_START:
        return f"warm_start.rows: got {cfg.warm_start.rows:,}, want fewer"
    if part == REPLAY:
        replay = cfg.experience.replay
        return (
            f"experience.replay: got capacity {replay.capacity:,}, memory_mib {replay.memory_mib:g}, want less of one"
        )
    if part == LAYER_INPUTS:
        return f"update.micro_batches: got {cfg.update.micro_batches:,}, want more: fewer rows at a time"
    if part in (ROWS, BATCH, ROLLOUTS):
        most = _largest_max_new_tokens(run, held_out, phase.name, available)
        if most:
            return f"rollout.max_new_tokens: got {rollout.max_new_tokens:,} with {rows}, want {most:,} at most, or fewer rows"
    return f"rollout.prompts, rollout.samples: got {rows}, want fewer"


def _largest_max_new_tokens(run: AbstractRun, held_out: int, name: str, available: AvailableMemory) -> int:
    """The largest `rollout.max_new_tokens` with which the phase `name` fits, within 1 in 64; 0 if there is none."""
    devices, least, most = list(run.train.mesh.devices.flat), 0, run.cfg.rollout.max_new_tokens
    num_sharing = available.num_devices if available.shared else 0
    while most - least > max(least // 64, 1):
        middle = (least + most) // 2
        cfg = dataclasses.replace(run.cfg, rollout=dataclasses.replace(run.cfg.rollout, max_new_tokens=middle))
        shorter = make_abstract_run(make_blueprint(cfg, run.model, run.vocab, run.prompt_slots, devices))
        phases = minimum(shorter, held_out, True, num_sharing)
        fits = not any(available.exceeded_by(phase) for phase in phases if phase.name == name)
        least, most = (middle, most) if fits else (least, middle)
    return least


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"

"""Whether a run can fit its machine at all: the least that is held at a time, from shapes, before anything compiles.

Exact parts alone (`memory.residents`), and what no compiler can do without: gradients, and each layer's input for the backward
pass. So what is refused here cannot run; what is not may still turn out too large, which `jaxrl plan` tells.
"""

import dataclasses

import jax
import numpy as np

from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.errors import UserError
from jaxrl_llm.model import params as model_params
from jaxrl_llm.perf import chips
from jaxrl_llm.plan import memory
from jaxrl_llm.plan.memory import BATCH, GRADIENTS, MASTERS, OPTIMIZER, POLICY, PROMPTS, REFERENCE, ROWS, Phase
from jaxrl_llm.plan.programs import Job, describe
from jaxrl_llm.roles.blueprint import Blueprint, make_blueprint
from jaxrl_llm.types import COLUMNS

KEPT, ROLLOUTS, REPLAY = "inputs of layers, kept for the backward pass", "rollouts in the host's memory", "replay"
# Bytes per token, of the columns that are always there.
OF_ROLLOUTS = sum(np.dtype(column.dtype).itemsize for column in COLUMNS if column.rollouts and not column.when)
OF_BATCHES = sum(np.dtype(column.dtype).itemsize for column in COLUMNS if column.batch and not column.when)
HOST, WARM_START = "host", "warm start"
OF_MODEL = (MASTERS, OPTIMIZER, REFERENCE, POLICY, GRADIENTS)


class Room:
    """What there is: bytes of a device and of the host, None where nobody says. Those of a CPU share the host's."""

    def __init__(self, device: jax.Device, num: int):
        self.shared = device.platform == "cpu"
        self.host, self.num = chips.host_memory(), num
        stats = None if self.shared else device.memory_stats()
        self.device = self.host / num if self.shared else (stats or {}).get("bytes_limit")

    def lacks(self, phase: Phase) -> bool:
        limit = self.limit(phase)
        return limit is not None and phase.total > limit

    def limit(self, phase: Phase) -> float | None:
        return self.host if phase.name == HOST else self.device


def check(blueprint: Blueprint, held_out: int, trains: bool = True) -> None:
    """Raises UserError where a phase of the run needs more than there is.

    Args:
        held_out: prompts of an evaluation, which draws all of them at once.
        trains: False: it only samples.
    """
    job = describe(blueprint)
    room = Room(jax.local_devices()[0], jax.local_device_count())
    if lacking := _lacking(job, held_out, trains, room):
        raise UserError(_words(job, held_out, lacking, room))


def _lacking(job: Job, held_out: int, trains: bool, room: Room) -> Phase | None:
    """The phase that is furthest from fitting, None where all fit."""
    lacking = [phase for phase in needs(job, held_out, trains, room.num if room.shared else 0) if room.lacks(phase)]
    return max(lacking, key=lambda phase: phase.total / room.limit(phase), default=None)


def needs(job: Job, held_out: int, trains: bool, sharing: int) -> list[Phase]:
    """What each phase holds at the least. `held_out`: prompts of an evaluation, which draws all of them at once. `sharing`: devices
    whose memory is the host's."""
    found = [Phase(HOST, host_parts(job.cfg, held_out))]
    share = {name: size // sharing for name, size in found[0].parts.items()} if sharing else {}
    for name, (inside, beside) in memory.residents(job).items():
        parts = inside | beside | share
        if not trains:
            parts = {part: size for part, size in parts.items() if part in (POLICY, PROMPTS, ROWS, ROLLOUTS)}
        if name == "update":
            rows, slots = job.batch.tokens.shape
            parts |= {GRADIENTS: memory.gradients(job), KEPT: kept(job, rows // job.cfg.update.micro_batches * slots)}
        if trains or name in ("prefill", "segment", "grow"):
            found.append(Phase(name, parts))
    if trains and job.cfg.warm_start.steps:
        shape = job.shapes.supervised
        tokens = shape.rows * shape.slots
        found.append(Phase(WARM_START, {BATCH: tokens // job.train.size("rows") * OF_BATCHES, KEPT: kept(job, tokens)}))
    return found


def host_parts(cfg: RunConfig, held_out: int) -> dict[str, int]:
    rollout = cfg.rollout
    group = rollout.samples * rollout.max_new_tokens * OF_ROLLOUTS
    return {
        ROLLOUTS: max(rollout.prompts, held_out) * group,
        REPLAY: getattr(cfg.experience.replay, "capacity", 0) * group,
    }


def kept(job: Job, tokens: int) -> int:
    """Bytes of a device, of a forward pass over so many tokens of all devices."""
    if job.cfg.update.remat == "offload":
        return 0
    inputs = job.model.layers * job.model.d_model * np.dtype(job.model.compute).itemsize
    return tokens // job.train.size("rows") * inputs


def _words(job: Job, held_out: int, phase: Phase, room: Room) -> str:
    part, size = max(phase.parts.items(), key=lambda item: item[1])
    where = "the host" if phase.name == HOST else "each device"
    why = f"{phase.name} needs at least {_gb(phase.total)} on {where}, {_gb(size)} of it {part}; there are {_gb(room.limit(phase))}"
    return f"{_setting(job, held_out, phase, part, room)}: {why}"


def _setting(job: Job, held_out: int, phase: Phase, part: str, room: Room) -> str:
    """What to change."""
    cfg, rollout = job.cfg, job.cfg.rollout
    if sum(phase.parts.get(name, 0) for name in OF_MODEL) > room.limit(phase):
        count, adapters = (model_params.count(specs) for specs in (job.specs, job.learner_specs))
        if adapters > 2 * count and cfg.lora.rank:
            return f"lora.rank: got {cfg.lora.rank:,}, want less"
        more = "adapters (lora.rank), or more devices to split them over (mesh.fsdp, mesh.tensor)"
        return f"model: got {count:,} parameters, want fewer, {more}"
    rows = f"{rollout.prompts * rollout.samples:,} rows (rollout.prompts x rollout.samples)"
    if phase.name == WARM_START:
        return f"warm_start.rows: got {cfg.warm_start.rows:,}, want fewer"
    if part == REPLAY:
        return f"experience.replay.capacity: got {cfg.experience.replay.capacity:,}, want less"
    if part == KEPT:
        return f"update.micro_batches: got {cfg.update.micro_batches:,}, want more: fewer rows at a time"
    if part in (ROWS, BATCH, ROLLOUTS):
        most = _longest(job, held_out, phase.name, room)
        if most:
            return f"rollout.max_new_tokens: got {rollout.max_new_tokens:,} with {rows}, want {most:,} at most, or fewer rows"
    return f"rollout.prompts, rollout.samples: got {rows}, want fewer"


def _longest(job: Job, held_out: int, name: str, room: Room) -> int:
    """The largest `rollout.max_new_tokens` with which the phase `name` fits; 0: none."""
    devices, least, most = list(job.train.mesh.devices.flat), 0, job.cfg.rollout.max_new_tokens
    while most - least > max(least // 64, 1):
        middle = (least + most) // 2
        cfg = dataclasses.replace(job.cfg, rollout=dataclasses.replace(job.cfg.rollout, max_new_tokens=middle))
        shorter = describe(make_blueprint(cfg, job.model, job.vocab, job.prompt_slots, devices))
        sharing = room.num if room.shared else 0
        fits = not any(room.lacks(p) for p in needs(shorter, held_out, True, sharing) if p.name == name)
        least, most = (middle, most) if fits else (least, middle)
    return least


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"

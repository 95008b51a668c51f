"""What to change in a config so that it fits: each change as it is typed, with what it is estimated to need."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxrl_llm.config import run_config
from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.plan import memory
from jaxrl_llm.plan.memory import TEMPORARIES, Phase
from jaxrl_llm.plan.programs import Job, make_job, problems

Overrides = dict[str, Any]
# Changes together at most, and how much one must save to be worth a word.
MOST, LEAST = 5, 0.02


class Advice(NamedTuple):
    overrides: Overrides
    bytes: int
    """Of the fullest phase, estimated: what was found, less the estimated saving."""

    @property
    def flags(self) -> str:
        return " ".join(f"--{name} {value}" for name, value in self.overrides.items())


def changed(cfg: RunConfig, overrides: Overrides) -> RunConfig:
    """The config with values at their paths. Raises UserError where one cannot be."""
    values = run_config.to_dict(cfg)
    for name, value in overrides.items():
        *path, last = name.split(".")
        section = values
        for part in path:
            section = section[part]
        section[last] = value
    return run_config.validate(values, "plan")


def changes(job: Job) -> list[Overrides]:
    """Single steps that may save memory, each possible or not."""
    cfg, mesh = job.cfg, job.train.mesh.shape
    engine, parts = cfg.rollout.engine, cfg.update.micro_batches
    axes = {f"mesh.{name}": mesh[name] for name in ("data", "fsdp", "tensor", "expert")}
    found: list[Overrides] = [{"update.micro_batches": parts * 2**i} for i in range(1, 9)]
    found.append({"update.minibatches": cfg.update.minibatches * 2})
    if cfg.update.remat in ("none", "attention"):
        found.append({"update.remat": "layer"})
    moves = [("data", "fsdp"), ("data", "tensor"), ("fsdp", "tensor")]
    moves += [("data", "expert"), ("fsdp", "expert")] if job.model.experts else []
    for one, other in moves:
        if mesh[one] % 2 == 0:
            found.append(axes | {f"mesh.{one}": mesh[one] // 2, f"mesh.{other}": mesh[other] * 2})
    shards = job.decode.size("rows")
    flight = job.flight[0]
    if flight // 2 >= shards:
        found.append({"rollout.engine.in_flight": flight // 2})
    if engine.layout == "replicated" and mesh["fsdp"] > 1:
        found.append({"rollout.engine.layout": "wide"})
    found += [{"rollout.engine.cache": "int8"}] * (engine.cache == "compute")
    return found + [{"rollout.engine.weights": "int8"}] * (engine.weights == "compute")


def advise(job: Job, found: list[Phase], limit: float) -> list[Advice]:
    """What would help: single changes that fit on their own, the one that needs least first; else changes together, each the best
    after those before it, whether or not they suffice in the end."""
    real = {phase.name: phase.parts for phase in found}
    before = {phase.name: phase.parts for phase in memory.estimated(job)}
    now, overrides = memory.peak(found).total, {}
    for turn in range(MOST):
        tried = []
        for change, new in _possible(job):
            after = {phase.name: phase.parts for phase in memory.estimated(new)}
            total = max(_moved(real[name], before[name], after.get(name, before[name])) for name in real)
            tried.append((total, len(tried), change, new))
        tried = sorted(t for t in tried if t[0] < (1 - LEAST) * now)
        alone = [Advice(change, total) for total, _, change, _ in tried if total <= limit]
        if turn == 0 and alone:
            return _mildest(alone)
        if not tried:
            break
        now, _, change, job = tried[0]
        overrides = overrides | change
        if now <= limit:
            break
    return [Advice(overrides, now)] if overrides else []


def _possible(job: Job) -> Iterator[tuple[Overrides, Job]]:
    devices = list(job.train.mesh.devices.flat)
    for change in changes(job):
        cfg = changed(job.cfg, change)
        if not problems(cfg, job.model, job.prompt_slots, devices):
            yield change, make_job(cfg, job.model, job.prompt_slots, devices)


def _moved(real: dict[str, int], before: dict[str, int], after: dict[str, int]) -> int:
    """What was found, moved as the estimate moves: parts by their difference, temporaries by their ratio."""
    parts = sum(real[part] + after[part] - before[part] for part in real if part != TEMPORARIES)
    return parts + round(real[TEMPORARIES] * after[TEMPORARIES] / max(before[TEMPORARIES], 1))


def _mildest(found: list[Advice]) -> list[Advice]:
    """Of several numbers of micro-batches the smallest."""
    parts = [a for a in found if "update.micro_batches" in a.overrides]
    return [a for a in found if a not in parts] + parts[-1:]

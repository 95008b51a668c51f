"""Suggested config changes that make a run fit, each with its estimated memory."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxrl_llm.config import loading, run_config
from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.plan import memory
from jaxrl_llm.plan.memory import TEMPORARIES
from jaxrl_llm.plan.programs import make_checked_run, problems
from jaxrl_llm.roles.abstract_run import AbstractRun
from jaxrl_llm.roles.memory_check import Phase

Overrides = dict[str, Any]
# Maximum number of combined changes, and the fraction of memory that each must save.
MAX_CHANGES, MIN_SAVING = 5, 0.02


class Advice(NamedTuple):
    overrides: Overrides
    bytes: int
    """Estimated bytes per chip of the largest phase after the change."""

    @property
    def flags(self) -> str:
        return " ".join(f"--{name} {value}" for name, value in self.overrides.items())


def changed(cfg: RunConfig, overrides: Overrides) -> RunConfig:
    """Return the config with overridden values, by dotted path. Raises UserError for an invalid value."""
    values = run_config.to_dict(cfg)
    for name, value in overrides.items():
        *path, last = name.split(".")
        section = values
        for part in path:
            section = section[part]
        section[last] = value
    return loading.validate(values, "plan")


def possible_changes(run: AbstractRun) -> list[Overrides]:
    """Single changes that may save memory; not all are valid for the config."""
    cfg, mesh = run.cfg, run.train.mesh.shape
    engine, micro_batches = cfg.rollout.engine, cfg.update.micro_batches
    axes = {f"mesh.{name}": mesh[name] for name in ("data", "fsdp", "tensor", "expert")}
    found: list[Overrides] = [{"update.micro_batches": micro_batches * 2**i} for i in range(1, 9)]
    found.append({"update.minibatches": cfg.update.minibatches * 2})
    if cfg.update.remat in ("none", "attention"):
        found.append({"update.remat": "layer"})
    moves = [("data", "fsdp"), ("data", "tensor"), ("fsdp", "tensor")]
    moves += [("data", "expert"), ("fsdp", "expert")] if run.model.experts else []
    for one, other in moves:
        if mesh[one] % 2 == 0:
            found.append(axes | {f"mesh.{one}": mesh[one] // 2, f"mesh.{other}": mesh[other] * 2})
    shards = run.decode.size("rows")
    concurrent = run.capacity[0]
    if concurrent // 2 >= shards:
        found.append({"rollout.engine.max_concurrent_prompts": concurrent // 2})
    if engine.layout == "replicated" and mesh["fsdp"] > 1:
        found.append({"rollout.engine.layout": "wide"})
    found += [{"rollout.engine.cache": "int8"}] * (engine.cache == "compute")
    return found + [{"rollout.engine.weights": "int8"}] * (engine.weights == "compute")


def advise(run: AbstractRun, found: list[Phase], limit: float) -> list[Advice]:
    """Suggest changes that save memory.

    Args:
        run: The run.
        found: Memory of its phases.
        limit: Bytes of one chip.

    Returns:
        Single changes that suffice, least memory first; else one greedy combination, which may not suffice.
    """
    real = {phase.name: phase.parts for phase in found}
    before = {phase.name: phase.parts for phase in memory.estimated(run)}
    now, overrides = memory.peak(found).total, {}
    for i in range(MAX_CHANGES):
        tried = []
        for change, new in _valid_changes(run):
            after = {phase.name: phase.parts for phase in memory.estimated(new)}
            total = max(_moved(real[name], before[name], after.get(name, before[name])) for name in real)
            tried.append((total, len(tried), change, new))
        tried = sorted(t for t in tried if t[0] < (1 - MIN_SAVING) * now)
        alone = [Advice(change, total) for total, _, change, _ in tried if total <= limit]
        if i == 0 and alone:
            return _fewest_micro_batches(alone)
        if not tried:
            break
        now, _, change, run = tried[0]
        overrides = overrides | change
        if now <= limit:
            break
    return [Advice(overrides, now)] if overrides else []


def _valid_changes(run: AbstractRun) -> Iterator[tuple[Overrides, AbstractRun]]:
    """Changes that are valid for the config, each with the changed run."""
    devices = list(run.train.mesh.devices.flat)
    for change in possible_changes(run):
        cfg = changed(run.cfg, change)
        if not problems(cfg, run.model, run.prompt_slots, devices):
            yield change, make_checked_run(cfg, run.model, run.prompt_slots, devices)


def _moved(real: dict[str, int], before: dict[str, int], after: dict[str, int]) -> int:
    """Bytes after a change: found parts plus the difference of the estimates, temporaries times their ratio."""
    parts = sum(real[part] + after[part] - before[part] for part in real if part != TEMPORARIES)
    return parts + round(real[TEMPORARIES] * after[TEMPORARIES] / max(before[TEMPORARIES], 1))


def _fewest_micro_batches(found: list[Advice]) -> list[Advice]:
    """Keep only the smallest of several numbers of micro-batches."""
    micro_batches = [a for a in found if "update.micro_batches" in a.overrides]
    return [a for a in found if a not in micro_batches] + micro_batches[-1:]

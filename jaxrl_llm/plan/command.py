"""`jaxrl plan`: a report on a config and a topology, as one JSON object; `show` prints it.

Importing this does not import jax: the compilers' environment variables must be set before.
"""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxrl_llm.config.mixtures import parts_of
from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.errors import UserError
from jaxrl_llm.perf import chips
from jaxrl_llm.perf.chips import Chip
from jaxrl_llm.plan import compilers
from jaxrl_llm.tasks.config import ArithmeticTask, CharacterTokenizer, SingleTask, TokenizerConfig

if TYPE_CHECKING:
    import jax

    from jaxrl_llm.plan.predict import Prediction
    from jaxrl_llm.plan.programs import CompiledProgram
    from jaxrl_llm.roles.abstract_run import AbstractRun
    from jaxrl_llm.roles.memory_check import Phase

Report = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """The devices and the longest prompt to plan for."""

    topology: str | None = None
    """TPU slice or GPUs, e.g. v5e:4x4 or h100:8x2; None: the devices of this machine."""
    chips: int | None = None
    """Number of chips to use; None: all."""
    prompt_tokens: int = 0
    """Tokens of the longest prompt; 0: `task.max_prompt_tokens`."""


def prepare(target: Target) -> None:
    """Set environment variables, before jax is imported. With a topology no local accelerator is used."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if target.topology is None:
        return
    compilers.prepare(chips.parse_topology(target.topology))


def prompt_slots(cfg: RunConfig, target: Target) -> int:
    """Tokens of the longest prompt. Raises UserError if no setting gives it."""
    if target.prompt_tokens:
        return target.prompt_tokens
    parts = parts_of(cfg)
    return max(_slots_of(part.task, cfg.tokenizer) for part in parts) if parts else _slots_of(cfg.task, cfg.tokenizer)


def _slots_of(task: SingleTask, tokenizer: TokenizerConfig) -> int:
    if isinstance(task, ArithmeticTask):
        if not isinstance(tokenizer, CharacterTokenizer):
            raise UserError("--prompt-tokens: got nothing, want the longest prompt: plan does not read this tokenizer")
        from jaxrl_llm.tasks.tokenizer import load_tokenizer

        return len(load_tokenizer(tokenizer).prompt(task.prompt("9" * task.terms)))
    if not task.max_prompt_tokens:
        raise UserError(
            "task.max_prompt_tokens: got 0, want the longest prompt, or --prompt-tokens N: plan reads no data"
        )
    return task.max_prompt_tokens


def devices_of(target: Target) -> tuple[list["jax.Device"], Chip]:
    """Return the devices to plan for. Raises UserError for an unknown topology, or one with too few chips."""
    import jax

    if target.topology is None:
        devices = jax.devices()
        chip = chips.of_device(devices[0].platform, devices[0].device_kind, len(devices))
    else:
        topology = chips.parse_topology(target.topology)
        devices, chip = compilers.devices_of(topology, target.topology), topology.chip
    if target.chips is not None and not 1 <= target.chips <= len(devices):
        raise UserError(
            f"--chips: got {target.chips}, want 1 to {len(devices)}, the chips of {target.topology or 'this machine'}"
        )
    return list(devices)[: target.chips], chip


def plan(cfg: RunConfig, target: Target) -> Report:
    """Compile the programs of a step, unless the arrays without temporaries are too large already."""
    prepare(target)
    slots = prompt_slots(cfg, target)
    devices, chip = devices_of(target)
    from jaxrl_llm.plan import memory, predict, programs
    from jaxrl_llm.roles.memory_check import resident_bytes

    run = programs.make_checked_run(cfg, read_model(cfg), slots, devices)
    least = max(sum(r.program.values()) + sum(r.other.values()) for r in resident_bytes(run).values())
    compiled = programs.compile_all(run) if least <= chips.granted(chip) else {}
    phases = memory.phases(run, compiled) if compiled else memory.estimated(run)
    predicted = None if any(p.refused for p in compiled.values()) else predict.predict(run, chip, compiled or None)
    return report(run, target, chip, compiled, phases, predicted)


def read_model(cfg: RunConfig):
    """Return the model's config; that of a pretrained model is read from config.json, without weights."""
    from jaxrl_llm.model.config import ModelConfig
    from jaxrl_llm.model.hf.config import read_config
    from jaxrl_llm.model.hf.source import resolve

    if isinstance(cfg.model, ModelConfig):
        return cfg.model
    return read_config(resolve(cfg.model.path, ("config.json",)), cfg.model.compute)


def report(
    run: "AbstractRun", target: Target, chip: Chip, compiled: "dict[str, CompiledProgram]", phases: "list[Phase]",
    predicted: "Prediction | None",
) -> Report:  # fmt: skip
    """Return the report as JSON-serializable values.

    Args:
        run: The run.
        target: What it was planned for.
        chip: Its chips.
        compiled: The compiled programs; empty if the arrays alone do not fit.
        phases: Memory by phase.
        predicted: Predicted times; None without published peaks or where a program was refused.
    """
    import jax

    from jaxrl_llm.model import params as model_params
    from jaxrl_llm.plan import memory
    from jaxrl_llm.plan.advice import advise
    from jaxrl_llm.plan.predict import update_flops

    peak = memory.peak(phases)
    limit = chips.granted(chip)
    fits = bool(compiled) and peak.total <= limit and not any(p.refused for p in compiled.values())
    advice = [] if fits else advise(run, phases, limit)
    return {
        "topology": target.topology or "this machine",
        "chips": run.train.mesh.size,
        "chip": chip._asdict(),
        "limit": limit,
        "jax": jax.__version__,
        "mesh": dict(run.train.mesh.shape),
        "minibatches": run.cfg.update.minibatches,
        "micro_batches": run.cfg.update.micro_batches,
        "rows": run.cfg.rollout.prompts * run.cfg.rollout.samples,
        "slots": [run.prompt_slots, run.cfg.rollout.max_new_tokens],
        "control": run.cfg.rollout.control.kind,
        "tree": run.cfg.rollout.tree.kind,
        "reuse": run.cfg.rollout.reuse.kind,
        "parameters": model_params.count(model_params.specs(run.model)),
        "phases": [{"name": p.name, "total": p.total, "parts": p.parts} for p in phases],
        "peak": {"phase": peak.name, "bytes": peak.total},
        "compiled": bool(compiled),
        "fits": fits,
        "advice": [{"flags": a.flags, "bytes": a.bytes} for a in advice],
        "update_flops": sum(update_flops(run)),
        "programs": {name: _program(program, chip) for name, program in compiled.items()},
        "predicted": None if predicted is None else _predicted(predicted),
    }


def _program(program: "CompiledProgram", chip: Chip) -> Report:
    cost = program.cost
    return {
        "compile_seconds": program.compile_seconds,
        "refused": program.refused,
        "temporaries": program.temporaries,
        "received": cost.received,
        "compiler_seconds": cost.cycles / chip.clock if chip.clock else None,
        "unknown_loops": cost.unknown,
        "traffic": [t._asdict() | {"times": t.times} for t in cost.traffic],
    }


def _predicted(found: "Prediction") -> Report:
    parts = {name: getattr(found, name) for name in ("rollout", "publish", "update")}
    return {
        **{name: time._asdict() | {"total": time.total} for name, time in parts.items()},
        "step_seconds": found.step,
        "rollout_tokens_per_s": found.rollout_tokens_per_s,
        "mfu": found.mfu,
    }

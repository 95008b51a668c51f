"""`jaxrl plan`: from a config and a topology to a report, as one JSON object. `show` prints it.

Importing this loads no jax: what the compiler reads from the environment must stand there first.
"""

import importlib.util
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.errors import UserError
from jaxrl_llm.perf import chips
from jaxrl_llm.perf.chips import Chip
from jaxrl_llm.tasks.config import ArithmeticTask, CharacterTokenizer

if TYPE_CHECKING:
    import jax

    from jaxrl_llm.plan.memory import Phase
    from jaxrl_llm.plan.predict import Prediction
    from jaxrl_llm.plan.programs import Job, Program

Report = dict[str, Any]
# No question to a metadata server, no lock against other compilations, no search for workers, and no cache.
COMPILER = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    # What is compiled for a topology can be written to jax's cache and not read from it.
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}


@dataclass(frozen=True)
class Target:
    """What is planned for."""

    topology: str | None = None
    """Of a TPU slice, as v5e:4x4; None: the devices of this machine."""
    chips: int | None = None
    """How many of them; None: all."""
    prompt_tokens: int = 0
    """The longest prompt; 0: `task.max_prompt_tokens`."""


def prepare(target: Target) -> None:
    """Set the environment, before jax is imported: for a topology no accelerator of this machine is touched."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if target.topology is None:
        return
    chips.of_topology(target.topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("--topology: got no TPU compiler, want libtpu: pip install 'jaxrl-llm[tpu]'; it needs no TPU")
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name, value in COMPILER.items():
        os.environ.setdefault(name, value)


def prompt_slots(cfg: RunConfig, target: Target) -> int:
    """Slots of the longest prompt. Raises UserError where nobody says how long prompts get."""
    if target.prompt_tokens:
        return target.prompt_tokens
    if isinstance(cfg.task, ArithmeticTask):
        if not isinstance(cfg.tokenizer, CharacterTokenizer):
            raise UserError("--prompt-tokens: got nothing, want the longest prompt: plan does not read this tokenizer")
        from jaxrl_llm.tasks.tokenizer import load_tokenizer

        return len(load_tokenizer(cfg.tokenizer).prompt(cfg.task.prompt("9" * cfg.task.terms)))
    if not cfg.task.max_prompt_tokens:
        raise UserError(
            "task.max_prompt_tokens: got 0, want the longest prompt, or --prompt-tokens N: plan reads no data"
        )
    return cfg.task.max_prompt_tokens


def devices_of(target: Target) -> tuple[list["jax.Device"], Chip]:
    """Raises UserError for a topology that there is not, or with fewer chips than asked for."""
    import jax
    from jax.experimental import topologies

    if target.topology is None:
        devices = jax.devices()
        chip = chips.of_device(devices[0].platform, devices[0].device_kind, len(devices))
    else:
        chip = chips.of_topology(target.topology)
        try:
            devices = topologies.get_topology_desc(platform="tpu", topology_name=target.topology).devices
        except jax.errors.JaxRuntimeError as error:
            raise UserError(
                f"--topology: got {target.topology}, which libtpu refuses: {str(error).splitlines()[0]}"
            ) from None
    if target.chips is not None and not 1 <= target.chips <= len(devices):
        raise UserError(
            f"--chips: got {target.chips}, want 1 to {len(devices)}, the chips of {target.topology or 'this machine'}"
        )
    return list(devices)[: target.chips], chip


def plan(cfg: RunConfig, target: Target) -> Report:
    """Compile the programs of a step, unless what lives on beside them is too much already."""
    prepare(target)
    slots = prompt_slots(cfg, target)
    devices, chip = devices_of(target)
    from jaxrl_llm.plan import memory, predict, programs

    job = programs.make_job(cfg, read_model(cfg), slots, devices)
    least = max(sum(r.inside.values()) + sum(r.beside.values()) for r in memory.residents(job).values())
    compiled = programs.compile_all(job) if least <= chip.memory else {}
    phases = memory.phases(job, compiled) if compiled else memory.estimated(job)
    predicted = None if any(p.refused for p in compiled.values()) else predict.predict(job, chip, compiled or None)
    return report(job, target, chip, compiled, phases, predicted)


def read_model(cfg: RunConfig):
    """The model's numbers; of a pretrained one from its config.json alone, no weights are read."""
    from jaxrl_llm.model.config import ModelConfig
    from jaxrl_llm.model.hf.config import read_config
    from jaxrl_llm.model.hf.source import resolve

    if isinstance(cfg.model, ModelConfig):
        return cfg.model
    return read_config(resolve(cfg.model.path, ("config.json",)), cfg.model.compute)


def report(
    job: "Job", target: Target, chip: Chip, compiled: "dict[str, Program]", phases: "list[Phase]",
    predicted: "Prediction | None",
) -> Report:  # fmt: skip
    import jax

    from jaxrl_llm.model import params as model_params
    from jaxrl_llm.plan import memory
    from jaxrl_llm.plan.advice import advise
    from jaxrl_llm.plan.predict import update_flops

    peak = memory.peak(phases)
    fits = bool(compiled) and peak.total <= chip.memory and not any(p.refused for p in compiled.values())
    advice = [] if fits else advise(job, phases, chip.memory)
    return {
        "topology": target.topology or "this machine",
        "chips": job.train.mesh.size,
        "chip": chip._asdict(),
        "jax": jax.__version__,
        "mesh": dict(job.train.mesh.shape),
        "minibatches": job.cfg.update.minibatches,
        "micro_batches": job.cfg.update.micro_batches,
        "rows": job.cfg.rollout.prompts * job.cfg.rollout.samples,
        "slots": [job.prompt_slots, job.cfg.rollout.max_new_tokens],
        "parameters": model_params.count(model_params.specs(job.model)),
        "phases": [{"name": p.name, "total": p.total, "parts": p.parts} for p in phases],
        "peak": {"phase": peak.name, "bytes": peak.total},
        "compiled": bool(compiled),
        "fits": fits,
        "advice": [{"flags": a.flags, "bytes": a.bytes} for a in advice],
        "update_flops": sum(update_flops(job)),
        "programs": {name: _program(program, chip) for name, program in compiled.items()},
        "predicted": None if predicted is None else _predicted(predicted),
    }


def _program(program: "Program", chip: Chip) -> Report:
    reading = program.reading
    return {
        "compile_seconds": program.compile_seconds,
        "refused": program.refused,
        "temporaries": program.temporaries,
        "received": reading.received,
        "compiler_seconds": reading.cycles / chip.clock if chip.clock else None,
        "unknown_loops": reading.unknown,
        "traffic": [t._asdict() | {"times": t.times} for t in reading.traffic],
    }


def _predicted(found: "Prediction") -> Report:
    parts = {name: getattr(found, name) for name in ("rollout", "publish", "update")}
    return {
        **{name: time._asdict() | {"total": time.total} for name, time in parts.items()},
        "step_seconds": found.step,
        "rollout_tokens_per_s": found.rollout_tokens_per_s,
        "mfu": found.mfu,
    }

"""`jaxrl plan --sweep`: every mesh of the chips, every number of micro-batches; arithmetic first, the compiler for the best few.

Each compilation is a process of its own: what a compiler leaves behind, or how it dies, is no matter of the next one.
"""

import json
import subprocess
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.errors import UserError
from jaxrl_llm.parallel.config import AXES, divisors
from jaxrl_llm.perf.chips import Chip
from jaxrl_llm.plan.command import Report, Target, devices_of, prepare, prompt_slots, read_model

if TYPE_CHECKING:
    import jax

    from jaxrl_llm.model.config import ModelConfig

# What arithmetic says may be off by so much before a form is not worth compiling.
SLACK = 1.1
COMPILE_LIMIT_S = 7200


class Form(NamedTuple):
    """A mesh with a number of micro-batches, before it is compiled."""

    mesh: tuple[int, ...]
    micro_batches: int
    bytes: int
    seconds: float

    @property
    def flags(self) -> list[str]:
        axes = [f"--mesh.{name}={size}" for name, size in zip(AXES, self.mesh, strict=True)]
        return [*axes, f"--update.micro_batches={self.micro_batches}"]


def meshes(num: int) -> Iterator[tuple[int, ...]]:
    """All (data, fsdp, tensor, expert) of so many devices."""
    for data in divisors(num):
        for fsdp in divisors(num // data):
            for tensor in divisors(num // data // fsdp):
                yield data, fsdp, tensor, num // data // fsdp // tensor


def micro_batches(cfg: RunConfig, mesh: tuple[int, ...]) -> list[int]:
    """Powers of two and what the config says, up to one row a shard in each."""
    data, fsdp, _, expert = mesh
    rows = cfg.rollout.prompts * cfg.rollout.samples // cfg.update.minibatches
    most = max(rows // (data * fsdp * expert), 1)
    return sorted(
        {m for m in (2**i for i in range(most.bit_length())) if m <= most}
        | ({cfg.update.micro_batches} & set(range(most + 1)))
    )


def sweep(cfg: RunConfig, target: Target, command: list[str], candidates: int) -> Report:
    """`command`: the command line of one plan, as a list; flags of a form and --json are put behind it."""
    prepare(target)
    slots = prompt_slots(cfg, target)
    devices, chip = devices_of(target)
    if not chip.flops:
        raise UserError(
            f"--sweep: got {chip.name}, whose peaks nobody publishes, want a --topology: forms are ranked by predicted time"
        )
    every, model = list(meshes(len(devices))), read_model(cfg)
    forms = [form for mesh in every for form in forms_of(cfg, model, mesh, slots, devices, chip)]
    fitting = sorted((f for f in forms if f.bytes <= SLACK * chip.memory), key=lambda f: f.seconds)
    compiled, failed = compile_best(command, fastest(fitting), candidates)
    return {
        "chips": len(devices),
        "meshes": len(every),
        "possible": len({form.mesh for form in forms}),
        "tried": len(forms),
        "estimated": len(fitting),
        "compiled": sorted(compiled, key=lambda r: (not r["fits"], (r["predicted"] or {}).get("step_seconds", 0.0))),
        "failed": failed,
    }


def fastest(forms: list[Form]) -> list[Form]:
    """The fastest of each mesh, in order of predicted time; `forms` are."""
    first: dict[tuple[int, ...], Form] = {}
    for form in forms:
        first.setdefault(form.mesh, form)
    return list(first.values())


def compile_best(command: list[str], forms: list[Form], candidates: int) -> tuple[list[Report], list[Report]]:
    """Reports of the first `candidates`, and of as many more, at most, until one fits; and those that no compiler got through."""
    compiled, failed = [], []
    for n, form in enumerate(forms[: 2 * candidates]):
        if n >= candidates and any(r["fits"] for r in compiled):
            break
        flags = " ".join(form.flags)
        try:
            compiled.append(compile_form(command, form) | {"flags": flags})
        except UserError as error:
            failed.append({"flags": flags, "reason": str(error)})
    return compiled, failed


def forms_of(
    cfg: RunConfig, model: "ModelConfig", mesh: tuple[int, ...], slots: int, devices: "list[jax.Device]", chip: Chip
) -> list[Form]:
    """Of one mesh, each number of micro-batches; none where config and mesh do not go together."""
    from jaxrl_llm.plan import memory, predict
    from jaxrl_llm.plan.advice import changed
    from jaxrl_llm.plan.programs import make_job, problems, with_micro_batches

    axes = {f"mesh.{name}": size for name, size in zip(AXES, mesh, strict=True)}
    found, job, others = [], None, 0
    for parts in micro_batches(cfg, mesh):
        form = changed(cfg, axes | {"update.micro_batches": parts})
        if problems(form, model, slots, devices):
            continue
        if job is None:
            job = make_job(form, model, slots, devices)
            others = max(phase.total for phase in memory.estimated(job) if phase.name != "update")
        job = with_micro_batches(job, parts)
        size = max(others, memory.estimated_update(job).total)
        found.append(Form(mesh, parts, size, float(predict.predict(job, chip).step)))
    return found


def compile_form(command: list[str], form: Form) -> Report:
    """The report of one plan. Raises UserError with the last line of a compilation that failed."""
    try:
        done = subprocess.run(
            [*command, *form.flags, "--json"], capture_output=True, text=True, timeout=COMPILE_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"got no plan in {COMPILE_LIMIT_S} s") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"got no plan, want one: {last}")
    return json.loads(done.stdout)

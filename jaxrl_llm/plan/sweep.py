"""`jaxrl plan --sweep`: ranks all meshes and numbers of micro-batches by estimates, and compiles the best few.

Each compilation runs in a separate process, so that a crash or leak of the compiler does not affect the next one.
"""

import json
import subprocess
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.errors import UserError
from jaxrl_llm.parallel.config import AXES, divisors
from jaxrl_llm.perf import chips
from jaxrl_llm.perf.chips import Chip
from jaxrl_llm.plan.command import Report, Target, devices_of, prepare, prompt_slots, read_model

if TYPE_CHECKING:
    import jax

    from jaxrl_llm.model.config import ModelConfig

# Candidates whose estimated memory exceeds the chip's by more than this factor are not compiled.
SLACK = 1.1
COMPILE_LIMIT_S = 7200


class Candidate(NamedTuple):
    """A mesh with a number of micro-batches, before it is compiled."""

    mesh: tuple[int, ...]
    micro_batches: int
    bytes: int
    """Estimated bytes per chip of the largest phase."""
    seconds: float
    """Predicted seconds per step."""

    @property
    def flags(self) -> list[str]:
        axes = [f"--mesh.{name}={size}" for name, size in zip(AXES, self.mesh, strict=True)]
        return [*axes, f"--update.micro_batches={self.micro_batches}"]


def meshes(num: int) -> Iterator[tuple[int, ...]]:
    """All meshes (data, fsdp, tensor, expert) of `num` devices."""
    for data in divisors(num):
        for fsdp in divisors(num // data):
            for tensor in divisors(num // data // fsdp):
                yield data, fsdp, tensor, num // data // fsdp // tensor


def micro_batches(cfg: RunConfig, mesh: tuple[int, ...]) -> list[int]:
    """Numbers of micro-batches to try: powers of two and the config's, up to one row per shard in each."""
    data, fsdp, _, expert = mesh
    rows = cfg.rollout.prompts * cfg.rollout.samples // cfg.update.minibatches
    most = max(rows // (data * fsdp * expert), 1)
    return sorted(
        {m for m in (2**i for i in range(most.bit_length())) if m <= most}
        | ({cfg.update.micro_batches} & set(range(most + 1)))
    )


def sweep(cfg: RunConfig, target: Target, command: list[str], num_compiled: int) -> Report:
    """Return the report of a sweep.

    Args:
        cfg: The config; its mesh and micro-batches are replaced.
        target: What to plan for.
        command: Command line of a single plan, to which the flags of a candidate and --json are appended.
        num_compiled: Number of candidates to compile.
    """
    prepare(target)
    slots = prompt_slots(cfg, target)
    devices, chip = devices_of(target)
    if not chip.flops:
        raise UserError(
            f"--sweep: got {chip.name}, whose peaks are not published, want a --topology: candidates are ranked by predicted time"
        )
    every, model = list(meshes(len(devices))), read_model(cfg)
    candidates = [candidate for mesh in every for candidate in candidates_of(cfg, model, mesh, slots, devices, chip)]
    fitting = sorted((c for c in candidates if c.bytes <= SLACK * chips.granted(chip)), key=lambda c: c.seconds)
    compiled, failed = compile_best(command, fastest(fitting), num_compiled)
    return {
        "chips": len(devices),
        "meshes": len(every),
        "possible": len({candidate.mesh for candidate in candidates}),
        "tried": len(candidates),
        "estimated": len(fitting),
        "compiled": sorted(compiled, key=lambda r: (not r["fits"], (r["predicted"] or {}).get("step_seconds", 0.0))),
        "failed": failed,
    }


def fastest(candidates: list[Candidate]) -> list[Candidate]:
    """Keep the first candidate per mesh; `candidates` are in order of predicted time."""
    first: dict[tuple[int, ...], Candidate] = {}
    for candidate in candidates:
        first.setdefault(candidate.mesh, candidate)
    return list(first.values())


def compile_best(
    command: list[str], candidates: list[Candidate], num_compiled: int
) -> tuple[list[Report], list[Report]]:
    """Compile the first `num_compiled` candidates, and up to as many more until one fits; return reports and failures."""
    compiled, failed = [], []
    for n, candidate in enumerate(candidates[: 2 * num_compiled]):
        if n >= num_compiled and any(r["fits"] for r in compiled):
            break
        flags = " ".join(candidate.flags)
        try:
            compiled.append(compile_candidate(command, candidate) | {"flags": flags})
        except UserError as error:
            failed.append({"flags": flags, "reason": str(error)})
    return compiled, failed


def candidates_of(
    cfg: RunConfig, model: "ModelConfig", mesh: tuple[int, ...], slots: int, devices: "list[jax.Device]", chip: Chip
) -> list[Candidate]:
    """Return the candidates of one mesh, one per valid number of micro-batches.

    Args:
        cfg: The config.
        model: The config of its model.
        mesh: Sizes of the axes.
        slots: Tokens of the longest prompt.
        devices: Devices of the plan.
        chip: Their kind.
    """
    from jaxrl_llm.plan import memory, predict
    from jaxrl_llm.plan.advice import changed
    from jaxrl_llm.plan.programs import make_checked_run, problems
    from jaxrl_llm.roles.abstract_run import with_micro_batches

    axes = {f"mesh.{name}": size for name, size in zip(AXES, mesh, strict=True)}
    found, run, others = [], None, 0
    for parts in micro_batches(cfg, mesh):
        variant = changed(cfg, axes | {"update.micro_batches": parts})
        if problems(variant, model, slots, devices):
            continue
        if run is None:
            run = make_checked_run(variant, model, slots, devices)
            others = max(phase.total for phase in memory.estimated(run) if phase.name != "update")
        run = with_micro_batches(run, parts)
        size = max(others, memory.estimated_update(run).total)
        found.append(Candidate(mesh, parts, size, float(predict.predict(run, chip).step)))
    return found


def compile_candidate(command: list[str], candidate: Candidate) -> Report:
    """Return the report of one plan. Raises UserError with the last line of a failed compilation."""
    try:
        done = subprocess.run(
            [*command, *candidate.flags, "--json"], capture_output=True, text=True, timeout=COMPILE_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"got no plan in {COMPILE_LIMIT_S} s") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"got no plan, want one: {last}")
    return json.loads(done.stdout)

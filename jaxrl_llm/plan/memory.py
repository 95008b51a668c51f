"""What a chip holds in each phase of a step, by part. All in bytes of one chip, the fullest phase is the step's peak.

Parts are exact, from shapes and shardings; temporaries are the compiler's. Before anything is compiled they are estimated, to
choose what is worth compiling.
"""

from math import prod
from typing import NamedTuple

import jax
import numpy as np

from jaxrl_llm.distribution.head import ACCELERATOR
from jaxrl_llm.model import lora
from jaxrl_llm.perf.work import held
from jaxrl_llm.plan import decode_memory as rollout_memory
from jaxrl_llm.plan.programs import Job, Program

MASTERS, OPTIMIZER, REFERENCE, POLICY = "master parameters", "optimizer state", "reference parameters", "policy"
PROMPTS, ROWS, BATCH = "KV cache of prompts", "KV cache of rows", "batch"
GRADIENTS, TEMPORARIES, REST = "gradients", "activations and temporaries", "records, tiles, small inputs"
PARTS = (MASTERS, OPTIMIZER, REFERENCE, POLICY, PROMPTS, ROWS, BATCH, GRADIENTS, TEMPORARIES, REST)


class Phase(NamedTuple):
    """One program while it runs, and what lives on beside it."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


class Residents(NamedTuple):
    """What a program is given or returns, and what else is there meanwhile."""

    inside: dict[str, int]
    beside: dict[str, int]


def residents(job: Job) -> dict[str, Residents]:
    """By program."""
    state, policy = _state(job), held(job.policy.params)
    _, units, window = job.flight
    caches = job.engine.programs.caches
    prompts, rows = (held(cache) for cache in caches(units, window))
    read = held(caches(job.flight[0], window)[0])
    waiting = {PROMPTS: prompts, ROWS: rows} if job.waits else {}
    found = {
        "prefill": Residents({POLICY: policy, PROMPTS: read}, state | waiting),
        "segment": Residents({POLICY: policy, PROMPTS: prompts, ROWS: rows}, state),
        "publish": Residents(
            {POLICY: policy, MASTERS: state[MASTERS]}, {k: v for k, v in state.items() if k != MASTERS}
        ),
        "update": residents_of_update(job),
    }
    windows = job.engine.sizes.windows
    if len(windows) > 1:
        before = held(caches(units, windows[-2])[1])
        found["grow"] = Residents({ROWS: before + rows}, _state(job) | {POLICY: policy, PROMPTS: prompts})
    return found


def residents_of_update(job: Job) -> Residents:
    state, policy = _state(job), held(job.policy.params)
    reference = {REFERENCE: state.pop(REFERENCE)}
    if job.cfg.objective.reads_reference_distribution:
        return Residents(state | reference | {BATCH: held(job.batch)}, {POLICY: policy})
    return Residents(state | {BATCH: held(job.batch)}, {POLICY: policy} | reference)


def _state(job: Job) -> dict[str, int]:
    reference = held(job.reference) if job.reference is not None else 0
    return {MASTERS: held(job.state.params), OPTIMIZER: held(job.state.opt_state), REFERENCE: reference}


def gradients(job: Job) -> int:
    """Of what is trained, in f32, as they are added up over micro-batches."""
    return held(lora.split(job.state.params)[0])


def phases(job: Job, programs: dict[str, Program]) -> list[Phase]:
    """As compiled."""
    found = []
    for name, (inside, beside) in residents(job).items():
        program = programs[name]
        given = sum(inside.values())
        temporaries = max(program.temporaries - (given if program.refused == "all" else 0), 0)
        # What a program does not read, the compiler leaves out, and yet it is there.
        rest = 0 if program.refused else max(program.passed - given, 0)
        found.append(_phase(job, name, inside, beside, temporaries, rest))
    return found


def estimated(job: Job) -> list[Phase]:
    """Before anything is compiled."""
    return [_estimated(job, name, found) for name, found in residents(job).items()]


def estimated_update(job: Job) -> Phase:
    """The one phase that depends on the number of micro-batches."""
    return _estimated(job, "update", residents_of_update(job))


def _estimated(job: Job, name: str, found: Residents) -> Phase:
    return _phase(job, name, *found, temporaries_of(job, name), 0)


def _phase(job: Job, name: str, inside: dict[str, int], beside: dict[str, int], temporaries: int, rest: int) -> Phase:
    parts = dict.fromkeys(PARTS, 0)
    for more in (inside, beside):
        for part, size in more.items():
            parts[part] += size
    own = min(gradients(job), temporaries) if name == "update" else 0
    parts |= {GRADIENTS: own, TEMPORARIES: temporaries - own, REST: rest}
    return Phase(name, parts)


def temporaries_of(job: Job, name: str) -> int:
    """An estimate, to leave out what has no chance: within a factor of two of what the TPU compiler finds."""
    if name == "grow":
        return 0
    if name == "publish":
        # The compiler gathers into memory of its own, and copies.
        return held(job.policy.params) if job.train.mesh.shape["fsdp"] > 1 else 0
    if name == "update":
        return gradients(job) + _activations(job)
    if name == "segment":
        flight = rollout_memory.flight(job.engine.programs, job.policy.params, *job.flight[1:])
        return flight.record + flight.working
    tokens = job.flight[0] // job.decode.size("rows") * min(job.prompt_slots, job.cfg.rollout.engine.prefill_chunk)
    return 2 * 2 * tokens * _widths(job, job.decode)


def _activations(job: Job) -> int:
    """Of one micro-batch: what each layer keeps, what one layer makes, and head and logits."""
    cfg, layout, (rows, slots) = job.model, job.train, job.batch.tokens.shape
    share = max(rows // job.cfg.update.micro_batches // layout.size("rows"), 1)
    tokens, vocab = share * slots, cfg.vocab_size // layout.size("vocab")
    size = np.dtype(cfg.compute).itemsize
    made = _widths(job, layout)
    kept = cfg.d_model if job.cfg.update.remat in ("layer", "auto", "offload") else made
    matrices = sum(prod(x.shape) for x in jax.tree.leaves(job.state.params["layers"])) // cfg.layers
    matrices //= layout.size("mlp") * (layout.size("expert") if cfg.experts else 1)
    scores = 2 * 4 * share * cfg.heads // layout.size("heads") * slots * min(slots, 1024)
    head = (size + 8) * vocab * cfg.d_model + 2 * 4 * min(ACCELERATOR.logits, tokens * vocab)
    return size * tokens * (cfg.layers * kept + 2 * made) + scores + 2 * size * matrices + head


def _widths(job: Job, layout) -> int:
    """Numbers that a layer makes for one token on one chip."""
    cfg = job.model
    packed = cfg.kv_heads * (cfg.group + 2) * cfg.head_dim // layout.size("heads")
    gathered = 2 * layout.size("expert") * cfg.d_model if cfg.experts else 0
    return gathered + 3 * cfg.d_model + 2 * packed + 3 * cfg.d_mlp * max(cfg.experts_per_token, 1) // layout.size("mlp")


def peak(found: list[Phase]) -> Phase:
    return max(found, key=lambda phase: phase.total)

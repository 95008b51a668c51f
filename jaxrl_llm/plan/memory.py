"""Memory of each phase of a step, by part, in bytes per chip. The largest phase is the peak of the step.

Arrays are exact (`roles.memory`). Temporaries are the compiler's, or estimates, to choose what is worth compiling.
"""

from math import prod

import jax
import numpy as np

from jaxrl_llm.distribution.head import ACCELERATOR
from jaxrl_llm.perf.work import bytes_per_device
from jaxrl_llm.plan import decode_memory
from jaxrl_llm.plan.programs import CompiledProgram
from jaxrl_llm.roles.abstract_run import AbstractRun
from jaxrl_llm.roles.memory_check import (
    BATCH,
    GRADIENTS,
    MASTERS,
    OPTIMIZER,
    POLICY,
    PROMPTS,
    REFERENCE,
    ROWS,
    Phase,
    ResidentBytes,
    gradients,
    resident_bytes,
    resident_bytes_of_update,
)

TEMPORARIES, REST = "activations and temporaries", "records, tiles, small inputs"
PARTS = (MASTERS, OPTIMIZER, REFERENCE, POLICY, PROMPTS, ROWS, BATCH, GRADIENTS, TEMPORARIES, REST)


def phases(run: AbstractRun, programs: dict[str, CompiledProgram]) -> list[Phase]:
    """Return the memory of each phase, with temporaries as compiled."""
    found = []
    for name, resident in resident_bytes(run).items():
        program = programs[name]
        expected = sum(resident.program.values())
        temporaries = max(program.temporaries - (expected if program.refused == "all" else 0), 0)
        # At least 0: the compiler drops arguments that a program does not read, but they stay allocated.
        rest = 0 if program.refused else max(program.passed - expected, 0)
        found.append(_phase(run, name, resident, temporaries, rest))
    return found


def estimated(run: AbstractRun) -> list[Phase]:
    """Return the memory of each phase, with estimated temporaries."""
    return [_estimated(run, name, found) for name, found in resident_bytes(run).items()]


def estimated_update(run: AbstractRun) -> Phase:
    """Return the update phase of `estimated`, the only one that depends on the number of micro-batches."""
    return _estimated(run, "update", resident_bytes_of_update(run))


def _estimated(run: AbstractRun, name: str, resident: ResidentBytes) -> Phase:
    return _phase(run, name, resident, estimated_temporaries(run, name), 0)


def _phase(run: AbstractRun, name: str, resident: ResidentBytes, temporaries: int, rest: int) -> Phase:
    parts = dict.fromkeys(PARTS, 0)
    for arrays in resident:
        for part, size in arrays.items():
            parts[part] += size
    accumulators = min(gradients(run), temporaries) if name == "update" else 0
    parts |= {GRADIENTS: accumulators, TEMPORARIES: temporaries - accumulators, REST: rest}
    return Phase(name, parts)


def estimated_temporaries(run: AbstractRun, name: str) -> int:
    """Estimate the temporaries of a program, in bytes per chip, within a factor of two of the TPU compiler's."""
    if name == "extend_suffix":
        return 0
    if name == "publish":
        # The compiler gathers into a separate buffer, and copies.
        return bytes_per_device(run.policy.params) if run.train.mesh.shape["fsdp"] > 1 else 0
    if name == "update":
        return gradients(run) + _activations(run)
    if name == "decode_chunk":
        controlled = run.abstract_tables is not None
        decode = decode_memory.decode_memory(run.engine.programs, run.policy.params, *run.capacity[1:], controlled)
        return decode.chunk + decode.working
    tokens = run.capacity[0] // run.decode.size("rows") * min(run.prompt_slots, run.cfg.rollout.engine.prefill_chunk)
    return 2 * 2 * tokens * _widths(run, run.decode)


def _activations(run: AbstractRun) -> int:
    """Bytes per chip in one micro-batch: what each layer keeps, the intermediates of one layer, head and logits."""
    cfg, layout, (rows, slots) = run.model, run.train, run.batch.tokens.shape
    share = max(rows // run.cfg.update.micro_batches // layout.size("rows"), 1)
    tokens, vocab = share * slots, cfg.vocab_size // layout.size("vocab")
    size = np.dtype(cfg.compute).itemsize
    made = _widths(run, layout)
    kept = cfg.d_model if run.cfg.update.remat in ("layer", "auto", "offload") else made
    matrices = sum(prod(x.shape) for x in jax.tree.leaves(run.state.params["layers"])) // cfg.layers
    matrices //= layout.size("mlp") * (layout.size("expert") if cfg.experts else 1)
    scores = 2 * 4 * share * cfg.heads // layout.size("heads") * slots * min(slots, 1024)
    head = (size + 8) * vocab * cfg.d_model + 2 * 4 * min(ACCELERATOR.logits, tokens * vocab)
    return size * tokens * (cfg.layers * kept + 2 * made) + scores + 2 * size * matrices + head


def _widths(run: AbstractRun, layout) -> int:
    """Number of intermediate values of one layer per token, on one chip."""
    cfg = run.model
    packed = cfg.kv_heads * (cfg.group + 2) * cfg.head_dim // layout.size("heads")
    gathered = 2 * layout.size("expert") * cfg.d_model if cfg.experts else 0
    return gathered + 3 * cfg.d_model + 2 * packed + 3 * cfg.d_mlp * max(cfg.experts_per_token, 1) // layout.size("mlp")


def peak(found: list[Phase]) -> Phase:
    """The phase that needs most memory."""
    return max(found, key=lambda phase: phase.total)

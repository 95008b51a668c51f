"""Required properties of the engine's programs under the compilers. Each check is a function, so mutants can fail it.

Bounds are on the optimized HLO of one chip of 16; `docs/compilers.md` has the actual numbers.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from programs import (
    EXPERT_SPLIT,
    FSDP,
    LONG,
    LONG_WINDOW,
    ONE_BILLION,
    SLIDING,
    SPLIT,
    STEPS,
    TENSOR,
    V5E_BYTES,
    C,
    G,
    P,
    Program,
    S,
    abstract_policy,
    compile_program,
    layouts,
    lower_rollout,
    only_gpu,
    policy_matrices,
    rollout_programs,
    same_dims,
)

from jaxrl_llm.model import linear, products
from jaxrl_llm.perf.hlo import ArrayShape, Instruction, collectives
from jaxrl_llm.plan import decode_memory
from jaxrl_llm.rollout import sample
from jaxrl_llm.rollout.config import EngineConfig, RolloutConfig
from jaxrl_llm.rollout.engine import Engine, EngineModel

pytestmark = pytest.mark.timeout(1200)

# Collectives per decode step that do not depend on layers: the embedding's rows; maximum and sum of the softmax; value
# and index of the sampled block; that block's logits; log-prob and entropy together.
STEP_CONSTANT = 7
VMEM = "S(1)"
ONE_LAYER = dataclasses.replace(ONE_BILLION, layers=1)
RECORDED = 4
"""Arrays recorded per step: token, sampled, log-prob, entropy."""


def caches(program: Program, window: int = C) -> dict[str, tuple[int, ...]]:
    """Shapes per chip of a layer's key caches; value caches are equal."""
    cfg = program.cfg
    heads = cfg.kv_heads // TENSOR
    slots = {"suffix": (P * G, window), "prompt": (P, S)}
    if any(cfg.sliding):
        slots |= {"suffix ring": (P * G, cfg.window), "prompt window": (P, cfg.window)}
    return {name: (rows // FSDP, heads, size, cfg.head_dim) for name, (rows, size) in slots.items()}


def layers_with(program: Program, cache: str) -> int:
    """Number of layers with a cache of that name."""
    sliding = sum(program.cfg.sliding)
    return sliding if "ring" in cache or "window" in cache else program.cfg.layers - sliding


def loops(program: Program) -> list[Instruction]:
    """The loop over intervals, and inside it the loop over the steps of one. On GPUs products of experts have their own inside."""
    found = [i for i in program.hlo.all if i.opcode == "while" and i.computation in program.hlo.loops]
    if program.of == "gpu" and program.cfg.experts:
        found = [i for i in found if program.hlo.loops[i.computation] < 2]
    found.sort(key=lambda i: program.hlo.loops[i.computation])
    depths = [program.hlo.loops[i.computation] for i in found]
    assert depths == [0, 1], f"nesting depth of the loops of a chunk: got {depths}, want [0, 1]"
    return found


def steps_of(program: Program) -> list[Instruction]:
    """Instructions of one step, fused ones included."""
    return program.hlo.inside(*loops(program)[1].calls)


def check_caches_are_written_in_place(program: Program, window: int = C) -> None:
    """In the loop a cache-shaped array comes from the loop's state, from a write into it, or from a copy to or from on-chip memory.

    Where it estimates a gain, the compiler prefetches a cache into on-chip memory, writes the new keys there, and copies it back.
    That needs no second array in main memory: `check_no_cache_is_held_twice`.
    """
    passes = {"parameter", "get-tuple-element", "tuple", "bitcast", "dynamic-update-slice", "slice-start", "slice-done"}

    steps = [i for name in loops(program)[1].calls for i in program.hlo.computations[name]]
    on_chip = {i.name for i in steps if i.opcode == "copy-start" and VMEM in i.line}

    def allowed(i: Instruction) -> bool:
        if i.opcode == "fusion":
            return program.hlo.root(i.calls[0]).opcode == "dynamic-update-slice"
        if i.opcode == "copy-done":
            return any(f"%{name})" in i.line for name in on_chip)
        return i.opcode in passes or (i.opcode in ("copy-start", "custom-call") and VMEM in i.line)

    for name, dims in caches(program, window).items():
        of_cache = [i for i in steps if any(same_dims(a, dims) for a in i.arrays)]
        bad = [str(i) for i in of_cache if not allowed(i)]
        assert not bad, f"{name} cache {dims}: got {bad}, want it only read, and written in place"
    writes = [i for i in steps if i.opcode == "dynamic-update-slice" or "dynamic_update_slice" in i.line]
    # The state that the loop passes on names its parts.
    writes = [i for i in writes if i.opcode not in ("tuple", "bitcast")]
    for name, dims in caches(program, window).items():
        got = sum(any(same_dims(a, dims) for a in i.arrays) for i in writes)
        want = 2 * layers_with(program, name) if "suffix" in name else 0
        assert got == want, f"writes into the {name} per step: got {got}, want {want}"


def check_no_cache_is_held_twice(program: Program, window: int = C) -> None:
    """The completions' caches are updated in place: input and output are aliased."""
    shapes = caches(program, window)
    suffix = sum(2 * 2 * layers_with(program, name) * math.prod(shapes[name]) for name in shapes if "suffix" in name)
    assert program.alias == suffix, f"alias: got {program.alias / 1e6:.1f} MB, want {suffix / 1e6:.1f} MB, both caches"


def check_collectives_of_a_step(program: Program) -> None:
    got = collectives(steps_of(program))
    want = 2 * program.cfg.layers + STEP_CONSTANT
    assert len(got) <= want, (
        f"collectives per decode step: got {len(got)}, want at most {want}: {[str(i) for i in got]}"
    )
    kinds = {i.kind for i in got}
    assert kinds <= {"all-reduce", "all-gather"}, f"kinds per decode step: got {kinds}, want all-reduce and all-gather"


def check_activity_is_tested_once_per_interval(program: Program) -> None:
    """Active rows are checked once per `eos_interval` steps, and recorded columns cross the mesh once per chunk."""
    outer = {i.name: i for i in program.hlo.inside(*loops(program)[0].calls)}
    inner = {i.name for i in steps_of(program)}
    between = collectives([i for name, i in outer.items() if name not in inner])
    found = [(i.kind, a.size) for i in between for a in i.results]
    assert found == [("all-reduce", 1)], f"collectives per interval: got {found}, want one all-reduce of one number"


def check_logits_stay(program: Program) -> None:
    """No array larger than the residual stream crosses the mesh in a step; a shard of the logits is 9 to 16 times as large."""
    most = P * G // FSDP * program.cfg.d_model
    for i in collectives(steps_of(program)):
        size = max(a.size for a in i.results)
        assert size <= most, f"{i}: got {size} elements, want at most {most}, those of the residual stream"


def check_activations_are_sent_in_bfloat16(program: Program) -> None:
    """The embedding's rows, and two sums per layer."""
    shape = P * G // FSDP, program.cfg.d_model
    sent = [a.dtype for i in collectives(steps_of(program)) for a in i.results if same_dims(a, shape)]
    assert sent == ["bf16"] * (2 * program.cfg.layers + 1), f"activations sent per decode step: got {sent}, want bf16"


def check_weights_are_not_copied(program: Program, split: dict[str, int] = SPLIT, but: tuple[str, ...] = ()) -> None:
    shapes = policy_matrices(program.cfg, split)
    for i in program.hlo.all:
        if i.opcode in ("copy", "transpose") and i.computation not in program.hlo.fused:
            bad = [name for name, dims in shapes.items() if name not in but and same_dims(i.arrays[0], dims)]
            assert not bad, f"{i}: got a copy of {bad}, want weights used where they lie"


def test_a_chunk_writes_its_caches_in_place(decode_chunk):
    check_caches_are_written_in_place(decode_chunk)
    check_no_cache_is_held_twice(decode_chunk)


def test_a_chunk_has_two_collectives_per_layer(decode_chunk):
    check_collectives_of_a_step(decode_chunk)


def test_a_chunk_sends_activations_in_bfloat16(decode_chunk):
    check_activations_are_sent_in_bfloat16(decode_chunk)


def children_of_the_innermost_loop(thunks: str) -> list[str]:
    """Kinds of what runs in each iteration of the innermost loop, from the compiler's dump of what it launches."""
    lines = thunks.splitlines()
    body = lines[max(n for n, line in enumerate(lines) if line.strip() == "body:") + 1 :]
    depth = [len(line) - len(line.lstrip()) for line in body]
    inside = next((n for n, d in enumerate(depth) if d < depth[0]), len(body))
    return [line.split()[1] for line, d in zip(body[:inside], depth, strict=False) if d == depth[0]]


@only_gpu
def test_a_decode_step_on_one_gpu_is_one_command_buffer(topology, tmp_path):
    """A graph of CUDA, launched at once. The loops are the host's, which reads one number per step; where XLA is asked to capture
    loops (`--xla_gpu_enable_command_buffer=+WHILE`) too. On several GPUs a graph holds what lies between two collectives."""
    lowered = lower_rollout(ONE_LAYER, layouts(topology, (1, 1, 1))[1], "decode_chunk", P, C)
    lowered.compile(compiler_options={"xla_dump_to": str(tmp_path), "xla_dump_hlo_as_text": True})
    (dump,) = tmp_path.glob("*thunk_sequence_after_thunk_passes.txt")
    assert children_of_the_innermost_loop(dump.read_text()) == ["kCommandBuffer"]


def test_a_chunk_tests_activity_once_per_interval(decode_chunk):
    check_activity_is_tested_once_per_interval(decode_chunk)


def test_a_chunk_keeps_the_logits_where_they_are(decode_chunk):
    check_logits_stay(decode_chunk)


def test_a_chunk_uses_the_weights_where_they_lie(decode_chunk):
    check_weights_are_not_copied(decode_chunk)


@pytest.mark.parametrize("automata", [pytest.param(1, marks=pytest.mark.soak), 4])
def test_a_controlled_chunk_keeps_all_of_this(topology, automata):
    """With tables of 1,024 states and 96 classes, for one grammar and for four: no further collective, no table crosses the mesh,
    and each chip looks the classes of its own part of the vocabulary up."""
    cfg, layout = dataclasses.replace(ONE_BILLION, layers=2), layouts(topology)[1]
    free = compile_program(topology, cfg, lambda: lower_rollout(cfg, layout, "decode_chunk", P, C))
    program = compile_program(
        topology, cfg, lambda: lower_rollout(cfg, layout, "decode_chunk", P, C, automata, 1024, 96)
    )
    check_caches_are_written_in_place(program)
    check_no_cache_is_held_twice(program)
    check_collectives_of_a_step(program)
    check_activity_is_tested_once_per_interval(program)
    check_logits_stay(program)
    assert len(collectives(steps_of(program))) == len(collectives(steps_of(free)))
    rows, vocab = P * G // FSDP, cfg.vocab_size
    whole = [i for i in steps_of(program) if any(same_dims(a, (rows, vocab)) for a in i.arrays)]
    assert not whole, f"got {[str(i) for i in whole]}, want no array over the whole vocabulary of a row"
    more = program.temp - free.temp
    print(f"temp: {free.temp / 1e6:.1f} MB, with control {program.temp / 1e6:.1f} MB")
    assert more < 4 * rows * vocab // TENSOR, f"temp: got {more / 1e6:.1f} MB more, want less than one chip's logits"


def test_memory_of_a_chunk(decode_chunk, eight_billion, topology):
    """Equal to `decode_memory` within 5 %."""
    layout = layouts(topology)[1]
    for program in (decode_chunk, eight_billion):
        memory = decode_memory.decode_memory(
            rollout_programs(program.cfg, layout), abstract_policy(program.cfg, layout).params, P, C
        )
        shapes = caches(program)
        assert memory.prompt + memory.suffix == sum(4 * program.cfg.layers * math.prod(d) for d in shapes.values())
        assert memory.total == pytest.approx(program.chip, rel=0.05), memory


def test_a_chunk_of_an_untied_model_of_8_billion(eight_billion):
    """The head is used where it lies. `qkv` is not: its [4096, 2, 6, 128] is transposed once per chunk."""
    check_collectives_of_a_step(eight_billion)
    check_logits_stay(eight_billion)
    check_no_cache_is_held_twice(eight_billion)
    check_weights_are_not_copied(eight_billion, but=("qkv",))


def test_a_chunk_of_2000_steps_is_one_program_with_one_body(sliding):
    """A sliding layer decodes from its window in place: the loop's state has each layer's keys and values at their own size."""
    check_caches_are_written_in_place(sliding, LONG_WINDOW)
    check_no_cache_is_held_twice(sliding, LONG_WINDOW)
    check_collectives_of_a_step(sliding)
    check_activity_is_tested_once_per_interval(sliding)
    loop = loops(sliding)[1]
    shapes = caches(sliding, LONG_WINDOW)
    for name, dims in shapes.items():
        got = sum(same_dims(a, dims) for a in loop.arrays)
        assert got == 2 * layers_with(sliding, name), f"{name}: got {got} arrays of {dims} in the loop's state"
    lines = (LONG, P * G // FSDP)
    assert sum(a.dims == lines for a in loop.arrays) == RECORDED
    written = [i for i in steps_of(sliding) if i.opcode == "dynamic-update-slice" and i.arrays[0].dims == lines]
    assert len(written) == RECORDED, "want each recorded line written in place"
    whole = 2 * 2 * math.prod(shapes["suffix"])
    assert sliding.temp < whole, (
        f"temp: got {sliding.temp / 1e6:.1f} MB, want less than one cache, {whole / 1e6:.1f} MB"
    )


def test_prefill_computes_keys_and_values_and_no_logits(prefill):
    """Two collectives per layer and the embedding's; only keys and values of the last layer. One layer's work at a time."""
    cfg = prefill.cfg
    moved = collectives(prefill.hlo.all)
    assert len(moved) == 2 * (cfg.layers - 1) + 1 and {i.kind for i in moved} == {"all-reduce"}
    assert {a for i in moved for a in i.results} == {ArrayShape("bf16", (P // FSDP, S, cfg.d_model))}
    vocab = {cfg.vocab_size // TENSOR, cfg.vocab_size}
    made = [i for i in prefill.hlo.all if i.opcode != "parameter" and any(vocab & set(a.dims) for a in i.arrays)]
    assert not made, f"arrays with a vocabulary in them: got {[str(i) for i in made]}, want none besides the embedding"
    scores = 4 * (P // FSDP) * (cfg.heads // TENSOR) * S * S
    gate_up = 4 * (P // FSDP) * S * 2 * cfg.d_mlp // TENSOR
    # XLA:GPU computes sine and cosine of the rotary angles once for all layers; a page for what is small.
    angles = 4 * (P // FSDP) * S * cfg.head_dim + 4096 if prefill.of == "gpu" else 0
    most = scores + gate_up + angles
    assert prefill.temp <= most, f"temp: got {prefill.temp / 1e6:.0f} MB, want at most {most / 1e6:.0f} MB"
    assert prefill.chip < V5E_BYTES


@pytest.mark.parametrize(
    "name",
    [
        ("compact", P, P // 2, C),
        ("expand", P // 2, P, C),
        ("insert_prefix", P, P // 2),
        ("broadcast_prefix", P // 2, P),
        ("join_suffix", P, C, P // 2),
    ],
    ids=str,
)
def test_rows_and_prompts_move_within_their_chip(topology, name):
    layout = layouts(topology)[1]
    program = compile_program(topology, SLIDING, lambda: lower_rollout(SLIDING, layout, *name))
    assert not collectives(program.hlo.all)
    if name[0] in ("insert_prefix", "join_suffix"):
        # The cache is donated. The rest of the output is a table of its arrays.
        assert program.output - program.alias < 1024


def test_growing_moves_nothing_between_chips_and_copies_each_cache_once(topology):
    cfg = dataclasses.replace(ONE_BILLION, layers=2)
    program = compile_program(
        topology, cfg, lambda: lower_rollout(cfg, layouts(topology)[1], "extend_suffix", P, C // 2, C)
    )
    assert not collectives(program.hlo.all)
    assert program.argument * 2 == pytest.approx(program.output, rel=0.01)
    assert program.temp < program.argument / 100, f"temp: got {program.temp / 1e6:.1f} MB, want next to nothing"


def test_experts_in_decode_move_rows_and_no_weights(experts_chunk):
    """At most the rows of all expert shards, gathered, with their experts' numbers and weights; the experts stay."""
    cfg, rows = experts_chunk.cfg, P * G // EXPERT_SPLIT["embed"] // EXPERT_SPLIT["data"]
    moved = collectives(steps_of(experts_chunk))
    assert {i.kind for i in moved} == {"all-gather", "all-reduce", "reduce-scatter"}
    assert max(a.size for i in moved for a in i.results) == rows * cfg.d_model
    gathered = {(a.dtype, a.size) for i in moved for a in i.results if i.kind == "all-gather"}
    choices = rows * cfg.experts_per_token
    assert gathered >= {("bf16", rows * cfg.d_model), ("f32", choices), ("s32", choices)}
    check_weights_are_not_copied(experts_chunk, EXPERT_SPLIT | {"embed": 1})


def test_mutant_chunk_that_rewrites_caches_and_moves_logits(topology, monkeypatch):
    """A write by mask instead of by slice; 1002 blocks of the vocabulary, which four shards cannot have whole."""

    def write_by_mask(x: jax.Array, new: jax.Array, slot: jax.Array, axis: int) -> jax.Array:
        return jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) == slot, new, x)

    monkeypatch.setattr(jax.lax, "dynamic_update_slice_in_dim", write_by_mask)
    monkeypatch.setattr(sample, "BLOCKS", 1002)
    cfg = dataclasses.replace(ONE_BILLION, layers=1)
    program = compile_program(topology, cfg, lambda: lower_rollout(cfg, layouts(topology)[1], "decode_chunk", P, C))
    with pytest.raises(AssertionError, match="written in place"):
        check_caches_are_written_in_place(program)
    with pytest.raises(AssertionError, match="residual stream"):
        check_logits_stay(program)


@only_gpu
def test_mutant_chunk_that_rounds_after_the_sum(topology, monkeypatch):
    """XLA:TPU rounds before all the same."""
    monkeypatch.setattr(linear, "rounded_dot", lambda *of: products.dot(*of[:-1]).astype(of[-1]))
    cfg = dataclasses.replace(ONE_BILLION, layers=1)
    program = compile_program(topology, cfg, lambda: lower_rollout(cfg, layouts(topology)[1], "decode_chunk", P, C))
    with pytest.raises(AssertionError, match="want bf16"):
        check_activations_are_sent_in_bfloat16(program)


@pytest.mark.parametrize("name", ["redraw", pytest.param("rescore", marks=pytest.mark.soak)])
def test_a_pass_over_known_tokens_holds_the_logits_of_one_slot(topology, name):
    """Rows of the longest prompt and response: no array over the vocabulary but one slot's, and the loop over slots moves what a
    decode step moves."""
    cfg, layout = dataclasses.replace(ONE_BILLION, layers=2), layouts(topology)[1]
    program = compile_program(topology, cfg, lambda: lower_rollout(cfg, layout, name, P, S + C))
    rows, vocab = P // FSDP, cfg.vocab_size // TENSOR
    wide = [a for i in program.hlo.all for a in i.arrays if vocab in a.dims and math.prod(a.dims) > rows * vocab]
    table = cfg.d_model * vocab
    assert all(math.prod(a.dims) in (table, 2 * table) for a in wide), f"got {wide}, want logits of one slot only"
    inside = collectives([i for i in program.hlo.all if program.hlo.loops.get(i.computation)])
    assert 0 < len(inside) <= STEP_CONSTANT, inside
    # Activations, and what a layer makes of all tokens at once.
    activations = 4 * rows * (S + C) * cfg.d_model
    print(
        f"temp: {program.temp / 1e6:.1f} MB, activations {activations / 1e6:.1f} MB, {len(inside)} collectives per slot"
    )
    # XLA:GPU holds the weights of plain attention, in bf16, beside its scores.
    weights = 2 * rows * cfg.heads // TENSOR * (S + C) ** 2 if program.of == "gpu" else 0
    assert program.temp < 4 * rows * C * vocab + weights, "want less than the logits of all slots"


def test_keys_of_a_trunk_are_held_once_for_all_its_branches(topology):
    """In the decode program of branches: a trunk has one cache of prompt and completion slots, and no array holds it per row."""
    cfg, layout = dataclasses.replace(ONE_BILLION, layers=2), layouts(topology)[1]
    rollout = RolloutConfig(prompts=P, samples=G, max_new_tokens=C, engine=EngineConfig(decode_chunk=STEPS))
    engine = Engine(EngineModel(cfg, layout, sample.Vocabulary(size=cfg.vocab_size, pad=0, eos=(1,))), rollout, S)
    sizes, programs = engine._for_branches(G)
    assert sizes.prompts[0] == P and sizes.rows_per_group == G
    params = abstract_policy(cfg, layout).params
    program = compile_program(topology, cfg, lambda: programs.lower(params, "decode_chunk", P, C))
    trunk = P // FSDP, cfg.kv_heads // TENSOR, S + C, cfg.head_dim
    steps = [i for name in loops(program)[1].calls for i in program.hlo.computations[name]]
    held = [a for i in loops(program)[1:] for a in i.arrays if same_dims(a, trunk)]
    assert len(held) == 2 * cfg.layers, (
        f"arrays of {trunk} in the loop's state: got {len(held)}, want keys and values of each layer"
    )
    per_row = [str(i) for i in steps if any(a.size >= math.prod(trunk) * G for a in i.arrays if S + C in a.dims)]
    assert not per_row, f"got {per_row}, want no array of trunk slots per row"
    check_collectives_of_a_step(program)
    check_no_cache_is_held_twice(program)

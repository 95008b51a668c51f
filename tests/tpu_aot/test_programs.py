"""What the TPU compiler must make of the three programs. Each check is a function, so that a mutant can show that it fails.

Bounds are on the optimized HLO of one chip of v5e:4x4; `docs/tpu.md` has the numbers as measured.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from jaxrl_llm.parallel.hlo import ArrayShape, Instruction, collectives
from programs import (
    EXPERT_MESH,
    MESH,
    ONE_BILLION,
    PARTS,
    ROWS,
    C,
    G,
    P,
    Program,
    S,
    compile_program,
    layouts,
    lower_generate,
    lower_publish,
)

from jaxrl_llm.model import params as model_params
from jaxrl_llm.model.distribution import CHUNK
from jaxrl_llm.model.params import ParamSpec
from jaxrl_llm.rollout import sample

pytestmark = [pytest.mark.tpu_aot, pytest.mark.timeout(1200)]

_, FSDP, TENSOR = MESH
# Collectives of a decode step that have nothing to do with layers: the embedding's rows; maximum and sum of the softmax; value
# and place of the winning block; that block's logits; log-prob and entropy together; whether all rows have ended.
STEP_CONSTANT = 8
V5E_BYTES = 16e9
VMEM = "S(1)"


def local(spec: ParamSpec, axes: dict[str, int]) -> tuple[int, ...]:
    """The shape of a parameter's shard, given the split of each logical axis."""
    return tuple(n // axes.get(a, 1) for n, a in zip(spec.shape, spec.axes, strict=True))


SPLIT = {"heads": TENSOR, "mlp": TENSOR, "vocab": TENSOR}


def matrices(program: Program, axes: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Shard shapes of one layer's matrices and of the embedding."""
    specs = model_params.unstack(model_params.specs(program.cfg), 1)
    leaves = {**specs["layers"][0], "embed": specs["embed"]}
    return {name: local(spec, axes) for name, spec in leaves.items() if len(spec.shape) > 1}


def same_dims(array: ArrayShape, dims: tuple[int, ...]) -> bool:
    """Equal up to order and dims of size 1."""
    return sorted(n for n in array.dims if n > 1) == sorted(n for n in dims if n > 1)


def caches(program: Program) -> dict[str, tuple[int, ...]]:
    """Shapes on a chip of the arrays that hold a layer's keys (and another its values)."""
    cfg = program.cfg
    heads = cfg.kv_heads // TENSOR
    slots = {"suffix": (P * G, C), "prompt": (P, S)}
    if any(cfg.sliding):
        slots |= {"suffix ring": (P * G, cfg.window), "prompt window": (P, cfg.window)}
    return {name: (rows // FSDP, heads, size, cfg.head_dim) for name, (rows, size) in slots.items()}


def layers_with(program: Program, cache: str) -> int:
    """Layers that keep a cache of that name."""
    sliding = sum(program.cfg.sliding)
    return sliding if "ring" in cache or "window" in cache else program.cfg.layers - sliding


def decode_loop(program: Program) -> tuple[str, ...]:
    """Condition and body of the one loop."""
    loops = [i for i in program.hlo.all if i.opcode == "while" and program.hlo.loops.get(i.computation) == 0]
    assert len(loops) == 1, f"loops in generate: got {len(loops)}, want 1"
    return loops[0].calls


def check_caches_are_written_in_place(program: Program) -> None:
    """In the loop a cache-shaped array comes from the loop's state, a write into it, or a read ahead into on-chip memory."""
    passes = {"parameter", "get-tuple-element", "tuple", "bitcast", "dynamic-update-slice", "slice-start", "slice-done"}

    def allowed(i: Instruction) -> bool:
        if i.opcode == "fusion":
            return program.hlo.root(i.calls[0]).opcode == "dynamic-update-slice"
        return i.opcode in passes or (i.opcode in ("copy-start", "copy-done", "custom-call") and VMEM in i.line)

    steps = [i for name in decode_loop(program) for i in program.hlo.computations[name]]
    for name, dims in caches(program).items():
        of_cache = [i for i in steps if any(same_dims(a, dims) for a in i.arrays)]
        bad = [str(i) for i in of_cache if not allowed(i)]
        assert not bad, f"{name} cache {dims}: got {bad}, want it only read, and written in place"
    writes = [i for i in steps if i.opcode == "dynamic-update-slice" or "dynamic_update_slice" in i.line]
    for name, dims in caches(program).items():
        got = sum(any(same_dims(a, dims) for a in i.arrays) for i in writes)
        want = 2 * layers_with(program, name) if "suffix" in name else 0
        assert got == want, f"writes into the {name} a step: got {got}, want {want}"


def check_collectives_of_a_step(program: Program) -> None:
    got = collectives(program.hlo.inside(*decode_loop(program)))
    want = 2 * program.cfg.layers + STEP_CONSTANT
    assert len(got) <= want, f"collectives a decode step: got {len(got)}, want at most {want}: {[str(i) for i in got]}"
    kinds = {i.kind for i in got}
    assert kinds <= {"all-reduce", "all-gather"}, f"kinds a decode step: got {kinds}, want all-reduce and all-gather"


def check_logits_stay(program: Program) -> None:
    """Nothing larger than the residual stream crosses the mesh in a step; a shard of the logits is 16 times as large."""
    most = P * G // FSDP * program.cfg.d_model
    for i in collectives(program.hlo.inside(*decode_loop(program))):
        size = max(a.size for a in i.arrays)
        assert size <= most, f"{i}: got {size} elements, want at most {most}, those of the residual stream"


def check_weights_are_not_copied(program: Program, split: dict[str, int] = SPLIT) -> None:
    shapes = matrices(program, split)
    for i in program.hlo.all:
        if i.opcode in ("copy", "transpose") and i.computation not in program.hlo.fused:
            bad = [name for name, dims in shapes.items() if same_dims(i.arrays[0], dims)]
            assert not bad, f"{i}: got a copy of {bad}, want weights used where they lie"


def test_generate_writes_its_caches_in_place(generate):
    check_caches_are_written_in_place(generate)


def test_generate_has_two_collectives_a_layer(generate):
    check_collectives_of_a_step(generate)


def test_generate_keeps_the_logits_where_they_are(generate):
    check_logits_stay(generate)


def test_generate_uses_the_weights_where_they_lie(generate):
    check_weights_are_not_copied(generate)


def test_memory_of_generate(generate):
    """Caches once, and what one layer of prefill works on: its f32 scores, and its f32 gate and up."""
    cfg = generate.cfg
    kept = 2 * cfg.layers * sum(2 * math.prod(dims) for dims in caches(generate).values())
    scores = 4 * (P // FSDP) * (cfg.heads // TENSOR) * S * S
    gate_up = 4 * (P // FSDP) * S * 2 * cfg.d_mlp // TENSOR
    most = kept + scores + gate_up
    assert generate.temp <= most, f"temp: got {generate.temp / 1e6:.0f} MB, want at most {most / 1e6:.0f} MB"
    assert generate.chip < V5E_BYTES, f"a chip: got {generate.chip / 1e9:.1f} GB, want below {V5E_BYTES / 1e9:.0f} GB"


def test_a_sliding_layer_decodes_from_its_window_in_place(sliding):
    """The loop's state holds keys and values of each layer in their own size, and no other array like them."""
    check_caches_are_written_in_place(sliding)
    check_collectives_of_a_step(sliding)
    (loop,) = (i for i in sliding.hlo.all if i.opcode == "while" and sliding.hlo.loops.get(i.computation) == 0)
    for name, dims in caches(sliding).items():
        got = sum(same_dims(a, dims) for a in loop.arrays)
        assert got == 2 * layers_with(sliding, name), f"{name}: got {got} arrays of {dims} in the loop's state"
    shapes = caches(sliding)
    whole = sliding.cfg.layers * sum(2 * 2 * math.prod(shapes[name]) for name in ("suffix", "prompt"))
    assert sliding.temp < whole, (
        f"temp: got {sliding.temp / 1e6:.1f} MB, want less than whole caches, {whole / 1e6:.1f} MB"
    )


EXPERT_SPLIT = dict(zip(("data", "embed", "mlp", "expert"), EXPERT_MESH, strict=True))
EXPERT_SPLIT |= {"heads": EXPERT_SPLIT["mlp"], "vocab": EXPERT_SPLIT["mlp"]}


def test_experts_in_decode_move_rows_and_no_weights(experts_generate):
    """At most the rows of all expert shards, gathered, with their experts' numbers and weights; the experts stay."""
    cfg, rows = experts_generate.cfg, P * G // EXPERT_SPLIT["embed"] // EXPERT_SPLIT["data"]
    moved = collectives(experts_generate.hlo.inside(*decode_loop(experts_generate)))
    assert {i.kind for i in moved} == {"all-gather", "all-reduce", "reduce-scatter"}
    assert max(a.size for i in moved for a in i.arrays) == rows * cfg.d_model
    gathered = {(a.dtype, a.size) for i in moved for a in i.arrays if i.kind == "all-gather"}
    choices = rows * cfg.experts_per_token
    assert gathered >= {("bf16", rows * cfg.d_model), ("f32", choices), ("s32", choices)}
    check_weights_are_not_copied(experts_generate, EXPERT_SPLIT | {"embed": 1})


def test_experts_in_training_gather_bfloat16_and_reduce_float32(experts_gradient):
    moved = collectives(experts_gradient.hlo.all)
    assert {i.kind for i in moved} <= {"all-gather", "all-reduce", "reduce-scatter", "collective-permute"}
    shapes = matrices(experts_gradient, EXPERT_SPLIT)
    for name in ("gate_up", "down"):
        shard = math.prod(shapes[name])
        whole = shard * EXPERT_SPLIT["embed"]
        gathers = {a.dtype for i in moved for a in i.arrays if i.kind == "all-gather" and a.size == whole}
        assert gathers == {"bf16"}, f"{name} gathered: got {gathers}, want bf16"
        sums = {a.dtype for i in moved for a in i.arrays if i.kind == "reduce-scatter" and a.size == shard}
        assert sums == {"f32"}, f"gradient of {name} scattered: got {sums}, want f32"


def check_publish_writes_into_the_old_policy(program: Program) -> None:
    assert program.alias >= 0.99 * program.output, (
        f"alias: got {program.alias / 1e6:.1f} MB, want the output, {program.output / 1e6:.1f} MB: is `old` donated and kept?"
    )


def check_publish_gathers_each_matrix_once(program: Program) -> None:
    got = collectives(program.hlo.all)
    kinds = {(i.kind, i.arrays[0].dtype) for i in got}
    assert kinds == {("all-gather", "bf16")}, (
        f"collectives of publish: got {kinds}, want all-gather of bf16 and nothing else"
    )
    want = 4 * program.cfg.layers + 1
    assert len(got) == want, f"collectives of publish: got {len(got)}, want {want}, one a matrix"
    moved = sum(i.arrays[0].bytes for i in got)
    assert moved <= program.output, (
        f"gathered: got {moved / 1e6:.0f} MB, want at most the policy's {program.output / 1e6:.0f}"
    )


def test_publish_writes_into_the_old_policy(publish):
    check_publish_writes_into_the_old_policy(publish)


def test_publish_gathers_each_matrix_once_in_bfloat16(publish):
    check_publish_gathers_each_matrix_once(publish)


def test_memory_of_publish(publish):
    """The compiler gathers into memory of its own and then copies into `old`, with donation and without: a second policy.

    On top of that, masters already cast but not yet gathered: at most the largest, all its layers.
    """
    split = SPLIT | {"embed": 2}  # Of the two meshes the one with larger shards.
    cast = max(2 * publish.cfg.layers * math.prod(d) for n, d in matrices(publish, split).items() if n != "embed")
    most = publish.output + cast
    assert publish.temp <= most, f"temp: got {publish.temp / 1e6:.0f} MB, want at most {most / 1e6:.0f} MB"


def check_gathers_are_bfloat16(program: Program) -> None:
    large = [i for i in collectives(program.hlo.all) if i.kind == "all-gather" and i.arrays[0].size >= 1e6 // 2]
    wide = [str(i) for i in large if i.arrays[0].dtype != "bf16"]
    assert large and not wide, f"weights gathered: got {wide or 'none'}, want bf16"


def check_head_stays_out_of_the_chunk_loop(program: Program) -> None:
    """Loops: micro-batches, and in each of them layers or chunks of the logits."""
    vocab = program.cfg.vocab_size // TENSOR
    for i in collectives(program.hlo.all):
        depth = program.hlo.loops.get(i.computation, 0)
        of_head = [a for a in i.arrays if vocab in a.dims]
        assert depth < 2 or not of_head, (
            f"{i}: got it in {depth} loops, want the head gathered and reduced once a micro-batch"
        )


def test_update_writes_into_the_old_state(update):
    specs = jax.tree.leaves(model_params.specs(update.cfg), is_leaf=model_params.is_spec)
    state = 3 * sum(4 * math.prod(local(s, SPLIT | {"embed": FSDP})) for s in specs)
    assert update.alias >= 0.999 * state, (
        f"alias: got {update.alias / 1e6:.1f} MB, want parameters and moments, {state / 1e6:.1f} MB"
    )


def test_update_fits_a_chip(update):
    assert update.chip < V5E_BYTES, f"a chip: got {update.chip / 1e9:.1f} GB, want below {V5E_BYTES / 1e9:.0f} GB"


def test_update_never_holds_the_logits_of_all_slots(update):
    """The largest arrays with a vocabulary in them are one chunk of logits, and the head."""
    cfg = update.cfg
    vocab = cfg.vocab_size // TENSOR
    most = max(ROWS // PARTS // FSDP * CHUNK * vocab, vocab * cfg.d_model)
    arrays = {a for i in update.hlo.all for a in i.arrays if {vocab, cfg.vocab_size} & set(a.dims)}
    largest = max(arrays, key=lambda a: a.size)
    assert largest.size <= most, f"largest array with a vocabulary: got {largest}, want at most {most} elements"


def test_update_gathers_weights_in_bfloat16(update):
    check_gathers_are_bfloat16(update)


def test_update_gathers_the_head_once_a_micro_batch(update):
    check_head_stays_out_of_the_chunk_loop(update)


def test_update_reduces_gradients_in_float32(update):
    """Each matrix's gradient crosses `fsdp` as f32: reduced whole, or scattered, or passed on shard by shard."""
    moved = {a.size for i in collectives(update.hlo.all) for a in i.arrays if a.dtype == "f32"}
    for name, dims in matrices(update, SPLIT | {"embed": FSDP}).items():
        shard = math.prod(dims)
        assert moved & {shard, shard * FSDP}, (
            f"gradient of {name}: got no f32 collective of {shard} or {shard * FSDP} elements"
        )


def test_mutant_publish_that_drops_the_old_policy(topology, monkeypatch):
    """Without keep_unused jit removes the argument, and the alias with it."""
    whole = jax.jit
    monkeypatch.setattr(jax, "jit", lambda f, keep_unused=False, **options: whole(f, **options))
    cfg = dataclasses.replace(ONE_BILLION, layers=1)
    program = compile_program(cfg, lambda: lower_publish(cfg, *layouts(topology)))
    with pytest.raises(AssertionError, match=r"alias: got 0\.0 MB"):
        check_publish_writes_into_the_old_policy(program)


def test_mutant_generate_that_rewrites_caches_and_moves_logits(topology, monkeypatch):
    """A write by mask instead of by slice; 1002 blocks of the vocabulary, which four shards cannot have whole."""

    def write_by_mask(array: jax.Array, update: jax.Array, start: tuple) -> jax.Array:
        axis = next(i for i, (a, b) in enumerate(zip(array.shape, update.shape, strict=True)) if a != b)
        return jnp.where(jax.lax.broadcasted_iota(jnp.int32, array.shape, axis) == start[axis], update, array)

    monkeypatch.setattr(jax.lax, "dynamic_update_slice", write_by_mask)
    monkeypatch.setattr(sample, "BLOCKS", 1002)
    cfg = dataclasses.replace(ONE_BILLION, layers=1)
    program = compile_program(cfg, lambda: lower_generate(cfg, layouts(topology)[1]))
    with pytest.raises(AssertionError, match="written in place"):
        check_caches_are_written_in_place(program)
    with pytest.raises(AssertionError, match="residual stream"):
        check_logits_stay(program)

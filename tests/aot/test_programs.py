"""Bounds on publish and update as compiled. Each check is a function, so that a mutant test can show that it fails.

Bounds apply to the optimized HLO of one chip of 16; `docs/compilers.md` has the measured numbers.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from programs import (
    EXPERT_MESH,
    EXPERT_SPLIT,
    EXPERTS,
    FSDP,
    ONE_BILLION,
    PARTS,
    ROWS,
    SLOTS,
    SPLIT,
    TENSOR,
    V5E_BYTES,
    P,
    Program,
    S,
    compile_program,
    layouts,
    local,
    lower_experts,
    lower_publish,
    lower_rollout,
    lower_update,
    matrices,
    only_gpu,
    only_tpu,
    policy_matrices,
    same_dims,
)

from jaxrl_llm.distribution.head import ACCELERATOR, Head
from jaxrl_llm.model import grouped_blocks, grouped_matmul, linear, products, transformer
from jaxrl_llm.model import params as model_params
from jaxrl_llm.parallel.mesh import make_mesh
from jaxrl_llm.perf.hlo import collectives

pytestmark = pytest.mark.timeout(1200)


def test_experts_in_training_gather_bfloat16_and_reduce_float32(experts_gradient):
    moved = collectives(experts_gradient.hlo.all)
    assert {i.kind for i in moved} <= {"all-gather", "all-reduce", "reduce-scatter", "collective-permute"}
    shapes = matrices(experts_gradient.cfg, EXPERT_SPLIT)
    for name in ("gate_up", "down"):
        shard = math.prod(shapes[name])
        whole = shard * EXPERT_SPLIT["embed"]
        gathers = {a.dtype for i in moved for a in i.results if i.kind == "all-gather" and a.size == whole}
        assert gathers == {"bf16"}, f"{name} gathered: got {gathers}, want bf16"
        sums = {a.dtype for i in moved for a in i.results if i.kind == "reduce-scatter" and a.size == shard}
        assert sums == {"f32"}, f"gradient of {name} scattered: got {sums}, want f32"


def check_experts_of_gpus_hold_rows_and_no_dense_product(program: Program) -> None:
    """Each expert has some of the rows. A dense product has every row, or a mask of it, for every expert.

    Held at once, at most: rows of the model's width in f32 and bf16, gate and up in both, what the mesh gathers and sums, the
    weights in bf16 with their gradient in f32, and the blocks of one round.
    """
    cfg, split = program.cfg, EXPERT_SPLIT
    gathered = ROWS // PARTS * SLOTS // split["data"] // split["embed"]
    rows, width = gathered * cfg.experts_per_token, cfg.d_mlp // split["mlp"]
    weights = sum(math.prod(matrices(cfg, split | {"embed": 1})[name]) for name in ("gate_up", "down"))
    most = 6 * ((rows + gathered) * cfg.d_model + 2 * rows * width + weights) + grouped_blocks.BYTES_PER_ROUND
    assert program.temp <= most, f"temp: got {program.temp / 1e6:.0f} MB, want at most {most / 1e6:.0f} MB"
    in_memory = [i for i in program.hlo.all if i.computation not in program.hlo.fused]
    largest = max((a for i in in_memory for a in i.arrays), key=lambda a: a.size)
    assert largest.size <= rows * cfg.d_model, f"got {largest}, want at most the rows, {rows} x {cfg.d_model}"


@only_gpu
def test_experts_of_gpus_hold_rows_and_no_dense_product(topology, experts_gradient):
    check_experts_of_gpus_hold_rows_and_no_dense_product(experts_gradient)


@only_gpu
def test_layers_of_a_prefill_share_the_memory_of_experts(topology):
    """Layers are unrolled, with as many rows as in the gradient. Zeros that depend on nothing would be made for all at once."""
    cfg, layout = dataclasses.replace(EXPERTS, layers=4), layouts(topology, EXPERT_MESH)[1]
    program = compile_program(topology, cfg, lambda: lower_rollout(cfg, layout, "prefill", P, S))
    print(f"temp: {program.temp / 1e6:.0f} MB")
    check_experts_of_gpus_hold_rows_and_no_dense_product(program)


@only_gpu
def test_mutant_experts_with_ragged_products(topology, monkeypatch):
    for name in ("contract", "to_rows", "to_weights"):
        monkeypatch.setattr(grouped_blocks, name, getattr(grouped_matmul, f"_{name}"))
    layout = layouts(topology, EXPERT_MESH)[0]
    dense = compile_program(topology, EXPERTS, lambda: lower_experts(EXPERTS, layout))
    with pytest.raises(AssertionError, match="temp"):
        check_experts_of_gpus_hold_rows_and_no_dense_product(dense)
    with pytest.raises(AssertionError, match="want at most the rows"):
        check_experts_of_gpus_hold_rows_and_no_dense_product(dataclasses.replace(dense, temp=0))


def check_publish_writes_into_the_old_policy(program: Program) -> None:
    assert program.alias >= 0.99 * program.output, (
        f"alias: got {program.alias / 1e6:.1f} MB, want the output, {program.output / 1e6:.1f} MB: is `old` donated and kept?"
    )


def check_publish_gathers_each_matrix_once(program: Program) -> None:
    got = collectives(program.hlo.all)
    kinds = {(i.kind, a.dtype) for i in got for a in i.results}
    assert kinds == {("all-gather", "bf16")}, f"collectives of publish: got {kinds}, want only all-gather of bf16"
    names = policy_matrices(program.cfg, {})
    want = (len(names) - 1) * program.cfg.layers + 1
    # XLA:GPU combines them.
    gathered = [a for i in got for a in i.results]
    assert len(gathered) == want, f"arrays gathered by publish: got {len(gathered)}, want {want}, one per matrix"
    moved = sum(a.bytes for a in gathered)
    assert moved <= program.output, (
        f"gathered: got {moved / 1e6:.0f} MB, want at most the policy's {program.output / 1e6:.0f}"
    )


def test_publish_writes_into_the_old_policy(publish):
    check_publish_writes_into_the_old_policy(publish)


def test_publish_gathers_each_matrix_once_in_bfloat16(publish):
    check_publish_gathers_each_matrix_once(publish)


def test_memory_of_publish(publish):
    """The compiler gathers into temporary memory and then copies into `old`, with or without donation: a second policy.

    In addition, master parameters already cast but not yet gathered: at most all layers of the largest.
    """
    split = SPLIT | {"embed": 2}  # The mesh with larger shards.
    cast = max(2 * publish.cfg.layers * math.prod(d) for n, d in matrices(publish.cfg, split).items() if n != "embed")
    most = publish.output + cast
    assert publish.temp <= most, f"temp: got {publish.temp / 1e6:.0f} MB, want at most {most / 1e6:.0f} MB"


def check_gathers_are_bfloat16(program: Program) -> None:
    large = [a for i in collectives(program.hlo.all) if i.kind == "all-gather" for a in i.results if a.size >= 1e6 // 2]
    wide = [str(a) for a in large if a.dtype != "bf16"]
    assert large and not wide, f"weights gathered: got {wide or 'none'}, want bf16"


def check_head_stays_out_of_the_chunk_loop(program: Program) -> None:
    """Loops: micro-batches, and inside them layers or chunks of the logits."""
    vocab = program.cfg.vocab_size // TENSOR
    for i in collectives(program.hlo.all):
        depth = program.hlo.loops.get(i.computation, 0)
        head_arrays = [a for a in i.results if vocab in a.dims]
        assert depth < 2 or not head_arrays, (
            f"{i}: got it in {depth} loops, want the head gathered and reduced once per micro-batch"
        )


def check_activations_are_sent_in_bfloat16(program: Program) -> None:
    """Those of a micro-batch over `tensor`: the embedding's rows, the sums of a layer forward and backward, and the head's
    cotangent."""
    rows, width = ROWS // PARTS // FSDP, program.cfg.d_model
    shapes = (rows, SLOTS, width), (rows * SLOTS, width), (rows * FSDP, SLOTS, width // FSDP)
    moved = [a for i in collectives(program.hlo.all) for a in i.results if any(same_dims(a, s) for s in shapes)]
    wide = [str(a) for a in moved if a.dtype != "bf16"]
    assert len(moved) >= 6 and not wide, f"activations sent: got {wide or moved}, want bf16"


def test_update_sends_activations_in_bfloat16(update):
    check_activations_are_sent_in_bfloat16(update)


@only_gpu
@pytest.mark.parametrize("mutant", ["products", "embedding", "head"])
def test_mutant_update_that_rounds_after_the_sum(topology, monkeypatch, mutant):
    """XLA:TPU rounds before all the same."""
    if mutant == "products":
        monkeypatch.setattr(linear, "rounded_dot", lambda *of: products.dot(*of[:-1]).astype(of[-1]))
    elif mutant == "embedding":
        look_up = lambda table, index, dtype, layout: jnp.take(table, index, axis=0).astype(dtype)  # noqa: E731
        monkeypatch.setattr(transformer, "look_up", look_up)
    else:
        added = lambda self, dh, dtype: jnp.sum(dh, axis=1).astype(dtype)  # noqa: E731
        monkeypatch.setattr(Head, "over_shards", added)
    cfg = dataclasses.replace(ONE_BILLION, layers=2)
    program = compile_program(topology, cfg, lambda: lower_update(cfg, layouts(topology)[0]))
    with pytest.raises(AssertionError, match="want bf16"):
        check_activations_are_sent_in_bfloat16(program)


def test_update_writes_into_the_old_state(update):
    specs = jax.tree.leaves(model_params.specs(update.cfg), is_leaf=model_params.is_spec)
    state = 3 * sum(4 * math.prod(local(s, SPLIT | {"embed": FSDP})) for s in specs)
    assert update.alias >= 0.999 * state, (
        f"alias: got {update.alias / 1e6:.1f} MB, want parameters and moments, {state / 1e6:.1f} MB"
    )


def test_update_fits_on_a_chip(update):
    assert update.chip < V5E_BYTES, (
        f"bytes per chip: got {update.chip / 1e9:.1f} GB, want below {V5E_BYTES / 1e9:.0f} GB"
    )


def test_update_never_holds_the_logits_of_all_slots(update):
    """The largest arrays with a vocabulary dimension are one tile of logits, and the head."""
    cfg = update.cfg
    vocab = cfg.vocab_size // TENSOR
    most = max(ACCELERATOR.logits, vocab * cfg.d_model)
    arrays = {a for i in update.hlo.all for a in i.arrays if {vocab, cfg.vocab_size} & set(a.dims)}
    largest = max(arrays, key=lambda a: a.size)
    assert largest.size <= most, (
        f"largest array with a vocabulary dimension: got {largest}, want at most {most} elements"
    )


def test_update_gathers_weights_in_bfloat16(update):
    check_gathers_are_bfloat16(update)


def test_update_gathers_the_head_once_per_micro_batch(update):
    check_head_stays_out_of_the_chunk_loop(update)


def test_update_reduces_gradients_in_float32(update):
    """Each matrix's gradient is reduced over `fsdp` in f32: whole, scattered, or passed on shard by shard."""
    moved = {a.size for i in collectives(update.hlo.all) for a in i.results if a.dtype == "f32"}
    for name, dims in matrices(update.cfg, SPLIT | {"embed": FSDP}).items():
        shard = math.prod(dims)
        assert moved & {shard, shard * FSDP}, (
            f"gradient of {name}: got no f32 collective of {shard} or {shard * FSDP} elements"
        )


def test_mutant_publish_that_drops_the_old_policy(topology, monkeypatch):
    """Without keep_unused jit removes the argument, and the alias with it."""
    whole = jax.jit
    monkeypatch.setattr(jax, "jit", lambda f, keep_unused=False, **options: whole(f, **options))
    cfg = dataclasses.replace(ONE_BILLION, layers=1)
    program = compile_program(topology, cfg, lambda: lower_publish(cfg, *layouts(topology)))
    with pytest.raises(AssertionError, match=r"alias: got 0\.0 MB"):
        check_publish_writes_into_the_old_policy(program)


@only_tpu
def test_a_mesh_axis_may_be_part_of_a_topology_axis(topology):
    """On several kinds of chip: 2 of v6e's 4, and 8 out of 4 x 4 x 4."""
    for name, sizes in (("v6e:4x4", (2, 2, 4)), ("v5p:4x4x4", (1, 4, 2, 8))):
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
        assert make_mesh(*sizes, devices=devices).devices.shape == (*sizes, 1)[:4]

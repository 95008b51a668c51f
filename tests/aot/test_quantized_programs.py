"""An int8 policy under the TPU compiler: 8-bit products, weights moved as 8 bits, no additional collectives."""

import dataclasses
import math

import pytest
from programs import (
    FSDP,
    ONE_BILLION,
    SPLIT,
    C,
    G,
    P,
    Program,
    compile_program,
    layouts,
    lower_publish,
    lower_rollout,
    policy_matrices,
    same_dims,
)  # fmt: skip
from test_decode_programs import check_collectives_of_a_step, check_weights_are_not_copied, steps_of
from test_programs import check_publish_writes_into_the_old_policy

from jaxrl_llm.model import quantized_weights
from jaxrl_llm.perf.hlo import collectives

pytestmark = pytest.mark.timeout(1200)
CFG = dataclasses.replace(ONE_BILLION, layers=1)


@pytest.fixture(scope="module")
def int8_chunk(topology, compile_once) -> Program:
    return compile_once(
        "int8-chunk", CFG, lambda: lower_rollout(CFG, layouts(topology)[1], "decode_chunk", P, C, weights="int8")
    )


@pytest.fixture(scope="module")
def int8_publish(topology) -> Program:
    return compile_program(topology, CFG, lambda: lower_publish(CFG, *layouts(topology), "int8"))


def check_products_are_of_int8(program: Program) -> None:
    """Five matrices per layer and the head, each multiplied once per step into s32; none is wider than 8 bits in the loop."""
    steps = steps_of(program)
    products = [i for i in steps if i.opcode in ("convolution", "dot") and i.arrays[0].dtype == "s32"]
    # XLA:GPU multiplies gate and up, which read the same activations, at once.
    of_layer = {"tpu": 5, "gpu": 4}[program.of]
    assert len(products) == of_layer * program.cfg.layers + 1, f"int8 products per step: got {len(products)}"
    for name, dims in policy_matrices(program.cfg, SPLIT).items():
        wide = [str(i) for i in steps if any(same_dims(a, dims) and a.dtype in ("bf16", "f32") for a in i.arrays)]
        assert not wide, f"{name} {dims}: got {wide}, want it in 8 bits only"


def test_decode_multiplies_in_int8(int8_chunk):
    check_products_are_of_int8(int8_chunk)
    check_weights_are_not_copied(int8_chunk)


def test_scales_of_activations_cost_no_collective(int8_chunk):
    check_collectives_of_a_step(int8_chunk)
    moved = collectives(steps_of(int8_chunk))
    # The embedding, and `out` and `down` of each layer, whose groups a GPU adds in f32, also over the mesh.
    shape = P * G // FSDP, CFG.d_model
    sums = sorted(a.dtype for i in moved if i.kind == "all-reduce" for a in i.results if same_dims(a, shape))
    of_layers = {"tpu": "bf16", "gpu": "f32"}[int8_chunk.of]
    assert sums == ["bf16"] + [of_layers] * 2 * CFG.layers, sums


def test_mutant_with_one_scale_per_row_needs_more_collectives(topology, monkeypatch):
    """The maximum of a row that is split over the mesh: one more all-reduce for `out` and for `down`."""
    monkeypatch.setattr(quantized_weights.math, "gcd", lambda *_: 1)
    program = compile_program(
        topology, CFG, lambda: lower_rollout(CFG, layouts(topology)[1], "decode_chunk", P, C, weights="int8")
    )
    with pytest.raises(AssertionError, match="collectives per decode step"):
        check_collectives_of_a_step(program)


def test_publish_moves_8_bits_into_the_old_policy(int8_publish):
    check_publish_writes_into_the_old_policy(int8_publish)
    moved = collectives(int8_publish.hlo.all)
    gathered = [a for i in moved if i.kind == "all-gather" for a in i.results if a.dtype == "s8"]
    assert len(gathered) == 5 * CFG.layers + 1, f"matrices gathered as s8: got {len(gathered)}"
    scales = [a for i in moved for a in i.results if a.dtype != "s8"]
    assert {i.kind for i in moved} <= {"all-gather", "all-reduce"}
    share = sum(a.bytes for a in scales) / sum(a.bytes for a in gathered)
    assert share < 0.02, f"bytes of scales to bytes of matrices: got {share:.3f}, want below 0.02"
    per_chip = sum(math.prod(dims) for dims in policy_matrices(int8_publish.cfg, SPLIT).values())
    assert int8_publish.output < 1.05 * per_chip, "the policy: want one byte per parameter"

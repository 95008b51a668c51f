"""The parser of optimized HLO, on a module written by hand."""

import pytest

from jaxrl_llm.perf.hlo import ArrayShape, HloModule, collectives

TEXT = """HloModule jit_f, is_scheduled=true

%body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %sum = bf16[8,128]{1,0:T(8,128)(2,1)} all-reduce-start(%x), to_apply=%add
  ROOT %t = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%i, %sum)
}

%condition (p.1: (s32[], bf16[8,128])) -> pred[] {
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%fused (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  ROOT %twice = f32[4]{0} add(%a, %a)
}

ENTRY %main (x.1: bf16[8,128]) -> bf16[8,128] {
  %x.1 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %f = f32[4]{0} fusion(%c), kind=kLoop, calls=%fused
  %loop = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) while(%start), condition=%condition, body=%body
  ROOT %out = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""


def test_computations_loops_and_fusions():
    module = HloModule(TEXT)
    assert module.entry == "main"
    assert module.loops == {"main": 0, "fused": 0, "condition": 1, "body": 1, "add": 1}
    assert module.fused == {"fused"} and module.root("fused").name == "twice"
    assert [i.name for i in module.inside("body")] == ["p", "x", "sum", "t"]


def test_collectives_and_the_bytes_of_their_results():
    (found,) = collectives(HloModule(TEXT).all)
    assert (found.kind, found.computation) == ("all-reduce", "body")
    assert found.arrays == (ArrayShape("bf16", (8, 128)),) and found.arrays[0].bytes == 2 * 8 * 128
    assert str(found) == "all-reduce-start bf16[8,128] in body"


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("(f32[4]{0}, f32[16]{0}) all-gather-start(%a)", ["f32[16]"]),
        ("((f32[4]{0}, s8[2]{0}), (f32[16]{0}, s8[8]{0})) all-gather-start(%a, %b)", ["f32[16]", "s8[8]"]),
        ("f32[4]{0} all-reduce-start(%a)", ["f32[4]"]),
        ("(f32[4]{0}, bf16[2]{0}) all-reduce-start(%a, %b)", ["f32[4]", "bf16[2]"]),
        ("((f32[4]{0}), f32[4]{0}) all-reduce-start(%a)", ["f32[4]"]),
        ("((f32[4]{0}, f32[]), (f32[4]{0}, f32[])) all-reduce-start(%a, %b)", ["f32[4]", "f32[]"]),
        ("(f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%a)", ["f32[4]"]),
        ("(f32[4]{0}, s32[4]{0}) all-gather(%a, %b)", ["f32[4]", "s32[4]"]),
    ],
)
def test_what_a_collective_produces(line, want):
    """In the forms of XLA:TPU, of XLA:GPU in jax 0.10, and in jax 0.11."""
    text = f"HloModule m\n\nENTRY %main (a: f32[4]) -> f32[4] {{\n  ROOT %r = {line}, channel_id=1\n}}\n"
    (found,) = collectives(HloModule(text).all)
    assert [str(a) for a in found.results] == want

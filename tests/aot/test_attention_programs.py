"""Attention over long rows as compiled for GPUs, where `auto` is `blocks`."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from programs import ONE_BILLION, Program, array, compile_program, layouts, only_gpu

from jaxrl_llm.model.attention.plain import PackedRows
from jaxrl_llm.model.attention.selection import SCORES_ON_GPU, attention_for, choose_attention

pytestmark = pytest.mark.timeout(1200)
T, K, G, H = 8192, 2, 4, 128


def gradient(topology, name: str) -> Program:
    """Attention of one row on one GPU, with its gradient."""
    cfg, layout = dataclasses.replace(ONE_BILLION, head_dim=H), layouts(topology, (1, 1, 1))[0]
    assert choose_attention("auto", T, cfg, layout) == "blocks"
    q, k = (array(layout, (1, T, *heads, H), jnp.bfloat16) for heads in ((K, G), (K,)))
    until = array(layout, (1, T), jnp.int32)

    def of(q, k, v, until, given):
        attend = attention_for(name, PackedRows(until, until), cfg, layout)(T)
        out, pullback = jax.vjp(attend, q, k, v)
        return out, pullback(given)

    return compile_program(topology, cfg, lambda: jax.jit(of).lower(q, k, k, until, q))


def check_no_pairs_of_all_slots(program: Program) -> None:
    wide = [str(i) for i in program.hlo.all if any(list(a.dims).count(T) > 1 for a in i.arrays)]
    assert not wide, f"got {wide[:3]}, want no array over pairs of all slots"


@only_gpu
def test_attention_over_8k_slots_holds_neither_scores_nor_a_mask_of_all_pairs(topology):
    """A plain mask of one row has 67 MB, its scores 2.1 GB. Held are scores and weights of the pairs at a time."""
    program = gradient(topology, "blocks")
    check_no_pairs_of_all_slots(program)
    print(f"temp: {program.temp / 1e6:.0f} MB")
    assert program.temp < (4 + 2) * 2 * SCORES_ON_GPU + 6 * 4 * T * K * G * H


@only_gpu
def test_mutant_plain_attention_holds_them(topology):
    with pytest.raises(AssertionError, match="pairs of all slots"):
        check_no_pairs_of_all_slots(gradient(topology, "plain"))

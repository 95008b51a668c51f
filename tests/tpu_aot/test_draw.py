"""What the TPU compiler makes of one draw from logits whose vocabulary is split over 4 and over 16 chips."""

import jax
import jax.numpy as jnp
import pytest
from programs import ONE_BILLION, Program, array, compile_program, layouts

from jaxrl_llm.perf.hlo import ArrayShape, collectives
from jaxrl_llm.rollout.sample import Controls, Decoding, Vocabulary, sample_token

pytestmark = [pytest.mark.tpu_aot, pytest.mark.timeout(600)]

ROWS, VOCAB, SUPPORT = 64, 32768, 128


def lower_draw(topology, sizes: tuple[int, ...], max_kept_tokens: int) -> jax.stages.Lowered:
    decode = layouts(topology, sizes)[1]
    numbers = lambda dtype: array(decode, (ROWS,), dtype, "rows")  # noqa: E731
    f32, i32 = numbers(jnp.float32), numbers(jnp.int32)
    # Padding behind the tokens, and an end token that may be barred.
    vocab = Vocabulary(size=VOCAB - 5, pad=0, eos=(1,))
    decoding = Decoding(ONE_BILLION, decode, vocab, max_kept_tokens=max_kept_tokens, raw_logprobs=True)

    def one(keys, slot, raw, controls, live):
        return sample_token(jax.random.wrap_key_data(keys), slot, raw, controls, live, decoding)

    raw, keys = (
        array(decode, (ROWS, VOCAB), jnp.float32, "rows", "vocab"),
        array(decode, (ROWS, 2), jnp.uint32, "rows", None),
    )
    live = array(decode, (), jnp.bool_)
    program = jax.jit(one, out_shardings=decode.sharding(("rows",)))
    return program.lower(keys, i32, raw, Controls(f32, f32, i32, f32, i32), live)


def moved(topology, sizes: tuple[int, ...], max_kept_tokens: int) -> list[tuple[str, tuple[ArrayShape, ...]]]:
    program: Program = compile_program(ONE_BILLION, lambda: lower_draw(topology, sizes, max_kept_tokens))
    return [(i.kind, i.arrays) for i in collectives(program.hlo.all)]


@pytest.mark.parametrize("sizes", [(1, 4, 4), (1, 1, 16)], ids=str)
def test_a_truncated_draw_moves_each_shards_likeliest_alone(topology, sizes):
    """Values and ids of K + 1 a shard, and one sum a row; a plain draw moves one block of the 128."""
    rows, shards = ROWS // sizes[1], sizes[2]
    found = moved(topology, sizes, SUPPORT)
    assert sorted(kind for kind, _ in found) == ["all-gather", "all-gather", "all-reduce"], found
    sizes_moved = sorted(a.size for _, arrays in found for a in arrays)
    assert sizes_moved == [rows, rows * shards * (SUPPORT + 1), rows * shards * (SUPPORT + 1)]


def test_a_plain_draw_moves_one_block(topology):
    found = moved(topology, (1, 4, 4), 0)
    assert len(found) <= 6, found
    assert max(a.size for _, arrays in found for a in arrays) == ROWS // 4 * VOCAB // 128

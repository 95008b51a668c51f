"""Sampling of one token per row under the TPU compiler, with the vocabulary split over 4 and over 16 chips."""

import jax
import jax.numpy as jnp
import pytest
from programs import ONE_BILLION, Program, array, compile_program, layouts

from jaxrl_llm.perf.hlo import ArrayShape, collectives
from jaxrl_llm.rollout.sample import Controls, Decoding, Vocabulary, sample_tokens

pytestmark = pytest.mark.timeout(1200)

ROWS, VOCAB, MAX_KEPT = 64, 32768, 128


def lower_sampling(topology, sizes: tuple[int, ...], max_kept_tokens: int) -> jax.stages.Lowered:
    decode = layouts(topology, sizes)[1]
    numbers = lambda dtype: array(decode, (ROWS,), dtype, "rows")  # noqa: E731
    f32, i32 = numbers(jnp.float32), numbers(jnp.int32)
    # Padding after the tokens, and an end token that may be masked.
    vocab = Vocabulary(size=VOCAB - 5, pad=0, eos=(1,))
    decoding = Decoding(ONE_BILLION, decode, vocab, max_kept_tokens=max_kept_tokens, raw_logprobs=True)

    def one(keys, slot, raw, controls, any_active):
        return sample_tokens(jax.random.wrap_key_data(keys), slot, raw, controls, any_active, decoding)

    raw, keys = (
        array(decode, (ROWS, VOCAB), jnp.float32, "rows", "vocab"),
        array(decode, (ROWS, 2), jnp.uint32, "rows", None),
    )
    any_active = array(decode, (), jnp.bool_)
    program = jax.jit(one, out_shardings=decode.sharding(("rows",)))
    return program.lower(keys, i32, raw, Controls(f32, f32, i32, f32, i32, i32, i32), any_active)


def moved(topology, sizes: tuple[int, ...], max_kept_tokens: int) -> list[tuple[str, tuple[ArrayShape, ...]]]:
    program: Program = compile_program(topology, ONE_BILLION, lambda: lower_sampling(topology, sizes, max_kept_tokens))
    return [(i.kind, i.results) for i in collectives(program.hlo.all)]


@pytest.mark.parametrize("sizes", [(1, 4, 4), pytest.param((1, 1, 16), marks=pytest.mark.soak)], ids=str)
def test_truncated_sampling_moves_only_each_shards_top_k(topology, sizes):
    """Values and ids of K + 1 tokens per shard, and one sum per row."""
    rows, shards = ROWS // sizes[1], sizes[2]
    found = moved(topology, sizes, MAX_KEPT)
    # XLA:GPU combines the two gathers.
    kinds = sorted(kind for kind, arrays in found for _ in arrays)
    assert kinds == ["all-gather", "all-gather", "all-reduce"], found
    sizes_moved = sorted(a.size for _, arrays in found for a in arrays)
    assert sizes_moved == [rows, rows * shards * (MAX_KEPT + 1), rows * shards * (MAX_KEPT + 1)]


def test_untruncated_sampling_moves_one_block(topology):
    """One of the 128 blocks of the vocabulary."""
    found = moved(topology, (1, 4, 4), 0)
    assert len(found) <= 6, found
    assert max(a.size for _, arrays in found for a in arrays) == ROWS // 4 * VOCAB // 128

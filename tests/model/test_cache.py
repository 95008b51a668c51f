"""KV caches in every format: written, read, extended and prefilled in chunks, against NumPy in float64 over the valid keys."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from setups import FAMILIES, SMALL, TINY, layouts, make_params, make_policy, make_prompts

from jaxrl_llm.model import cache, cache_moves, transformer
from jaxrl_llm.model.attention.plain import attend_part, merge
from jaxrl_llm.model.cache import CacheFormat, Caching, QuantizedKV, choose_cache_format, empty_prompt, empty_suffix
from jaxrl_llm.model.transformer import DecodePosition

FORMATS = {
    "plain": CacheFormat(),
    "transposed": CacheFormat(transposed=True),
    "rewritten": CacheFormat(in_place=False),
    "transposed, rewritten": CacheFormat(transposed=True, in_place=False),
    "int8": CacheFormat(int8=True),
    "int8, transposed": CacheFormat(int8=True, transposed=True),
}
WINDOW, WIDER, COUNT = 5, 9, 8
# A row whose age exceeds the ring attends to all of it.
AGES, LATER = np.array([2, 7, 0]), np.array([3, 5, 1])
ONE = dataclasses.replace(TINY, layers=1)
K, G, H = ONE.kv_heads, ONE.group, ONE.head_dim


def numbers(seed: int, dtype: str, *shape: int) -> np.ndarray:
    """Normal numbers, rounded to the dtype."""
    values = np.random.default_rng(seed).standard_normal(shape)
    return np.asarray(jnp.asarray(values, dtype).astype(jnp.float32))


def expected(q, k, v, scale, softcap):
    """Attention of one row, [K G H] over [n K H], in float64."""
    scores = np.einsum("kgh,nkh->kgn", *(x.astype(np.float64) for x in (q, k))) * scale
    scores = softcap * np.tanh(scores / softcap) if softcap else scores
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("kgn,nkh->kgh", weights / weights.sum(axis=-1, keepdims=True), v.astype(np.float64))


@pytest.mark.parametrize("scale, softcap", [(H**-0.5, None), (0.5, 1.5)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_a_row_attends_to_the_keys_of_its_age(format, dtype, scale, softcap):
    """8 keys into a ring of 5, extended to 9, one more: rows of ages 3, 5 and 1 attend to 4, 6 (the old ring and it) and 2."""
    cfg, layout = dataclasses.replace(ONE, compute=dtype), layouts()[1]
    keys, values = (numbers(seed, dtype, COUNT + 1, 3, 1, K, H) for seed in (0, 1))
    q = numbers(2, dtype, 3, K, G, H)

    @jax.jit
    def run(keys, values, q):
        ring = empty_suffix(cfg, 3, WINDOW, layout, format)
        put = partial(cache.write, format=format)

        def write(ring, count, key, value):
            k, v = put(ring.k[0], key, count, transposed=format.transposed), put(ring.v[0], value, count)
            return ring.replace(k=(k,), v=(v,))

        def read(ring, count, age):
            mask = cache.suffix_mask(cache.num_slots(ring.v[0]), count, age)
            return merge(attend_part(q, ring.k[0], ring.v[0], mask, scale, softcap, format.transposed))

        for i in range(COUNT):
            ring = write(ring, i, keys[i], values[i])
        before = read(ring, COUNT - 1, AGES)
        # After extending, the next key has the number of the old size.
        ring = write(cache_moves.extend_suffix(ring, WIDER, COUNT, cfg, layout), WINDOW, keys[COUNT], values[COUNT])
        return before, read(ring, WINDOW, LATER)

    got = run(*(jnp.asarray(x, dtype) for x in (keys, values, q)))
    # Rounding of f32 sums; bf16 rounds weights to 2^-9; int8 rounds entries of up to 3 by up to 3 / 254, in keys and in values.
    tolerance = 0.05 if format.int8 else 1e-2 if dtype == "bfloat16" else 1e-5
    for result, last, ages in zip(got, (COUNT, COUNT + 1), (np.minimum(AGES, WINDOW - 1), LATER), strict=True):
        for row, age in enumerate(ages):
            k, v = (x[last - age - 1 : last, row, 0] for x in (keys, values))
            np.testing.assert_allclose(result[row], expected(q[row], k, v, scale, softcap), atol=tolerance)


def test_int8_by_hand():
    got = cache.quantize_kv(jnp.array([[127.0, -63.4, 0.6], [0.0, 0.0, 0.0], [2.54, 0.02, -0.031]]))
    np.testing.assert_array_equal(got.q, [[127, -63, 1], [0, 0, 0], [127, 1, -2]])
    np.testing.assert_allclose(got.scale, [1.0, 0.0, 0.02], rtol=1e-6)


def test_int8_halves_the_memory_of_bfloat16():
    """Up to one f32 per head and slot beside H entries."""
    cfg = dataclasses.replace(ONE, head_dim=64, compute="bfloat16")
    for empty in (empty_suffix, empty_prompt):
        sizes = [
            sum(
                x.size * x.dtype.itemsize
                for x in jax.tree.leaves(jax.eval_shape(lambda f=f, e=empty: e(cfg, 4, 32, layouts()[1], f)))
            )
            for f in (CacheFormat(), CacheFormat(int8=True))
        ]
        assert sizes == [2 * 4 * K * 32 * 128, 2 * 4 * K * 32 * (64 + 4)]


def test_the_default_format_depends_on_the_backend():
    """This backend is a CPU."""
    layout, half = layouts()[1], dataclasses.replace(ONE, compute="bfloat16")
    assert choose_cache_format("auto", "compute", ONE, layout) == CacheFormat(transposed=True)
    assert choose_cache_format("dot", "compute", ONE, layout) == CacheFormat()
    assert choose_cache_format("auto", "compute", half, layout) == CacheFormat(transposed=True, in_place=False)
    assert choose_cache_format("auto", "int8", half, layout) == CacheFormat(int8=True, transposed=True)


prefill = jax.jit(transformer.prefill, static_argnums=(3, 4, 5))


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 3, 4])
@pytest.mark.parametrize("family", ["gemma2, window 5", "mistral, window 3", "qwen3"])
def test_chunked_prefill_equals_prefill_at_once(family, chunk):
    """Prompts of 0 to 6 keys in 7 slots, in caches of 8; a window may end in any chunk."""
    cfg = FAMILIES.get(family, SMALL)
    train, dec = layouts()
    params = make_policy(cfg, make_params(cfg, train), train, dec).params
    prompts = make_prompts(8)
    length = prompts.length - 1
    whole, parts = (
        prefill(params, prompts.tokens, length, Caching(8, n), cfg, dec)[1] for n in (cache.UNLIMITED, chunk)
    )
    for window, *arrays in zip(cache.attention_windows(cfg), whole.k, whole.v, parts.k, parts.v, strict=True):
        assert {x.shape[2] for x in arrays} == {min(window, 8)}
        counts = np.arange(min(window, 8)) < length[:, None]
        k, v, k_parts, v_parts = (np.moveaxis(np.asarray(x), 2, 1)[counts] for x in arrays)
        np.testing.assert_allclose(k_parts, k, atol=1e-5)
        np.testing.assert_allclose(v_parts, v, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2, window 5"])
def test_logits_from_int8_caches_are_close(family):
    """Three steps after ragged prompts. Entries are off by at most 1 part in 254: logits of order 1 by hundredths."""
    cfg = FAMILIES[family]
    train, dec = layouts()
    params = make_policy(cfg, make_params(cfg, train), train, dec).params
    prompts = make_prompts(8)
    length = jnp.asarray(prompts.length - 1)

    @partial(jax.jit, static_argnums=0)
    def run(format):
        prompt = transformer.prefill(params, prompts.tokens, length, Caching(8, format=format), cfg, dec)[1]
        ring, logits = empty_suffix(cfg, 16, 4, dec, format), []
        for t in range(3):
            at = DecodePosition(jnp.int32(t), jnp.repeat(length[:, None], 2, axis=1), jnp.full((8, 2), t))
            x, ring = transformer.decode(params, jnp.arange(16) % 13 + t, at, prompt, ring, cfg, dec)
            logits.append(x)
        return jnp.stack(logits), prompt

    want, _ = run(CacheFormat())
    got, prompt = run(CacheFormat(int8=True, transposed=True))
    assert all(isinstance(x, QuantizedKV) and x.q.dtype == jnp.int8 for x in prompt.k + prompt.v)
    assert 1e-4 < np.abs(got - want).max() < 0.1 * np.abs(want).max()

"""Sampling: recorded log-probs equal the distribution's to the bit, frequencies match it, and each row has its own noise."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from setups import TINY

from jaxrl_llm.distribution.logits import process_logits
from jaxrl_llm.model.linear import contract
from jaxrl_llm.parallel.layout import DECODE, Layout
from jaxrl_llm.parallel.mesh import make_mesh
from jaxrl_llm.rollout import sample
from jaxrl_llm.rollout.sample import Decoding, FullDistribution, Vocabulary

NUM_SAMPLES, CHUNK = 200_000, 10_000
KEY = jax.random.key(5)
TEMPERATURES = (0.0, 0.6, 1.0, 1.5)


def keys_of(uid, num_rows):
    return sample.row_keys(KEY, uid, jnp.broadcast_to(jnp.arange(num_rows), (len(uid), num_rows)))


def sample_logp(keys, slot, logp):
    slot = jnp.broadcast_to(slot, keys.shape)
    return sample.sample_from(keys, slot, FullDistribution(logp), raw_logprobs=False)[:2]


jitted = jax.jit(sample_logp)


def logits_of(dtype: str, rows: int, vocab: int) -> jax.Array:
    """f32 logits as the head makes them: a product of activations and weights of `dtype`."""
    rng = np.random.default_rng(vocab)
    h, head = rng.normal(size=(rows, 8)), rng.normal(size=(8, vocab))
    return contract(jnp.asarray(h, dtype), jnp.asarray(head, dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "sampler, vocab, num_tokens",
    [
        (jitted, 16, 16),
        (jitted, 17, 13),
        (jitted, 300, 211),
        (jitted, 1000, 997),
        (sample_logp, 300, 211),
    ],
    ids=["jit-16-16", "jit-17-13", "jit-300-211", "jit-1000-997", "no jit-300-211"],
)
def test_the_stored_logprob_is_the_distributions_to_the_bit(sampler, dtype, vocab, num_tokens):
    """`test_decode` checks the same for a whole decode step in one program."""
    rows = 96
    keys = keys_of(jnp.arange(rows), 1)
    temperature = jnp.asarray(np.resize(TEMPERATURES, rows), jnp.float32)
    for logits in (logits_of(dtype, rows, vocab), logits_of(dtype, rows, vocab).astype(dtype)):
        logp = process_logits(logits, temperature, num_tokens)
        token, stored = sampler(keys, jnp.int32(4), logp)
        gathered = np.take_along_axis(np.asarray(logp), np.asarray(token)[:, None], axis=1)[:, 0]
        assert logp.dtype == stored.dtype == jnp.float32 and token.dtype == jnp.int32
        np.testing.assert_array_equal(np.asarray(stored).view(np.uint32), gathered.view(np.uint32))
        assert np.isfinite(gathered).all() and 0 <= token.min() and token.max() < num_tokens
        assert np.isneginf(np.asarray(logp)[:, num_tokens:]).all()


def distribution(vocab: int) -> np.ndarray:
    """Log-probs spread over two orders of magnitude: every expected count of 2e5 samples is above 5."""
    logits = jnp.asarray(np.random.default_rng(vocab).uniform(-2.5, 2.5, (1, vocab)), jnp.float32)
    return np.asarray(process_logits(logits, jnp.ones(1), vocab))[0]


def counts_of(logp: np.ndarray) -> np.ndarray:
    """Count each token in NUM_SAMPLES samples, each with its own key."""
    rows = jnp.broadcast_to(jnp.asarray(logp), (CHUNK, len(logp)))
    # A new function each time, so that a patched `sample` is retraced.
    many = jax.jit(lambda uid, rows: sample_logp(keys_of(uid, 1), jnp.int32(0), rows)[0])
    tokens = [np.asarray(many(jnp.arange(start, start + CHUNK), rows)) for start in range(0, NUM_SAMPLES, CHUNK)]
    return np.bincount(np.concatenate(tokens), minlength=len(logp))


def check_frequencies(logp: np.ndarray) -> None:
    probability = np.exp(logp.astype(np.float64))
    expected = NUM_SAMPLES * probability / probability.sum()
    assert expected.min() > 5
    p_value = stats.chisquare(counts_of(logp), expected).pvalue
    print(f"V {len(logp)}: chi-square p = {p_value:.4f}")
    assert p_value > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [16, 300])
def test_frequencies_match_the_distribution(vocab):
    check_frequencies(distribution(vocab))


def ignore_the_probability_of_blocks(monkeypatch):
    monkeypatch.setattr(jax.nn, "logsumexp", lambda x, axis: jnp.where(jnp.max(x, axis) > -jnp.inf, 0.0, -jnp.inf))


def use_the_noise_of_blocks_inside_them(monkeypatch):
    """The same key twice: the first entries of both noises are then the same numbers."""
    monkeypatch.setattr(jax.random, "split", lambda key: jnp.stack([key, key]))


@pytest.mark.parametrize("mutant", [ignore_the_probability_of_blocks, use_the_noise_of_blocks_inside_them])
def test_a_wrong_two_level_sampler_does_not_pass(mutant, monkeypatch):
    logp = distribution(300)
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        check_frequencies(logp)


def check_each_row_has_its_own_noise() -> None:
    """Six prompts, eight samples each, all with the same uniform logits over 300 tokens."""
    keys = keys_of(jnp.arange(6) * 1000, 8)
    tokens = np.asarray(jitted(keys, jnp.int32(0), jnp.full((48, 300), -np.log(300.0)))[0]).reshape(6, 8)
    # 48 samples of 300 tokens give about 44 different ones.
    assert len(np.unique(tokens)) > 30
    assert all(len(np.unique(group)) > 4 for group in tokens)
    assert len(np.unique(tokens, axis=0)) == 6


def test_rows_with_equal_logits_sample_different_tokens():
    check_each_row_has_its_own_noise()


@pytest.mark.parametrize("shared", ["by the batch", "by the group", "by the sample number"])
def test_a_key_for_several_rows_does_not_pass(shared, monkeypatch):
    def keys(key, uid, sample):
        samples = sample.shape[1]
        per_prompt, per_sample = jax.random.split(key, len(uid)), jax.random.split(key, samples)
        return {
            "by the batch": jnp.repeat(key[None], len(uid) * samples, axis=0),
            "by the group": jnp.repeat(per_prompt, samples, axis=0),
            "by the sample number": jnp.tile(per_sample, len(uid)),
        }[shared]

    monkeypatch.setattr(sample, "row_keys", keys)
    with pytest.raises(AssertionError):
        check_each_row_has_its_own_noise()


def test_a_rows_key_depends_on_key_prompt_and_sample_only():
    keys = jax.random.key_data(keys_of(jnp.array([7, 3]), 2))
    by_hand = [
        jax.random.fold_in(jax.random.fold_in(KEY, uid), number) for uid, number in ((7, 0), (7, 1), (3, 0), (3, 1))
    ]
    np.testing.assert_array_equal(keys, [jax.random.key_data(key) for key in by_hand])
    # Another order, more samples: the same rows have the same keys.
    more = jax.random.key_data(keys_of(jnp.array([3, 9, 7]), 3)).reshape(3, 3, -1)
    np.testing.assert_array_equal(more[[2, 0], :2].reshape(4, -1), keys)
    later = jax.random.key_data(sample.row_keys(KEY, jnp.array([3]), jnp.array([[1, 2]])))
    np.testing.assert_array_equal(later, more[0, 1:])


def test_each_position_has_its_own_noise():
    keys, logp = keys_of(jnp.arange(40), 1), jnp.full((40, 300), -np.log(300.0))
    first, second, again = (jitted(keys, jnp.int32(t), logp)[0] for t in (0, 1, 0))
    np.testing.assert_array_equal(first, again)
    assert (first != second).mean() > 0.9


@pytest.mark.parametrize("vocab", [1, 2, 128, 129, 300])
def test_a_certain_token_is_always_sampled(vocab):
    keys = keys_of(jnp.arange(64), 1)
    certain = np.arange(64) % vocab
    logp = np.full((64, vocab), -np.inf, np.float32)
    logp[np.arange(64), certain] = 0.0
    token, logprob = jitted(keys, jnp.int32(0), jnp.asarray(logp))
    np.testing.assert_array_equal(token, certain)
    np.testing.assert_array_equal(logprob, 0.0)


def test_small_errors_of_the_logits_change_few_tokens():
    """As in the module docstring: noise of 1e-2 changes 0.6 % of the tokens (half of them under inverse CDF)."""
    rows = 4000
    keys = keys_of(jnp.arange(rows), 1)
    logits = np.broadcast_to(distribution(300), (rows, 300))
    noisy = logits + 1e-2 * np.random.default_rng(1).normal(size=logits.shape).astype(np.float32)
    changed = jitted(keys, jnp.int32(0), logits)[0] != jitted(keys, jnp.int32(0), noisy)[0]
    assert 0 < changed.mean() < 0.03


def test_equal_decodings_are_one_program():
    """As a static argument of jit: retraced for another value, not for another object."""
    traced = []

    @partial(jax.jit, static_argnums=0)
    def program(decoding, x):
        traced.append(decoding.max_kept_tokens)
        return x + decoding.max_kept_tokens

    def made(max_kept_tokens):
        layout = Layout(make_mesh(devices=jax.devices()[:1]), DECODE)
        return Decoding(
            TINY, layout, Vocabulary(size=16, pad=0, eos=(15,)), steps=8, interval=4, max_kept_tokens=max_kept_tokens
        )

    assert [int(program(made(k), 1)) for k in (0, 0, 3, 0, 3)] == [1, 1, 4, 1, 4]
    assert traced == [0, 3] and made(3) == made(3) and made(0) != made(3)

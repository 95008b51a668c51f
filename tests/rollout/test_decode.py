"""`generate`: invariants of every row, the recorded numbers, and that it compiles once."""

import dataclasses

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from setups import SMALL, VOCAB, generator, layouts, make_params, make_policy, make_prompts

from jaxrl_llm.metrics.timers import CompileCounter
from jaxrl_llm.model import transformer
from jaxrl_llm.model.cache import Caching, empty_suffix
from jaxrl_llm.model.params import unstack
from jaxrl_llm.model.transformer import DecodePosition
from jaxrl_llm.rollout import sample
from jaxrl_llm.rollout.decode import ChunkResult, DecodedChunk
from jaxrl_llm.rollout.output import OutputBuffer
from jaxrl_llm.rollout.sample import Controls, Decoding, Vocabulary, row_keys
from jaxrl_llm.types import Finish, Prompts, Rollouts, check

KEY = jax.random.key(2)
P, G, C = 8, 3, 6
VERSION = 3
ONE_LAYER = dataclasses.replace(SMALL, layers=1)
# 300 tokens in 304 rows of embedding: several blocks of the sampler, and ids that must never be sampled.
WIDE = dataclasses.replace(SMALL, vocab_size=304, layers=1, d_model=16, heads=4, kv_heads=2, head_dim=4, d_mlp=16)
WIDE_VOCAB = Vocabulary(size=300, pad=0, eos=(299,))


@pytest.fixture(scope="module")
def sampler():
    """`sample(temperature) -> Rollouts` on one device, always the same compiled program; and the parameters."""
    train, dec = layouts()
    params = make_params(ONE_LAYER, train)
    policy = make_policy(ONE_LAYER, params, train, dec, VERSION)
    prompts, generate = make_prompts(P), generator(G, C, ONE_LAYER, dec)
    return lambda temperature, key=KEY: generate(policy, prompts, key, temperature), params


def check_contract(rollouts: Rollouts, slots: int, vocab: Vocabulary, temperature: np.ndarray, version: int) -> None:
    """Check the invariants of every row of every engine."""
    check(rollouts)
    samples = len(rollouts.length) // len(rollouts.prompts.length)
    np.testing.assert_array_equal(rollouts.temperature, np.repeat(np.asarray(temperature, np.float32), samples))
    for b in range(len(rollouts.length)):
        n, tokens = rollouts.length[b], rollouts.tokens[b]
        assert 1 <= n <= slots == len(tokens)
        np.testing.assert_array_equal(rollouts.sampled[b], np.arange(slots) < n)
        assert not np.isin(tokens[: n - 1], vocab.eos).any()
        assert rollouts.finish[b] == (Finish.EOS if tokens[n - 1] in vocab.eos else Finish.LENGTH)
        assert tokens[n - 1] in vocab.eos or n == slots
        assert (tokens[:n] < vocab.size).all() and (tokens[n:] == vocab.pad).all()
        assert (rollouts.behavior_logprobs[b, :n] < 0).all() and (rollouts.entropy[b, :n] > 0).all()
        np.testing.assert_array_equal(rollouts.behavior_logprobs[b, n:], 0.0)
        np.testing.assert_array_equal(rollouts.entropy[b, n:], 0.0)
        np.testing.assert_array_equal(rollouts.version[b], np.where(np.arange(slots) < n, version, 0))


def test_contract(sampler):
    temperature = np.linspace(0.6, 3.0, P)
    rollouts = sampler[0](temperature)
    check_contract(rollouts, C, VOCAB, temperature, VERSION)
    assert set(rollouts.finish) == {Finish.EOS, Finish.LENGTH}
    assert len(set(rollouts.length)) > 3


@pytest.mark.slow
def test_the_naive_engine_keeps_the_same_contract():
    """One prompt of one token, because each sequence length recompiles all operations."""
    train, _ = layouts()
    prompts = jax.tree.map(lambda x: x[:1], make_prompts(2, vocab=299))
    params, temperature = make_params(WIDE, train), np.full(1, 1.5, np.float32)
    rollouts = naive.generate(params, VERSION, prompts, KEY, temperature, 3, 2, WIDE_VOCAB, WIDE, train)
    check_contract(rollouts, 2, WIDE_VOCAB, temperature, VERSION)


def test_the_contract_detects_a_lost_end_token():
    """The mutant that leaves the end token out of `sampled`."""
    sampled = np.array([[True, False]])
    zeros = np.zeros((1, 2), np.float32)
    prompts = Prompts(*(np.ones(shape, np.int32) for shape in ((1, 1), 1, 1, 1)))
    rollouts = Rollouts(
        prompts=prompts, prompt=np.zeros(1, np.int32), sample=np.zeros(1, np.int32),
        tokens=np.array([[3, 15]], np.int32), length=np.array([2], np.int32),
        sampled=sampled | [[False, True]],
        behavior_logprobs=zeros - 1, entropy=zeros + 1, temperature=np.ones(1, np.float32),
        version=np.full((1, 2), VERSION, np.int32), finish=np.zeros(1, np.int32),
    )  # fmt: skip
    check_contract(rollouts, 2, VOCAB, [1.0], VERSION)
    with pytest.raises(AssertionError):
        check_contract(rollouts.replace(sampled=sampled), 2, VOCAB, [1.0], VERSION)


def test_temperature_is_per_prompt_and_compiles_nothing(sampler):
    sample, _ = sampler
    sample(1.0)
    compiles = CompileCounter()
    by_temperature = {t: sample(t) for t in (0.5, 1.0, 2.0)}
    mixed = sample([0.5] + [1.0] * (P - 2) + [2.0])
    sample(0.25, jax.random.key(9))
    assert compiles.take()["compiles"] == 0
    for p, t in ((0, 0.5), (1, 1.0), (P - 1, 2.0)):
        of_prompt = slice(p * G, (p + 1) * G)
        np.testing.assert_array_equal(mixed.tokens[of_prompt], by_temperature[t].tokens[of_prompt])
        np.testing.assert_array_equal(
            mixed.behavior_logprobs[of_prompt], by_temperature[t].behavior_logprobs[of_prompt]
        )


def test_entropy_of_the_first_token_rises_with_temperature(sampler):
    """All G samples of a prompt sample their first token from the same logits."""
    entropy = np.stack([sampler[0](t).entropy[:, 0] for t in (0.3, 0.6, 1.0, 1.5, 1000.0)])
    assert (np.diff(entropy, axis=0) > 0).all()
    np.testing.assert_allclose(entropy[-1], np.log(16), atol=1e-3)
    np.testing.assert_array_equal(entropy.reshape(5, P, G), np.repeat(entropy.reshape(5, P, G)[:, :, :1], G, axis=2))


def test_cold_sampling_is_the_chain_of_argmaxes(sampler):
    """T = 1e-4 turns gaps of 0.01 into 100 nats, far above any Gumbel noise."""
    sample, params = sampler
    rollouts = sample(1e-4)
    prompts, train = rollouts.prompts, layouts()[0]
    sequence = np.zeros((P * G, 7 + C), np.int32)
    for b in range(P * G):
        n = prompts.length[b // G]
        sequence[b, : n + C] = np.concatenate([prompts.tokens[b // G, :n], rollouts.tokens[b]])
    position = np.broadcast_to(np.arange(7 + C), sequence.shape)
    forward = jax.jit(
        lambda ids: transformer.logits(
            params,
            transformer.hidden(params, ids, position, jnp.full_like(ids, 7 + C), ONE_LAYER, train),
            ONE_LAYER,
        )
    )
    best = np.asarray(jnp.argmax(forward(sequence), axis=-1))
    for b in range(P * G):
        n, start = rollouts.length[b], prompts.length[b // G] - 1
        np.testing.assert_array_equal(rollouts.tokens[b, :n], best[b, start : start + n])
    groups = rollouts.tokens.reshape(P, G, C)
    np.testing.assert_array_equal(groups, np.repeat(groups[:, :1], G, axis=1))


def test_temperature_zero_is_greedy_and_certain(sampler):
    """The limit of cold sampling, in the same program: log-prob 0 and entropy 0."""
    greedy, cold = sampler[0](0.0), sampler[0](1e-4)
    np.testing.assert_array_equal(greedy.tokens, cold.tokens)
    np.testing.assert_array_equal(greedy.behavior_logprobs, 0.0)
    np.testing.assert_array_equal(greedy.entropy, 0.0)
    beside = sampler[0]([0.0] + [1.0] * (P - 1))
    np.testing.assert_array_equal(beside.tokens[:G], greedy.tokens[:G])
    np.testing.assert_array_equal(beside.tokens[G:], sampler[0](1.0).tokens[G:])


def test_a_row_ends_at_any_of_several_end_tokens():
    vocab = Vocabulary(size=9, pad=0, eos=(7, 5))
    np.testing.assert_array_equal(vocab.ends(jnp.array([5, 6, 7, 0])), [True, False, True, False])
    buffer = OutputBuffer(3, Decoding(SMALL, layouts()[1], vocab, steps=3))
    rows = buffer.allocate(np.full(4, 3), np.zeros(4, np.int32))
    assert not buffer.length.any() and not buffer.columns["behavior_logprobs"].any()
    token = np.array([[3, 7, 3, 9], [5, 0, 4, 9], [0, 0, 6, 9]])
    active = np.array([[True] * 4, [True, False, True, False], [False, False, True, False]])
    zeros = np.zeros((3, 4), np.float32)
    # Controls forced the second tokens, and ended rows 2 and 0: one of them at an end token.
    sampled, state = active & (np.arange(3)[:, None] != 1), np.array([[5, 6, 7, 8]])
    codes = np.array([[4, 9, 3, 1], [5, 0, 6, 1], [0, 0, 7, 1]], np.int32)
    chunk = DecodedChunk(token, active, zeros, zeros, sampled, codes)
    # Four columns: rows 2, 1 and 0; the last is ignored.
    result = ChunkResult(np.int32(3), token[-1:], active[-1:], state, chunk)
    stored = buffer.add(np.array([*rows[[2, 1, 0]], -1]), np.zeros(4, int), result, 1, np.array([1, 0, 1, 0], bool))
    assert stored == 6
    np.testing.assert_array_equal(buffer.finish[rows], [Finish.STOP, Finish.EOS, Finish.EOS, Finish.UNFINISHED])
    np.testing.assert_array_equal(buffer.length[rows], [3, 1, 2, 0])
    np.testing.assert_array_equal(buffer.state[rows], [7, 6, 5, 0])
    np.testing.assert_array_equal(buffer.columns["tokens"][rows], [[3, 4, 6], [7, 0, 0], [3, 5, 0], [0, 0, 0]])
    np.testing.assert_array_equal(buffer.columns["version"][rows], [[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(buffer.columns["control_state"][rows], [[3, 6, 7], [9, 0, 0], [4, 5, 0], [0, 0, 0]])
    was_sampled = [[True, False, True], [True, False, False], [True, False, False], [False] * 3]
    np.testing.assert_array_equal(buffer.columns["sampled"][rows], was_sampled)


@pytest.mark.slow
@pytest.mark.parametrize(
    "jit, compute, rows_of_embedding, num_tokens",
    [
        pytest.param(True, "float32", 304, 300, marks=pytest.mark.soak),
        (True, "bfloat16", 304, 300),
        (True, "float32", 18, 13),
        (False, "float32", 304, 300),
        pytest.param(False, "bfloat16", 304, 300, marks=pytest.mark.soak),
    ],
)
def test_in_a_step_the_stored_logprob_is_the_distributions_to_the_bit(jit, compute, rows_of_embedding, num_tokens):
    """Model and sampling in one program, as in the loop. Rows at T = 0.6, 1 and 1.5."""
    cfg, vocab, slots = (
        dataclasses.replace(WIDE, compute=compute, vocab_size=rows_of_embedding),
        Vocabulary(num_tokens, 0, (12, 3)),
        3,
    )
    train, dec = layouts()
    prompts = make_prompts(3, vocab=12)
    params = jax.tree.map(lambda x: x.astype(compute), unstack(make_params(cfg, train), cfg.layers))
    each = lambda *values: jnp.repeat(jnp.array(values), G)  # noqa: E731
    none = jnp.zeros(3 * G, jnp.int32)
    controls = Controls(each(0.6, 1.0, 1.5), none + 1.0, none, none + 0.0, none, none, none)
    length, keys = prompts.length - 1, row_keys(KEY, prompts.uid, jnp.broadcast_to(jnp.arange(G), (3, G)))
    prompt = jax.jit(lambda: transformer.prefill(params, prompts.tokens, length, Caching(7), cfg, dec)[1])()

    def advance(t, last, suffix):
        """One step of the loop, with the distribution that it samples from."""
        position = DecodePosition(t, jnp.repeat(length[:, None], G, axis=1), jnp.full((3, G), t))
        raw, suffix = transformer.decode(params, last, position, prompt, suffix, cfg, dec)
        shown = sample.distribution(raw, controls, t < slots, Decoding(cfg, dec, vocab))
        return sample.sample_from(keys, none + t, shown, False), shown.logp, suffix

    if jit:
        advance = jax.jit(advance)
    last, suffix = jnp.repeat(prompts.tokens[np.arange(3), length], G), empty_suffix(cfg, 3 * G, slots, dec)
    for t in range(slots):
        sampled, logp, suffix = advance(jnp.int32(t), last, suffix)
        last, logp = sampled.token, np.asarray(logp)
        gathered = np.take_along_axis(logp, np.asarray(last)[:, None], axis=1)[:, 0]
        np.testing.assert_array_equal(np.asarray(sampled.logprob).view(np.uint32), gathered.view(np.uint32))
        assert np.isneginf(logp[:, num_tokens:]).all()
        # Sums of 300 f32 exponentials.
        np.testing.assert_allclose(np.exp(logp.astype(np.float64)).sum(axis=1), 1, atol=1e-5)


def test_a_finished_row_does_not_affect_the_others(sampler):
    """Up to its end, each row equals the one sampled with an end token that is never sampled."""
    sample, params = sampler
    train, dec = layouts()
    rollouts = sample(1.0)
    endless = generator(G, C, ONE_LAYER, dec, Vocabulary(size=16, pad=0, eos=(99,)))
    longer = endless(make_policy(ONE_LAYER, params, train, dec, VERSION), make_prompts(P), KEY, 1.0)
    assert (longer.length == C).all() and (longer.finish == Finish.LENGTH).all()
    np.testing.assert_array_equal(longer.tokens[rollouts.sampled], rollouts.tokens[rollouts.sampled])
    assert not rollouts.sampled.all()

"""Sampling and scoring agree, step by step: a row does not depend on its batch; prefill and decode equal the training forward pass;
so the captured log-probs equal the trainer's, in either layout."""

import dataclasses

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from setups import (
    EACH_MESH,
    FAMILIES,
    SMALL,
    TINY,
    VOCAB,
    generator,
    layouts,
    make_params,
    make_policy,
    make_prompts,
    to_batch,
    to_experience,
    until_of,
)  # fmt: skip

from jaxrl_llm.distribution.score import Scoring, score_tokens
from jaxrl_llm.model import transformer
from jaxrl_llm.model.cache import Caching, empty_suffix
from jaxrl_llm.model.transformer import DecodePosition
from jaxrl_llm.parallel import hosts
from jaxrl_llm.types import check

# Whose tokens and scores `model/hf/test_hf_parity.py` has as well.
ALSO_IN_HF = ("llama3", "mistral, window 3", "gemma2, window 5")
QWEN2 = dataclasses.replace(SMALL, qk_norm=False, qkv_bias=True, tied_head=False, rope_theta=1e6)
VARIANTS = {"qk_norm, tied": SMALL, "qkv_bias, untied": QWEN2}
KEY = jax.random.key(11)
P, G, C = 8, 3, 6
hidden = jax.jit(transformer.hidden, static_argnums=(4, 5))
logits = jax.jit(transformer.logits, static_argnums=2)
prefill = jax.jit(transformer.prefill, static_argnums=(3, 4, 5))
decode = jax.jit(transformer.decode, static_argnums=(5, 6))
score = jax.jit(score_tokens, static_argnums=2)


def sample(cfg, sizes=(1, 1, 1), prompts=None, temperature=1.0, params=None):
    """Rollouts on a mesh, as NumPy, with the trainer's parameters and layout."""
    prompts = prompts if prompts is not None else make_prompts(P)
    train, dec = layouts(sizes)
    params = params if params is not None else make_params(cfg, train)
    rollouts = generator(G, C, cfg, dec)(make_policy(cfg, params, train, dec), prompts, KEY, temperature)
    return check(rollouts), params, train


def scores(rollouts, params, train, cfg):
    batch = to_batch(to_experience(rollouts), shards=train.size("rows"))
    placed = hosts.put(batch, train.sharding(("rows", None)))
    return batch, score(params, placed, Scoring(cfg, train, VOCAB.size))


@pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS)
def test_forward_does_not_depend_on_the_batch_around_a_row(cfg):
    train, _ = layouts()
    params, prompts = make_params(cfg, train), make_prompts(P)
    position = np.broadcast_to(np.arange(7), (P, 7))
    until = until_of(prompts.length, 7)
    together = hidden(params, prompts.tokens, position, until, cfg, train)
    for p in (0, 3, P - 1):
        n = prompts.length[p]
        alone = hidden(params, prompts.tokens[p : p + 1, :n], position[p : p + 1, :n], until[p : p + 1, :n], cfg, train)
        # Different shapes use different kernels: a few rounding errors of values of order 1.
        np.testing.assert_allclose(alone[0], together[p, :n], atol=2e-5)


@pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS)
def test_a_token_changes_only_what_comes_after_it(cfg):
    train, _ = layouts()
    params = make_params(cfg, train)
    tokens = np.arange(1, 9)[None].astype(np.int32)
    other = tokens.copy()
    other[0, 4] = 12
    until, position = np.full_like(tokens, 8), np.arange(8)[None]
    a, b = (np.asarray(hidden(params, t, position, until, cfg, train)) for t in (tokens, other))
    np.testing.assert_array_equal(a[0, :4], b[0, :4])
    assert np.abs(a[0, 4:] - b[0, 4:]).max(axis=-1).min() > 1e-3


def test_packed_sequences_do_not_attend_to_each_other():
    train, _ = layouts()
    params = make_params(SMALL, train)
    tokens = np.array([[1, 2, 3, 4, 5, 6, 7]])
    packed = hidden(params, tokens, np.array([[0, 1, 2, 0, 1, 2, 3]]), np.array([[3, 3, 3, 7, 7, 7, 7]]), SMALL, train)
    first = hidden(params, tokens[:, :3], np.arange(3)[None], np.full((1, 3), 3), SMALL, train)
    second = hidden(params, tokens[:, 3:], np.arange(4)[None], np.full((1, 4), 4), SMALL, train)
    np.testing.assert_allclose(packed, np.concatenate([first, second], axis=1), atol=2e-5)


@pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS)
def test_prefill_and_decode_equal_the_training_forward(cfg):
    check_prefill_and_decode(cfg)


def check_prefill_and_decode(cfg, trained=None):
    """Feed a known text, the first part to prefill, the rest to decode; compare logits with one pass over the whole text."""
    train, dec = layouts()
    params, prompts = make_params(cfg, train), make_prompts(P)
    policy = make_policy(cfg, params, train, dec)
    text = np.random.default_rng(1).integers(1, 15, (P, C)).astype(np.int32)
    whole = np.zeros((P, 7 + C), np.int32)
    for p in range(P):
        whole[p, : prompts.length[p] + C] = np.concatenate([prompts.tokens[p, : prompts.length[p]], text[p]])
    position = np.broadcast_to(np.arange(7 + C), whole.shape)
    h = hidden(params, whole, position, until_of(prompts.length + C, 7 + C), trained or cfg, train)
    want = np.asarray(logits(params, h, cfg))
    length = jnp.asarray(prompts.length) - 1
    _, cache = prefill(policy.params, prompts.tokens, length, Caching(7), cfg, dec)
    suffix = empty_suffix(cfg, P, C, dec)
    fed = prompts.tokens[np.arange(P), prompts.length - 1]
    for t in range(C):
        got, suffix = decode(
            policy.params,
            fed,
            DecodePosition(np.int32(t), length[:, None], np.full((P, 1), t, np.int32)),
            cache,
            suffix,
            cfg,
            dec,
        )
        fed = text[:, t]
        np.testing.assert_allclose(got, want[np.arange(P), prompts.length - 1 + t], atol=2e-4)
    return cache, suffix


@pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
def test_captured_logprobs_equal_the_trainers(cfg, sizes, temperature):
    rollouts, params, train = sample(cfg, sizes, temperature=temperature)
    batch, scored = scores(rollouts, params, train, cfg)
    difference = np.abs(np.asarray(scored.logprobs) - batch.behavior_logprobs)[batch.loss_mask]
    assert difference.size == rollouts.sampled.sum() > 50
    assert difference.mean() <= 1e-5
    assert difference.max() <= 5e-4
    entropy = np.asarray(scored.entropy)[batch.loss_mask]
    np.testing.assert_allclose(entropy.sum(), rollouts.entropy.sum(), rtol=1e-4)


@pytest.mark.slow
def test_captured_logprobs_in_bfloat16():
    """Measured on CPU: mean 0.0034, max 0.018 nats; the bounds leave a factor of two."""
    cfg = dataclasses.replace(SMALL, compute="bfloat16")
    rollouts, params, train = sample(cfg)
    batch, scored = scores(rollouts, params, train, cfg)
    difference = np.abs(np.asarray(scored.logprobs) - batch.behavior_logprobs)[batch.loss_mask]
    assert difference.mean() <= 0.007
    assert difference.max() <= 0.04


@pytest.mark.slow
@pytest.mark.parametrize("cfg", [SMALL, pytest.param(QWEN2, marks=pytest.mark.soak)], ids=VARIANTS)
def test_the_naive_engine_samples_the_same(cfg):
    prompts = make_prompts(4)
    fast, params, train = sample(cfg, prompts=prompts)
    slow = naive.generate(params, 3, prompts, KEY, np.ones(4, np.float32), G, C, VOCAB, cfg, train)
    for name in ("tokens", "length", "sampled", "version", "finish", "temperature"):
        np.testing.assert_array_equal(getattr(fast, name), getattr(slow, name), err_msg=name)
    np.testing.assert_allclose(fast.behavior_logprobs, slow.behavior_logprobs, atol=5e-4)
    np.testing.assert_allclose(fast.entropy, slow.entropy, atol=5e-4)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", EACH_MESH)
def test_same_tokens_on_every_mesh(sizes):
    one, _, _ = sample(SMALL)
    other, _, _ = sample(SMALL, sizes)
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(one.finish, other.finish)
    np.testing.assert_allclose(one.behavior_logprobs, other.behavior_logprobs, atol=1e-4)


def test_same_tokens_for_permuted_prompts_and_for_a_subset():
    prompts = make_prompts(P)
    whole, _, _ = sample(SMALL, prompts=prompts)
    by_prompt = whole.tokens.reshape(P, G, C)
    order = np.random.default_rng(5).permutation(P)
    permuted, _, _ = sample(SMALL, prompts=jax.tree.map(lambda x: x[order], prompts))
    np.testing.assert_array_equal(permuted.tokens.reshape(P, G, C), by_prompt[order])
    some, _, _ = sample(SMALL, prompts=jax.tree.map(lambda x: x[2:5], prompts))
    np.testing.assert_array_equal(some.tokens.reshape(3, G, C), by_prompt[2:5])


def test_samples_of_a_prompt_differ_and_so_do_visits():
    prompts = make_prompts(P)
    first, _, _ = sample(SMALL, prompts=prompts, temperature=5.0)
    groups = first.tokens.reshape(P, G, C)
    assert all(len(np.unique(group, axis=0)) == G for group in groups)
    again, _, _ = sample(SMALL, prompts=prompts.replace(uid=prompts.uid + 1), temperature=5.0)
    assert (again.tokens != first.tokens).any(axis=1).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.soak] if name in ALSO_IN_HF else []) for name in FAMILIES]
)
def test_every_family_is_scored_as_sampled_and_samples_the_same_on_every_mesh(name):
    """Caches, rings and experts in decode; whole sequences under a scan in training."""
    cfg, by_mesh = FAMILIES[name], []
    meshes = [(1, 1, 1), (2, 2, 2), *([(1, 2, 2, 2)] if cfg.experts else [])]
    for sizes in meshes:
        rollouts, params, train = sample(cfg, sizes, params=make_params(cfg, layouts(sizes)[0], noise=0.2))
        by_mesh.append(rollouts)
        if sizes in (meshes[0], (1, 2, 2, 2)):
            batch, scored = scores(rollouts, params, train, cfg)
            difference = np.abs(np.asarray(scored.logprobs) - batch.behavior_logprobs)[batch.loss_mask]
            print(f"{sizes}: mean {difference.mean():.1e}, max {difference.max():.1e} of {difference.size}")
            assert difference.size == rollouts.sampled.sum() > 50
            assert difference.mean() <= 1e-5
            assert difference.max() <= 5e-4
    for other in by_mesh[1:]:
        np.testing.assert_array_equal(other.tokens, by_mesh[0].tokens)
        np.testing.assert_array_equal(other.finish, by_mesh[0].finish)
        np.testing.assert_allclose(other.behavior_logprobs, by_mesh[0].behavior_logprobs, atol=1e-4)


@pytest.mark.slow
def test_gradients_through_experts_do_not_depend_on_the_mesh():
    """Rows, parameters, widths and experts sharded over 1 x 2 x 2 x 2 devices, rematerialized in the scan, against one device."""
    cfg, gradients = FAMILIES["qwen3-moe"], []
    rollouts, _, _ = sample(cfg, params=make_params(cfg, layouts()[0], noise=0.2))
    batch = to_batch(to_experience(rollouts))
    for sizes in ((1, 1, 1), (1, 2, 2, 2)):
        train, _ = layouts(sizes)
        params = make_params(cfg, train, noise=0.2)
        placed = hosts.put(batch, train.sharding(("rows", None)))

        def loss(params, batch, train=train):
            scored = score_tokens(params, batch, Scoring(cfg, train, VOCAB.size))
            return jnp.sum(jnp.where(batch.loss_mask, scored.logprobs + 0.1 * scored.entropy, 0.0))

        gradients.append(hosts.gather(jax.jit(jax.grad(loss))(params, placed)))
    # Measured 1e-6 of the largest entry: f32 sums over 24 rows in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max()), *gradients)
    assert all(np.abs(x).max() > 1e-3 for x in jax.tree.leaves(gradients[0]))


@pytest.mark.slow
@pytest.mark.parametrize("window", [1, C, 7, 20])
def test_a_sliding_layer_caches_its_window_and_decodes_like_the_trainer(window):
    """Windows of one token, of the completion, of the prompt, and longer than both; 3, 5 and 9 are tested above."""
    cfg = dataclasses.replace(TINY, layers=1, window=window, sliding=(True,))
    cache, suffix = check_prefill_and_decode(cfg)
    assert cache.k[0].shape[2] == cache.v[0].shape[2] == min(window, 7)
    assert suffix.k[0].shape[2] == suffix.v[0].shape[2] == min(window, C)
    if window == C:
        # Mutant: a window of one key too many fails the check.
        with pytest.raises(AssertionError):
            check_prefill_and_decode(cfg, trained=dataclasses.replace(cfg, window=window + 1))

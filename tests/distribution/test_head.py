"""The head in tiles of logits: values and gradients equal the dense form on every mesh, and unneeded work is skipped."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from setups import MESHES, TINY, layouts

from jaxrl_llm.control.automaton import REFUSED, token_automaton
from jaxrl_llm.distribution import head, score
from jaxrl_llm.distribution.control_tables import ControlTables, allowed_tokens, encode, join_automata
from jaxrl_llm.distribution.logits import entropy, kept_logprobs, process_logits
from jaxrl_llm.distribution.score import Scoring, score_tokens
from jaxrl_llm.parallel import hosts
from jaxrl_llm.types import Batch

R, T, D, V, K = 8, 11, 16, 40, 5
ENDS = (3, 7)
CFG = replace(TINY, d_model=D, vocab_size=V)
# Forward chunks of 8 tokens; backward chunks of 10 against blocks of 15 vocabulary entries. The last chunk and the last block
# overlap the ones before, both with one device (88 tokens, 40 entries) and with shards (22 or 11 tokens, 40 or 20 entries).
SMALL = head.TileSize(logits=4 * V, tokens=10)


def random_tables(num_tokens: int) -> ControlTables:
    """Two automata of 6 and 3 states that refuse a third of their transitions, over 40 and over 9 classes."""
    rng = np.random.default_rng(num_tokens)
    found = []
    for states, kinds in ((6, 40), (3, 9)):
        classes = rng.integers(0, kinds, num_tokens)
        classes[list(ENDS)] = kinds
        following = np.where(
            rng.random((states, kinds + 1)) < 0.3, REFUSED, rng.integers(0, states, (states, kinds + 1))
        )
        found.append(token_automaton(classes, following, rng.integers(0, 3, states), 0, np.zeros(states, bool)))
    return join_automata(found, num_tokens, ENDS, V)[0]


TABLES = {num_tokens: random_tables(num_tokens) for num_tokens in (V, V - 3, V - 5)}


def codes_of(rng: np.random.Generator, tokens: np.ndarray, num_tokens: int) -> np.ndarray:
    """Random entries of `control_state` under which the tokens are allowed; a third of the rows are free."""
    tables = TABLES[num_tokens]
    states = np.arange(10)
    fits = (tables.after(states[:, None], tokens.reshape(1, -1)) != REFUSED).T
    state = np.array([rng.choice(states[row]) for row in fits]).reshape(tokens.shape)
    state[::3] = 0
    return encode(state, rng.integers(3, 6, tokens.shape), rng.random(tokens.shape) < 0.5).astype(np.int32)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Activations are a parameter here; the layers below the head have their own tests."""
    monkeypatch.setattr(score, "hidden", lambda params, *_: params["h"])
    monkeypatch.setattr(head, "CPU", SMALL)
    monkeypatch.setattr(head, "MIN_TOKENS", 8)
    monkeypatch.setattr(head, "BLOCK_MULTIPLE", 3)


def make_params(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    value = {"kernel": normal(D), "bias": np.float32(0.5)}
    return {"embed": 0.5 * normal(V, D), "h": normal(R, T, D), "value": value}


def make_batch(
    num_tokens: int, kept_tokens: bool = False, controlled: bool = False, temperature: float | None = 1.0
) -> Batch:
    """Ragged loss masks, one row empty; `temperature` None: varies per slot, and 0 outside the mask."""
    rng = np.random.default_rng(1)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    tokens = rng.integers(8, num_tokens, (R, T)).astype(np.int32)
    mask = rng.random((R, T)) < 0.6
    mask[2] = False
    mask[:, 0] = False
    slots = np.broadcast_to(np.arange(T, dtype=np.int32), (R, T))
    # As in a tree: some tokens follow an earlier token than the previous one, several follow the same one.
    before = np.maximum(np.where(rng.random((R, T)) < 0.3, 1, slots - 1), 0).astype(np.int32)
    if temperature is None:
        temps = np.where(mask, rng.choice(np.float32([0.6, 1.0, 1.7]), (R, T)), np.float32(0))
    else:
        temps = np.full((R, T), temperature, np.float32)
    kept = None
    if kept_tokens:
        kept = np.stack([rng.permutation(np.arange(8, num_tokens))[:K] for _ in range(R * T)]).reshape(R, T, K)
        kept[..., 0] = tokens
        kept = np.where((kept == tokens[..., None]) & (np.arange(K) > 0), -1, kept)
        kept[..., 3:] = np.where(rng.random((R, T, 1)) < 0.5, -1, kept[..., 3:])
        kept = np.where(mask[..., None], kept, -1).astype(np.int32)
    return Batch(
        tokens=tokens, position=slots, until=slots, before=before, segment=slots, group=slots, loss_mask=mask,
        weight=np.where(mask, normal(R, T), 0), behavior_logprobs=normal(R, T), advantage=normal(R, T), temperature=temps,
        kept_tokens=kept, control_state=codes_of(rng, tokens, num_tokens) if controlled else None,
    )  # fmt: skip


def dense(params, batch, cfg, num_tokens, reference):
    """All logits at once, differentiated by jax.grad."""

    def logp(params):
        h = jnp.take_along_axis(params["h"], batch.before[:, :, None], axis=1)
        x = jnp.einsum("rtd,vd->rtv", h, params["embed"], precision="highest")
        x = x if cfg.logit_softcap is None else cfg.logit_softcap * jnp.tanh(x / cfg.logit_softcap)
        if batch.kept_tokens is not None:
            return kept_logprobs(x, batch.temperature, batch.kept_tokens)
        if batch.control_state is None:
            return process_logits(x, batch.temperature, num_tokens)
        return process_logits(
            x,
            batch.temperature,
            num_tokens,
            allowed_tokens(jax.tree.map(jnp.asarray, TABLES[num_tokens]), batch.control_state),
        )

    p, q = logp(params), jax.lax.stop_gradient(logp(reference))
    if batch.kept_tokens is None:
        logprob = jnp.take_along_axis(p, batch.tokens[..., None], axis=-1)[..., 0]
    else:
        logprob = jnp.sum(jnp.where(batch.kept_tokens == batch.tokens[..., None], p, 0.0), axis=-1)
    seen = p > -jnp.inf
    kl = jnp.sum(jnp.where(seen, jnp.exp(p) * (jnp.where(seen, p, 0) - jnp.where(seen, q, 0)), 0.0), axis=-1)
    h = jnp.take_along_axis(params["h"], batch.before[:, :, None], axis=1)
    values = h @ params["value"]["kernel"] + params["value"]["bias"]
    return tuple(jnp.where(batch.loss_mask, x, 0.0) for x in (logprob, entropy(p), values, kl))


WEIGHTS = np.random.default_rng(2).normal(size=(4, R, T)).astype(np.float32)


def gradients(scores, batch):
    """Gradients of a sum in which every token has its own weight for each of the four scores."""

    def loss(params, reference):
        of = scores(params, reference)
        return sum(jnp.sum(jnp.where(batch.loss_mask, x, 0.0) * w) for x, w in zip(of, WEIGHTS, strict=True)), of

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)


CASES = {
    "plain": ({}, V, None),
    "temperatures": ({"temperature": None}, V, None),
    "padding and controls": ({"controlled": True, "temperature": 0.7}, V - 5, None),
    "kept_tokens": ({"kept_tokens": True, "temperature": 0.7}, V, None),
    "soft cap": ({"temperature": 0.7}, V, 1.5),
    "soft cap, kept tokens": ({"kept_tokens": True, "temperature": None}, V, 1.5),
    "all": ({"controlled": True, "temperature": None}, V - 3, 2.0),
}


def check_close(got, want):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * max(1, np.abs(b).max()), err_msg=jax.tree_util.keystr(path))


@cache
def tiled_result(case: str, sizes: tuple[int, ...]):
    changes, num_tokens, cap = CASES[case]
    cfg, train, batch = replace(CFG, logit_softcap=cap), layouts(sizes)[0], make_batch(num_tokens, **changes)

    tables = jax.tree.map(jnp.asarray, TABLES[num_tokens])

    def tiled(params, reference):
        return score_tokens(params, batch, Scoring(cfg, train, num_tokens), reference, tables)

    program = jax.jit(gradients(tiled, batch))
    return hosts.gather(program(make_params(0), make_params(1)))


@cache
def dense_result(case: str):
    changes, num_tokens, cap = CASES[case]
    cfg, batch = replace(CFG, logit_softcap=cap), make_batch(num_tokens, **changes)
    program = jax.jit(gradients(lambda p, q: dense(p, batch, cfg, num_tokens, q), batch))
    return hosts.gather(program(make_params(0), make_params(1)))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_dense_form(case):
    ((loss, of), (got, reference_gradients)), ((want_loss, want_of), (want, _)) = (
        tiled_result(case, MESHES[0]),
        dense_result(case),
    )
    mask = make_batch(V).loss_mask
    check_close([np.where(mask, x, 0) for x in of], list(want_of))
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
    check_close(got, want)
    assert min(np.abs(x).max() for x in jax.tree.leaves(got)) > 1e-2
    assert max(np.abs(x).max() for x in jax.tree.leaves(reference_gradients)) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "sizes"),
    [*(("all", sizes) for sizes in MESHES[1:]), ("kept_tokens", (2, 2, 2)), ("kept_tokens", (1, 4, 2))],
)
def test_does_not_depend_on_the_mesh(case, sizes):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6 * max(1, np.abs(b).max())),
        tiled_result(case, sizes),
        tiled_result(case, MESHES[0]),
    )


def test_no_gradient_flows_at_temperature_0():
    """Greedy tokens have log-prob and entropy 0 and no gradient; the other tokens keep theirs."""
    params, batch = make_params(), make_batch(V)
    cold = batch.loss_mask & (np.arange(T) % 2 == 0)
    best = (np.take_along_axis(params["h"], batch.before[..., None], axis=1) @ params["embed"].T).argmax(axis=-1)
    batch = batch.replace(
        temperature=np.where(cold, 0, 1).astype(np.float32), tokens=np.where(cold, best, batch.tokens).astype(np.int32)
    )

    def loss(params, batch):
        of = score_tokens(params, batch, Scoring(CFG, layouts()[0], V))
        return jnp.sum(of.logprobs + of.entropy), of

    program = jax.jit(jax.grad(loss, has_aux=True))
    got, of = program(params, batch)
    np.testing.assert_array_equal([of.logprobs[cold], of.entropy[cold]], 0)
    warm, _ = program(params, batch.replace(loss_mask=batch.loss_mask & ~cold))
    assert np.abs(warm["h"]).max() > 0.1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, warm)


def test_tokens_outside_the_mask_cost_nothing():
    """The rule is evaluated once per chunk of 8 tokens of the largest shard, and never with an empty loss mask."""
    seen = []

    class Sum:
        needs_full_vocabulary = False

        def value(self, x, y, block, inputs):
            jax.debug.callback(lambda _: seen.append(1), x[0, 0, 0])
            return jnp.sum(x, axis=-1)

    rng = np.random.default_rng(0)
    h = rng.normal(size=(2, 23, D)).astype(np.float32)
    source = head.HeadInputs(rng.normal(size=(V, D)).astype(np.float32), h)
    of = head.Head("float32", None, layouts((1, 2, 1))[0])
    program = jax.jit(lambda count: head.over_logits(Sum(), of, source, None, (), count))
    for count, chunks in (([0, 0], 0), ([8, 1], 1), ([3, 9], 2), ([23, 0], 3)):
        seen.clear()
        got = program(jnp.array(count))
        jax.effects_barrier()
        assert len(seen) == chunks
        want = np.where(np.arange(23) < np.array(count)[:, None], (h @ source.table.T).sum(axis=-1), 0)
        np.testing.assert_allclose(got, want, atol=1e-4)

"""On the first update the ratio is 1 under every control: sampled by the engine, scored by the update over the same tokens."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from controlled import CONTROLS, MODEL, VOCAB, G, P, policy, sampler
from setups import layouts, make_params, make_prompts, to_batch, to_experience

from jaxrl_llm.distribution import score
from jaxrl_llm.distribution.control_tables import allowed_tokens
from jaxrl_llm.distribution.score import Scoring, score_tokens
from jaxrl_llm.model import params as model_params
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.losses import make_loss
from jaxrl_llm.parallel import hosts
from jaxrl_llm.types import check
from jaxrl_llm.update.optimizer.config import AdamW
from jaxrl_llm.update.optimizer.state import make_init_state
from jaxrl_llm.update.optimizer.transform import make_optimizer
from jaxrl_llm.update.step import jit_update

KEY = jax.random.key(1)
DRAWS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "top-p": {"top_p": 0.9},
    "top-k and min-p": {"top_k": 5, "min_p": 0.05},
    "minimum length": {"min_new_tokens": 4},
}


@cache
def drawn(draw: str, sizes: tuple[int, ...] = (1, 1, 1)):
    """Rollouts with prompt p under control p, and the tables."""
    engine = sampler(sizes, **DRAWS[draw])
    controls = engine.controls(P, control=list(CONTROLS.values()))
    return check(engine.generate(policy(sizes), make_prompts(P), KEY, controls)), engine.tables


@cache
def programs(sizes: tuple[int, ...]):
    specs, optimizer, train = model_params.specs(MODEL), make_optimizer(AdamW()), layouts(sizes)[0]
    update = jit_update(specs, make_loss(ObjectiveConfig()), optimizer, Scoring(MODEL, train, VOCAB.size))
    return make_init_state(specs, optimizer, train), update, make_params(MODEL, train, sharpness=2.0)


def first_update(batch, tables, sizes=(1, 1, 1)) -> dict[str, float]:
    start, update, params = programs(sizes)
    train = layouts(sizes)[0]
    state = start(jax.tree.map(jnp.copy, params), hosts.put(np.int32(0), train.replicated))
    tables = hosts.put(tables, train.replicated)
    _, metrics = update(state, hosts.put(batch, train.sharding(("rows", None))), None, tables)
    return {name: float(x) for name, x in metrics.items()}


def batch_of(of, packing="none", shards=1):
    advantage = np.random.default_rng(0).normal(size=P * G).astype(np.float32)
    return check(to_batch(to_experience(of, advantage), packing, shards=shards))


def check_ratios(metrics: dict[str, float]) -> None:
    # f32 sums of a few dozen products in another order.
    assert max(abs(metrics["ratio/max"] - 1), abs(metrics["ratio/min"] - 1)) <= 1e-3
    assert np.isfinite(metrics["grad_norm"]) and metrics["grad_norm"] > 0


@pytest.mark.parametrize(
    ("draw", "packing"), [*((d, "none") for d in DRAWS), ("plain", "plain"), ("plain", "shared_prefix")]
)
def test_the_ratio_is_1(draw, packing):
    of, tables = drawn(draw)
    metrics = first_update(batch_of(of, packing), tables)
    check_ratios(metrics)
    np.testing.assert_allclose(metrics["entropy"], of.entropy[of.sampled].mean(), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("draw", [pytest.param("plain", marks=pytest.mark.soak), "top-p"])
def test_the_ratio_is_1_on_a_mesh(draw):
    of, tables = drawn(draw, (2, 2, 2))
    check_ratios(first_update(batch_of(of, shards=4), tables, (2, 2, 2)))


def test_scored_over_the_whole_vocabulary_it_is_not():
    """The mutant that forgets the mask: other log-probs, and another entropy."""
    of, tables = drawn("plain")
    batch = batch_of(of)
    metrics = first_update(batch.replace(control_state=np.zeros_like(batch.control_state)), tables)
    assert metrics["ratio/min"] < 0.5
    assert metrics["entropy"] > 1.2 * of.entropy[of.sampled].mean()


def test_each_row_needs_its_own_state():
    """The mutant that takes the state of the token before: the mask of another slot."""
    of, tables = drawn("plain")
    batch = batch_of(of)
    late = np.take_along_axis(batch.control_state, batch.before, axis=1)
    late = np.where(batch.loss_mask, late, batch.control_state)
    assert not abs(first_update(batch.replace(control_state=late), tables)["ratio/min"] - 1) < 1e-2


def test_the_room_that_a_row_had_is_part_of_its_mask():
    """The mutant that records the state alone: near the limit, more would seem to have been allowed."""
    engine = sampler()
    controls = engine.controls(P, control=CONTROLS["regex"])
    of, tables = engine.generate(policy(), make_prompts(P), KEY, controls, np.full(P, 3)), engine.tables
    batch = batch_of(of)
    check_ratios(first_update(batch, tables))
    states = batch.control_state & (2**19 - 1)
    assert first_update(batch.replace(control_state=states), tables)["ratio/min"] < 1 - 1e-2


def test_forced_tokens_are_never_in_the_loss():
    of, _ = drawn("plain")
    forced = (np.arange(of.tokens.shape[1]) < of.length[:, None]) & ~of.sampled
    assert forced.sum() >= 2 * G
    assert not (to_experience(of).loss_mask & forced).any()
    assert batch_of(of).loss_mask.sum() == of.sampled.sum()


def kl_by_hand(batch, tables, params, reference) -> np.ndarray:
    """Sum over the allowed tokens of p (log p - log q), both renormalized over them."""
    layout, allowed = layouts()[0], allowed_tokens(jax.tree.map(jnp.asarray, tables), batch.control_state).mask
    logps = []
    for tree in (params, reference):
        h = score.hidden(
            tree, batch.tokens, batch.position, batch.until, MODEL, layout, Scoring(MODEL, layout, 16).forward
        )
        h = np.take_along_axis(np.asarray(h, np.float64), batch.before[..., None], axis=1)
        x = np.where(allowed, h @ np.asarray(tree["embed"], np.float64).T, -np.inf)
        top = x.max(axis=-1, keepdims=True)
        logps.append(x - top - np.log(np.exp(x - top).sum(axis=-1, keepdims=True)))
    p, q = logps
    seen = p > -np.inf
    each = np.where(seen, np.exp(p) * (np.where(seen, p, 0) - np.where(seen, q, 0)), 0)
    return np.where(batch.loss_mask, each.sum(axis=-1), 0)


def kl(batch, tables, params, reference):
    scored = score_tokens(
        params, batch, Scoring(MODEL, layouts()[0], VOCAB.size), reference, jax.tree.map(jnp.asarray, tables)
    )
    return np.asarray(scored.kl)


def test_the_kl_is_that_of_the_allowed_tokens(monkeypatch):
    """And the mutant that masks the policy's logits alone is seen."""
    (of, tables), params, reference = drawn("plain"), programs((1, 1, 1))[2], make_params(MODEL, layouts()[0], seed=1)
    batch = batch_of(of)
    want = kl_by_hand(batch, tables, params, reference)
    # Sums of 16 terms in f32.
    np.testing.assert_allclose(kl(batch, tables, params, reference), want, atol=1e-4)
    masked, calls = score._FullVocabulary._mask, []

    def forgetful(self, x, block, inputs):
        calls.append(1)
        return masked(self, x, block, inputs if len(calls) % 2 else inputs._replace(words=None))

    monkeypatch.setattr(score._FullVocabulary, "_mask", forgetful)
    assert np.abs(kl(batch, tables, params, reference) - want).max() > 0.1

"""The update: the same gradient however the minibatch is cut and wherever it lies; the old-logprob contract, and its mutants."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from setups import (
    EACH_MESH,
    MESHES,
    SMALL,
    VOCAB,
    generator,
    layouts,
    make_params,
    make_policy,
    make_prompts,
    to_batch,
    to_experience,
)

from jaxrl_llm.distribution.loss_terms import Terms
from jaxrl_llm.distribution.score import Scoring, score_tokens
from jaxrl_llm.model import params as model_params
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.loss_config import KlConfig, PolicyGradient, Reinforce, TruncatedImportance
from jaxrl_llm.objective.losses import UNCORRECTED, as_loss, make_loss
from jaxrl_llm.parallel import hosts
from jaxrl_llm.types import Rollouts, TrainState
from jaxrl_llm.update.optimizer.config import AdamW
from jaxrl_llm.update.optimizer.state import make_init_state
from jaxrl_llm.update.optimizer.transform import make_optimizer
from jaxrl_llm.update.step import jit_update

P, G, C = 16, 4, 6
SPECS = model_params.specs(SMALL)
LR = AdamW(lr=1e-2)
CLIPPED = PolicyGradient()


@cache
def rollouts(temperature: float = 1.0) -> Rollouts:
    """Ragged, of a small random policy; G samples of P prompts."""
    train, decode = layouts()
    params = make_params(SMALL, train)
    policy = make_policy(SMALL, params, train, decode)
    return generator(G, C, SMALL, decode)(policy, make_prompts(P), jax.random.key(3), temperature)


def batch(temperature: float = 1.0, aggregation: str = "token"):
    """Rewarded for odd sums of tokens, less the mean of the group's others."""
    reward = (rollouts(temperature).tokens.sum(axis=1) % 2).astype(np.float32).reshape(P, G)
    advantage = G / (G - 1) * (reward - reward.mean(axis=1, keepdims=True))
    return to_batch(to_experience(rollouts(temperature), advantage.reshape(-1)), aggregation=aggregation, length=C)


@cache
def starter(train):
    return make_init_state(SPECS, make_optimizer(LR), train)


def begin(train) -> TrainState:
    return starter(train)(make_params(SMALL, train), hosts.put(np.int32(0), train.replicated))


@cache
def scorer(train):
    return jax.jit(lambda p, b: score_tokens(p, b, Scoring(SMALL, train, 16)).logprobs)


@cache
def updater(train, loss=CLIPPED, micro_batches=1, optimizer=LR, correction=UNCORRECTED):
    return jit_update(
        SPECS,
        make_loss(ObjectiveConfig(loss=loss), correction),
        make_optimizer(optimizer),
        Scoring(SMALL, train, 16),
        micro_batches=micro_batches,
    )


def run_updates(n, data, sizes=(1, 1, 1), **options):
    """n updates on the same data; the final state as NumPy and the metrics of each."""
    train, _ = layouts(sizes)
    update, state, metrics = updater(train, **options), begin(train), []
    placed = hosts.put(data, train.sharding(("rows", None)))
    for _ in range(n):
        state, m = update(state, placed)
        metrics.append({k: float(v) for k, v in m.items()})
    return jax.device_get(state), metrics


# --- normalization -------------------------------------------------------------------------------------------------------

# One step of Adam hides the gradient's size, so read it off Adam's first moment, which with b1 = 0 is the last gradient.
UNCLIPPED = AdamW(lr=1e-3, b1=0.0, max_grad_norm=1e9)


def gradient(data=None, **options):
    state, _ = run_updates(1, batch() if data is None else data, optimizer=UNCLIPPED, **options)
    return state.opt_state[1].mu


def assert_equal_gradients(a, b):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("aggregation", "micro_batches"),
    [
        pytest.param("token", 2, marks=pytest.mark.soak),
        ("token", 4),
        pytest.param("token", 8, marks=pytest.mark.soak),
        ("sequence", 4),
        ("constant", 4),
    ],
)
def test_the_gradient_does_not_depend_on_micro_batches(aggregation, micro_batches):
    assert len(set(rollouts().length.tolist())) > 2, "the lengths must be ragged for this to mean anything"
    data = batch(aggregation=aggregation)
    assert_equal_gradients(gradient(data), gradient(data, micro_batches=micro_batches))


@pytest.mark.slow
def test_local_means_would_depend_on_micro_batches():
    """The mutant: each micro-batch normalized by its own count and the micro-batches averaged. With ragged lengths it must show."""
    data, whole = batch(), gradient()
    own = data.loss_mask / np.stack([data.loss_mask[i::2].sum() for i in range(2)] * (P * G // 2))[:, None]
    mean = gradient(data.replace(weight=(own / 2).astype(np.float32)))
    assert max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(mean), strict=True)) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("sizes", EACH_MESH)
def test_gradient_and_three_losses_do_not_depend_on_the_mesh(sizes):
    (one, losses), (other, other_losses) = (run_updates(3, batch(), s, optimizer=UNCLIPPED) for s in (MESHES[0], sizes))
    np.testing.assert_allclose([m["loss"] for m in losses], [m["loss"] for m in other_losses], atol=1e-5)
    np.testing.assert_allclose([m["grad_norm"] for m in losses], [m["grad_norm"] for m in other_losses], rtol=1e-4)
    assert_equal_gradients(gradient(), gradient(sizes=sizes))
    assert int(one.step) == int(other.step) == 3


# --- the old-logprob contract, two-sided ---------------------------------------------------------------------------------


def assert_contract(data, updates=4):
    """The first update on fresh data has ratio 1 and clips nothing; later ones do not and do."""
    _, metrics = run_updates(updates, data)
    first, later = metrics[0], metrics[1:]
    assert max(first["ratio/max"] - 1, 1 - first["ratio/min"]) <= 1e-3
    assert abs(first["ratio/mean"] - 1) <= 1e-4
    assert first["clip_ratio/low"] == first["clip_ratio/high"] == 0
    assert all(m["ratio/max"] - m["ratio/min"] > 1e-2 for m in later)
    assert max(m["clip_ratio/low"] + m["clip_ratio/high"] for m in later) > 0


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
def test_old_logprob_contract(temperature):
    assert_contract(batch(temperature))


def test_lagged_data_has_ratios_from_the_first_update_on():
    train, _ = layouts()
    update, state = updater(train), begin(train)
    placed = hosts.put(batch(), train.sharding(("rows", None)))
    for _ in range(4):
        state, _ = update(state, placed)
    # The same experience again, four versions later: the first update on it is not on-policy any more.
    _, metrics = update(state, placed)
    assert metrics["ratio/max"] - metrics["ratio/min"] > 1e-2


def test_mutant_recomputed_logprobs_is_killed():
    """behavior = the trainer's current log-probs, before each update: the ratio never leaves 1 and no clip ever fires."""
    train, _ = layouts()
    update, state, data, metrics = updater(train), begin(train), batch(), []
    for _ in range(4):
        placed = hosts.put(data, train.sharding(("rows", None)))
        state, m = update(state, placed.replace(behavior_logprobs=scorer(train)(state.params, placed)))
        metrics.append(m)
    # Another compilation of the same sums: ratios within rounding of 1 in every update, so the contract's second half fails.
    assert all(abs(m["ratio/max"] - 1) < 1e-4 and m["clip_ratio/high"] == 0 for m in metrics)
    with pytest.raises(AssertionError):
        assert all(m["ratio/max"] - m["ratio/min"] > 1e-2 for m in metrics[1:])


MUTANTS = {
    "scorer ignores the temperature": lambda b: b.replace(temperature=np.ones_like(b.temperature)),
    "log-probs divided by the temperature": lambda b: b.replace(behavior_logprobs=b.behavior_logprobs * 0.6),
    "log-probs one slot off": lambda b: b.replace(behavior_logprobs=np.roll(b.behavior_logprobs, 1, axis=1)),
    "prompt tokens in the loss mask": lambda b: b.replace(loss_mask=b.group > 0),
}


@pytest.mark.parametrize("mutate", MUTANTS.values(), ids=MUTANTS)
def test_mutants_of_the_scored_distribution_are_killed(mutate):
    data = batch(0.6)
    assert_contract(data)
    with pytest.raises(AssertionError):
        assert_contract(mutate(data))


def test_the_end_token_is_in_the_loss():
    """The mutant without it passes every ratio test, so ask for the mask itself."""
    data, ended = batch(), rollouts().finish == 0
    assert 5 < ended.sum() < len(ended)
    assert (data.loss_mask & np.isin(data.tokens, VOCAB.eos)).sum() == ended.sum()
    assert data.loss_mask.sum() == rollouts().length.sum()


# --- what an update may and may not touch --------------------------------------------------------------------------------


def unchanged(before, after):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))


def after_one_more(data):
    """State after one good update, and after another on `data`."""
    train, _ = layouts()
    update = updater(train)
    placed = lambda b: hosts.put(b, train.sharding(("rows", None)))  # noqa: E731
    state, _ = update(begin(train), placed(batch()))
    before = jax.tree.map(np.array, jax.device_get((state.params, state.opt_state)))
    state, metrics = update(state, placed(data))
    return before, jax.device_get((state.params, state.opt_state)), metrics


def test_a_minibatch_without_a_token_changes_nothing():
    before, after, metrics = after_one_more(batch().replace(loss_mask=np.zeros_like(batch().loss_mask)))
    assert unchanged(before, after)
    assert metrics["nonfinite"] == 0


def test_a_non_finite_loss_changes_nothing_and_is_counted():
    data = batch()
    data.advantage[3, 8] = np.nan
    data.loss_mask[3, 8] = True
    data.weight[3, 8] = 1.0
    before, after, metrics = after_one_more(data)
    assert unchanged(before, after)
    assert metrics["nonfinite"] == 1


def test_a_good_minibatch_changes_every_parameter():
    before, after, _ = after_one_more(batch())
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(before[0]), jax.tree.leaves(after[0]), strict=True):
        assert not np.array_equal(a, b), jax.tree_util.keystr(path)


def test_the_state_is_donated_and_the_batch_is_not():
    train, _ = layouts()
    state, placed = begin(train), hosts.put(batch(), train.sharding(("rows", None)))
    updater(train)(state, placed)
    assert all(x.is_deleted() for x in jax.tree.leaves((state.params, state.opt_state)))
    assert not placed.tokens.is_deleted()


@pytest.mark.slow
def test_kl_pulls_back_to_the_reference_and_is_zero_on_it():
    train, _ = layouts()
    params, data = make_params(SMALL, train), batch()
    placed = hosts.put(data, train.sharding(("rows", None)))
    data = data.replace(reference_logprobs=np.asarray(scorer(train)(params, placed)))
    _, metrics = run_updates(3, data, loss=PolicyGradient(kl=KlConfig(weight=0.5)))
    # The update recompiles the same sums, so the first is rounding, squared.
    assert metrics[0]["kl"] < 1e-9
    assert metrics[2]["kl"] > 1e-4


def test_optimizer_by_hand():
    """Adam's first step is lr * sign(g); warm-up takes a tenth of it at the first of ten steps; decay adds lr * wd * w."""
    weights, grads = {"w": jnp.array([[2.0, -4.0]])}, {"w": jnp.array([[0.3, -0.4]])}

    def first_step(cfg):
        optimizer = make_optimizer(cfg)
        return optimizer.update(grads, optimizer.init(weights), weights)[0]["w"][0]

    np.testing.assert_allclose(first_step(AdamW(lr=1e-2)), [-1e-2, 1e-2], rtol=1e-5)
    np.testing.assert_allclose(first_step(AdamW(lr=1e-2, warmup_steps=10)), [-1e-3, 1e-3], rtol=1e-5)
    np.testing.assert_allclose(first_step(AdamW(lr=1e-2, weight_decay=0.5)), [-2e-2, 3e-2], rtol=1e-5)
    # The first update is number 1: one of four steps down from 1e-2 to 2e-3.
    decay = AdamW(lr=1e-2, decay_steps=4, final_lr=2e-3)
    np.testing.assert_allclose(first_step(decay), [-8e-3, 8e-3], rtol=1e-5)
    # Norm 0.5, clipped to 0.05: a tenth of the gradient arrives at Adam's first moment, times 1 - b1.
    optimizer = make_optimizer(AdamW(max_grad_norm=0.05))
    _, state = optimizer.update(grads, optimizer.init(weights), weights)
    np.testing.assert_allclose(state[1].mu["w"], [[0.003, -0.004]], rtol=1e-5)


@pytest.mark.slow
def test_a_loss_of_ones_own_steps_as_the_built_in_one_does():
    """REINFORCE from both, to the bit; `mine` is named in no config."""

    def mine(scores, part):
        return Terms(-part.advantage * scores.logprobs, {"mine": 0 * scores.logprobs + 3})

    train, _ = layouts()
    loss = as_loss(mine, columns=("reference_logprobs",))
    update = jit_update(SPECS, loss, make_optimizer(LR), Scoring(SMALL, train, 16), micro_batches=2)
    state, metrics = update(begin(train), hosts.put(batch(), train.sharding(("rows", None))))
    want, (logged,) = run_updates(1, batch(), loss=PolicyGradient(surrogate=Reinforce()), micro_batches=2)
    for a, b in zip(jax.tree.leaves(jax.device_get(state)), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(metrics["mine"], 3, rtol=1e-6)
    for name in ("loss", "entropy", "ratio/max", "ratio/min", "mismatch/kl"):
        assert float(metrics[name]) == logged[name]


@pytest.mark.slow
def test_bfloat16_trains_float32_masters():
    cfg = dataclasses.replace(SMALL, compute="bfloat16")
    train, _ = layouts()
    loss, optimizer = make_loss(ObjectiveConfig()), make_optimizer(LR)
    update = jit_update(SPECS, loss, optimizer, Scoring(cfg, train, 16))
    state, metrics = update(begin(train), hosts.put(batch(), train.sharding(("rows", None))))
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert np.isfinite(metrics["grad_norm"]) and metrics["mismatch/max_abs_dlogp"] < 0.3


@pytest.mark.slow
def test_an_update_weighs_each_token_once():
    """A sampler that gave every token e^-1 of its probability: all weights are at the cap, and the gradient is twice as large."""
    data = batch()
    plain = gradient()
    shifted = data.replace(behavior_logprobs=np.where(data.loss_mask, data.behavior_logprobs - 1, 0).astype(np.float32))
    doubled = gradient(shifted, correction=TruncatedImportance(cap=2.0))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(doubled), strict=True):
        np.testing.assert_allclose(b, 2 * a, rtol=1e-3, atol=1e-5)
    _, (metrics,) = run_updates(1, shifted, correction=TruncatedImportance(cap=2.0))
    assert metrics["ratio/min"] == metrics["ratio/max"] == 1
    np.testing.assert_allclose(metrics["mismatch/kl"], np.e - 2, rtol=1e-3)
    np.testing.assert_allclose(metrics["mismatch/mean_abs_dlogp"], 1, rtol=1e-3)
    np.testing.assert_allclose([metrics["mismatch/weight_mean"], metrics["mismatch/truncated"]], [2, 1], rtol=1e-5)

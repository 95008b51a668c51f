"""The effective sample size of an update, against a loop over sequences, however they lie in the batch; the learning rate by it;
and each token's ratio to the policy that sampled it, in batches of samples of several policies."""

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from setups import SMALL, VOCAB, Sequences, generator, layouts, make_params, make_policy, make_prompts, to_experience

from jaxrl_llm.distribution.score import Scoring, TokenScores
from jaxrl_llm.model import params as model_params
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.loss_config import PolicyGradient, Reinforce
from jaxrl_llm.objective.losses import UNCORRECTED, make_loss, policy_terms
from jaxrl_llm.parallel import hosts
from jaxrl_llm.types import Credit, Experience
from jaxrl_llm.update import effective_sample_size as ess
from jaxrl_llm.update.batch import fill_batch, to_completions
from jaxrl_llm.update.config import EssScaling
from jaxrl_llm.update.optimizer.config import AdamW
from jaxrl_llm.update.optimizer.state import make_init_state
from jaxrl_llm.update.optimizer.transform import make_optimizer
from jaxrl_llm.update.packing import batch_shape, equal_groups
from jaxrl_llm.update.step import jit_score, jit_update

GROUPS, SAMPLES, S, C = 6, 4, 4, 5


def by_loop(log_ratio, mask) -> dict[str, float]:
    """ESS / N in float64, sequence by sequence; weights relative to the largest, which cancels."""

    def share(logs):
        w = [math.exp(x - max(logs)) for x in logs]
        return sum(w) ** 2 / sum(x * x for x in w) / len(w)

    sequences = [sum(map(float, row[here])) for row, here in zip(log_ratio, mask, strict=True) if here.any()]
    return {"sequences": share(sequences), "tokens": share([float(x) for x in log_ratio[mask]])}


def ragged(seed: int, scale: float) -> Sequences:
    """Sequences whose log-ratios are in the column `advantage`; some have no token in the loss, some tokens are not in it."""
    rng, rows = np.random.default_rng(seed), GROUPS * SAMPLES
    length = rng.integers(3, C + 1, rows).astype(np.int32)
    learn = (np.arange(C) < length[:, None]) & (rng.random((rows, C)) < 0.8)
    learn[::5] = False
    log_ratio = (scale * rng.standard_t(2, (rows, C))).astype(np.float32)
    zeros = np.zeros((rows, C), np.float32)
    return Sequences(
        prompt=np.ones((rows, S), np.int32),
        prompt_length=np.repeat(rng.integers(1, S + 1, GROUPS), SAMPLES).astype(np.int32),
        tokens=np.ones((rows, C), np.int32), length=length, group=np.repeat(np.arange(GROUPS), SAMPLES).astype(np.int32),
        loss_mask=learn, temperature=np.ones(rows, np.float32), behavior_logprobs=zeros, advantage=log_ratio,
    )  # fmt: skip


def of_parts(q: Sequences, kind: str, parts: int, slots: int = 0) -> dict[str, float]:
    """As the update has it: micro-batch i has the rows i, i + parts, ..."""
    shape = batch_shape(kind, equal_groups(GROUPS, SAMPLES), (S, C), slots, parts, 1)
    batch, _ = fill_batch(q.experience, shape, VOCAB.pad)
    assert len(np.unique(np.nonzero(batch.loss_mask)[0] % parts)) == parts or q.loss_mask.sum() < 4
    total = dict.fromkeys(("sequences", "tokens"), ess.no_weights())
    for i in range(parts):
        part = batch.replace(loss_mask=batch.loss_mask[i::parts], segment=batch.segment[i::parts])
        found = ess.weight_sums(batch.advantage[i::parts], part)
        total = {name: ess.merged(sums, found[name]) for name, sums in total.items()}
    return {name: float(ess.effective_share(sums)) for name, sums in total.items()}


# Tokens' log-ratios near 0, of a heavy tail, and such that one weight is e^1000 of another and more.
@pytest.mark.parametrize("scale", [0.01, 0.5, 1000.0])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("kind", "slots"), [("none", 0), ("plain", S + C), ("shared_prefix", S + 2 * C)])
def test_a_loop_over_sequences_gives_the_same(kind, slots, parts, scale):
    for seed in range(3):
        q = ragged(seed, scale)
        want, found = by_loop(q.advantage, q.loss_mask), of_parts(q, kind, parts, slots)
        for name in want:
            assert 0 < found[name] <= 1
            # In f32 a sum of log-ratios of 1e4 is good to 1e-3, and so is its weight.
            np.testing.assert_allclose(found[name], want[name], rtol=3e-3 if scale > 1 else 2e-5, err_msg=name)


def test_weights_by_hand():
    """Products 1 and 3 of two sequences: 4^2 / (2 * 10) = 0.8; tokens 1, 1 and 3: 5^2 / (3 * 11)."""
    q = ragged(0, 0.0)
    learn, log_ratio = np.zeros_like(q.loss_mask), np.zeros_like(q.advantage)
    learn[2, :2] = learn[7, :1] = True
    log_ratio[7, 0] = np.log(3)
    found = of_parts(
        q._replace(loss_mask=learn, advantage=log_ratio, length=np.full_like(q.length, C)), "plain", 2, S + C
    )
    np.testing.assert_allclose([found["sequences"], found["tokens"]], [0.8, 25 / 33], rtol=1e-6)


def test_mutants_are_killed(monkeypatch):
    """Weights not relative to the largest overflow; sums of parts relative to different ones do not add up."""
    q = ragged(2, 1000.0)
    with monkeypatch.context() as patched:
        patched.setattr(ess, "_exp_of_difference", lambda log_weight, largest: jnp.exp(log_weight))
        assert not np.isfinite(of_parts(q, "plain", 1, S + C)["sequences"])
    q = ragged(2, 0.5)
    add = lambda a, b: ess.WeightSums(*(x + y for x, y in zip(a, b, strict=True)))  # noqa: E731
    monkeypatch.setattr(ess, "merged", add)
    assert abs(of_parts(q, "plain", 2, S + C)["tokens"] - by_loop(q.advantage, q.loss_mask)["tokens"]) > 0.02


def test_extremes():
    q = ragged(1, 1.0)
    share = lambda x, mask=q.loss_mask: of_parts(q._replace(advantage=x, loss_mask=mask), "plain", 2, S + C)  # noqa: E731
    n = q.loss_mask.any(axis=1).sum()
    # Weights that are equal, however small; one that outweighs all; none above 0; none at all.
    assert share(np.full_like(q.advantage, -3e4))["tokens"] == 1
    one = np.where(np.arange(len(q.length))[:, None] == np.argmax(q.loss_mask.any(axis=1)), 1e4, 0).astype(np.float32)
    np.testing.assert_allclose(share(one)["sequences"], 1 / n, rtol=1e-6)
    assert (
        share(np.full_like(q.advantage, -np.inf))
        == share(q.advantage, q.loss_mask & False)
        == dict.fromkeys(("sequences", "tokens"), 0.0)
    )
    assert np.isnan(share(np.where(one > 0, np.inf, 0).astype(np.float32))["sequences"])


def test_the_scale_of_the_learning_rate():
    scale = lambda share, **cfg: float(ess.lr_scale(EssScaling(**cfg), np.float32(share)))  # noqa: E731
    np.testing.assert_allclose([scale(0.25), scale(0.25, rule="linear"), scale(0.25, base=0.5)], [0.5, 0.25, 0.5**0.5])
    assert scale(1.0) == scale(0.8, base=0.5) == 1.0 and scale(0.0) == 0.0


# --- whole updates ---------------------------------------------------------------------------------------------------------

LR = AdamW(lr=1e-3)
SPECS = model_params.specs(SMALL)
P, G, SLOTS = 16, 4, 6


@cache
def parameters(noise: float):
    return jax.device_get(make_params(SMALL, layouts()[0], noise=noise))


@cache
def samples(noise: float, version: int):
    train, decode = layouts()
    params = hosts.put(parameters(noise), model_params.shardings(SPECS, train))
    policy = make_policy(SMALL, params, train, decode, version)
    return generator(G, SLOTS, SMALL, decode)(policy, make_prompts(P), jax.random.key(3), 1.0)


@cache
def mixed() -> tuple[Experience, np.ndarray]:
    """Groups of the current policy and, every other one, of an older one; and which rows are old."""
    now, before = (jax.device_get(samples(*which)) for which in ((0.0, 4), (0.02, 3)))
    old = np.asarray(now.prompt) % 2 == 1
    choose = lambda a, b: np.where(old.reshape(-1, *(1,) * (np.ndim(a) - 1)), b, a)  # noqa: E731
    parts = ("tokens", "length", "sampled", "behavior_logprobs", "entropy", "version", "finish")
    rollouts = now.replace(**{name: choose(getattr(now, name), getattr(before, name)) for name in parts})
    reward = (rollouts.tokens.sum(axis=1) % 2).astype(np.float32)
    return to_experience(rollouts, reward - reward.mean()), old


def laid(experience: Experience, kind: str = "shared_prefix"):
    shape = batch_shape(kind, equal_groups(P, G), (7, SLOTS), 0, 1, 1)
    return fill_batch(experience, shape, VOCAB.pad)


@cache
def scorer():
    return jit_score(Scoring(SMALL, layouts()[0], 16))


def scored(batch) -> np.ndarray:
    train, _ = layouts()
    params = hosts.put(parameters(0.0), model_params.shardings(SPECS, train))
    return np.asarray(scorer()(params, hosts.put(batch, train.sharding(("rows", None)))).logprobs)


@cache
def updater():
    # -A log p: its loss stays finite where a ratio is not.
    loss = make_loss(ObjectiveConfig(loss=PolicyGradient(surrogate=Reinforce())))
    return jit_update(
        SPECS, loss, make_optimizer(LR), Scoring(SMALL, layouts()[0], 16), micro_batches=2, ess_scaling=EssScaling()
    )


def updated(*batches):
    """State after each of these updates, the one before first, and the metrics of each."""
    train, _ = layouts()
    params = hosts.put(parameters(0.0), model_params.shardings(SPECS, train))
    state = make_init_state(SPECS, make_optimizer(LR), train)(params, hosts.put(np.int32(0), train.replicated))
    states, metrics = [jax.tree.map(np.array, jax.device_get(state))], []
    for batch in batches:
        state, found = updater()(state, hosts.put(batch, train.sharding(("rows", None))))
        states.append(jax.tree.map(np.array, jax.device_get(state)))
        metrics.append({name: float(x) for name, x in found.items()})
    return states, metrics


def test_the_step_is_adams_times_the_scale():
    batch, _ = laid(mixed()[0], "none")
    (_, before, after), (first, second) = updated(batch, batch)
    mask = batch.loss_mask
    want = by_loop(np.where(mask, scored(batch) - batch.behavior_logprobs, 0), mask)
    np.testing.assert_allclose([first["ess/sequences"], first["ess/tokens"]], list(want.values()), rtol=1e-4)
    assert all(0.05 < metrics["ess/sequences"] < 0.9 for metrics in (first, second))
    for metrics in (first, second):
        np.testing.assert_allclose(metrics["lr/ess_scale"], metrics["ess/sequences"] ** 0.5, rtol=1e-6)
    adam = after.opt_state[1]
    assert int(adam.count) == 2
    for x, y, mu, nu in zip(*map(jax.tree.leaves, (before.params, after.params, adam.mu, adam.nu)), strict=True):
        step = LR.lr * (mu / (1 - LR.b1**2)) / (np.sqrt(nu / (1 - LR.b2**2)) + LR.eps)
        # Parameters of size 1 are stored to 6e-8.
        np.testing.assert_allclose(y - x, -second["lr/ess_scale"] * step, rtol=1e-4, atol=3e-7)


def test_without_a_finite_scale_or_a_token_nothing_changes():
    batch, _ = laid(mixed()[0], "none")
    row, slot = np.argwhere(batch.loss_mask)[0]
    wrong = batch.behavior_logprobs.copy()
    wrong[row, slot] = np.nan
    bad = batch.replace(behavior_logprobs=wrong), batch.replace(loss_mask=np.zeros_like(batch.loss_mask))
    states, (_, nan, empty) = updated(batch, *bad)
    assert np.isfinite(nan["loss"]) and np.isfinite(nan["grad_norm"])
    assert (nan["nonfinite"], empty["nonfinite"]) == (1, 0)
    kept = [jax.tree.leaves((state.params, state.opt_state)) for state in states[1:]]
    assert all(np.array_equal(a, b) for other in kept[1:] for a, b in zip(kept[0], other, strict=True))


# --- samples of several policies in a batch ----------------------------------------------------------------------------------


def ratios(experience: Experience, logprobs) -> np.ndarray:
    """p / p_behavior of each token of the completions, from the batch that the update gets."""
    batch, where = laid(experience)
    scores = TokenScores(logprobs(batch), np.zeros(batch.tokens.shape, np.float32))
    terms = policy_terms(scores, batch, PolicyGradient(), UNCORRECTED)
    return to_completions(np.asarray(terms.maxima["ratio/max"]), where, experience.groups.rollouts)


def assert_of_its_own_policy(experience: Experience, old: np.ndarray) -> None:
    captured = np.where(old[:, None], samples(0.02, 3).behavior_logprobs, samples(0.0, 4).behavior_logprobs)
    batch, where = laid(experience, "none")
    rollouts = experience.groups.rollouts
    now = to_completions(scored(batch), where, rollouts)
    found = ratios(experience, scored)[rollouts.sampled]
    np.testing.assert_allclose(found, np.exp(now - captured)[rollouts.sampled], rtol=1e-4)
    by_row = np.broadcast_to(old[:, None], rollouts.sampled.shape)[rollouts.sampled]
    assert np.abs(found[~by_row] - 1).max() < 1e-3 < 0.1 < np.abs(found[by_row] - 1).max()


def test_each_ratio_is_to_the_policy_that_sampled_the_token():
    experience, old = mixed()
    assert set(np.unique(experience.groups.rollouts.version[experience.groups.rollouts.sampled])) == {3, 4}
    assert_of_its_own_policy(experience, old)


def test_mutant_log_probs_of_old_rows_recomputed_is_killed():
    experience, old = mixed()
    batch, where = laid(experience, "none")
    rollouts = experience.groups.rollouts
    recomputed = np.where(old[:, None], to_completions(scored(batch), where, rollouts), rollouts.behavior_logprobs)
    mutant = Experience(
        experience.groups.replace(rollouts=rollouts.replace(behavior_logprobs=recomputed)),
        experience.scores,
        Credit(experience.credit.advantage),
    )
    np.testing.assert_allclose(ratios(mutant, scored)[rollouts.sampled], 1, atol=1e-3)
    with pytest.raises(AssertionError):
        assert_of_its_own_policy(mutant, old)
    right, wrong = (updated(laid(rows, "none")[0])[1][0]["ess/sequences"] for rows in (experience, mutant))
    assert right < 0.9 < 0.999 < wrong

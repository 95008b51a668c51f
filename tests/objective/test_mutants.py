"""Famous bugs of RL trainers, put into the package one at a time: the comparison with the oracle must detect each.

T numbers: traps of the reference, section 3; # numbers: threads of its section 4.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import batch_of
from parts import by_oracle, by_package

from jaxrl_llm.objective import advantages, group_estimators, losses, surrogates, token_estimators
from jaxrl_llm.objective.group_estimators import Grpo, LeaveOneOut, MeanOnly, Rloo
from jaxrl_llm.objective.loss_config import Cispo, Clip, Dppo, Gmpo, Ipo, Sapo
from jaxrl_llm.objective.reward_kl import RewardKl
from jaxrl_llm.objective.token_estimators import Gae, ReinforcePlusPlus
from jaxrl_llm.update.batch import token_weights


def is_detected(name: str) -> bool:
    """The package differs from the oracle in an advantage, a loss or a gradient."""
    want, got = by_oracle(name), by_package(name)
    same = (
        all(np.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in zip(got.advantages, want.advantages, strict=True))
        and np.allclose(got.losses, want.losses, rtol=1e-6, atol=1e-6)
        and all(np.allclose(got.gradients[leaf], x, rtol=1e-5, atol=1e-6) for leaf, x in want.gradients.items())
    )
    return not same


# ---- advantages: mutations of estimators and of what they are made of


def estimator(kind, change):
    """The kind's estimator with its config changed."""
    own = kind.estimate
    return kind, "estimate", lambda cfg, inputs: own(change(cfg), inputs)


def resets_at_masked(rewards, mask, gamma):
    returns, after = np.zeros_like(rewards), np.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        after = np.where(mask[:, t], rewards[:, t] + gamma * after, 0.0)
        returns[:, t] = after
    return returns


def reward_in_the_last_slot(inputs):
    rewards = np.where(inputs.mask, inputs.token_reward, 0.0)
    rewards[:, -1] += inputs.reward
    return rewards


def whiten_with_padding(x, mask, ddof=1, eps=1e-8, beside_std=0.0):
    x = np.where(mask, x, 0.0)
    return (x - x.mean()) / (np.sqrt(x.var(ddof=ddof) + eps) + beside_std)


own_reward_kl, own_gae = RewardKl.__call__, Gae.estimate
ADVANTAGES = {
    "std with n (T16's cousin)": (estimator(Grpo, lambda c: dataclasses.replace(c, std="population")), "trl:grpo"),
    "std of the batch (T7)": (estimator(Grpo, lambda c: dataclasses.replace(c, std_over="batch")), "trl:grpo"),
    "another framework's eps": (estimator(Grpo, lambda c: dataclasses.replace(c, eps=1e-4)), "verl:grpo"),
    "the baseline holds the sample itself": (
        (Rloo, "estimate", lambda c, o: MeanOnly().estimate(o)), "verl:rloo"),
    "the group's std for the others' (T13)": (
        (LeaveOneOut, "estimate", lambda c, o: Grpo(eps=c.eps).estimate(o)), "nemo:grpo"),
    "the batch's mean": ((group_estimators, "centered", lambda score, groups: score - score.mean()), "verl:dr_grpo"),
    "whitening over padding (T18)": ((token_estimators, "whiten", whiten_with_padding), "verl:reinforce_pp"),
    "biased variance (T16)": (
        estimator(ReinforcePlusPlus, lambda c: dataclasses.replace(c, variance="population")), "verl:reinforce_pp"),
    "credit ends at unsampled tokens (T11)": ((token_estimators, "to_go", resets_at_masked), "verl:reinforce_pp"),
    "the reward on padding": ((token_estimators, "token_rewards", reward_in_the_last_slot), "verl:ppo"),
    "returns of whitened advantages": (
        (Gae, "estimate", lambda c, o: (e := own_gae(c, o))._replace(returns=e.advantage + o.values)), "verl:ppo"),
    "a KL that is paid": (
        (RewardKl, "__call__", lambda *args: -own_reward_kl(*args)), "trl:rloo"),
    "KL before the group's norm": (
        ("cases", "estimate", lambda cfg, o: advantages.estimate(
            cfg, o._replace(token_reward=o.late_reward, late_reward=None))), "openrlhf:grpo"),
}  # fmt: skip


# ---- means: mutations of how tests/objective/cases.py makes the batch


def by_halves(learn, group, aggregation, length):
    """Counts of each micro-batch (#8, T4)."""
    half = len(learn) // 2
    halves = [token_weights(learn[part], group[part], aggregation, length) for part in (slice(half), slice(half, None))]
    return np.concatenate(halves) / 2


def padded_width(learn, group, aggregation, length):
    return token_weights(learn, group, aggregation, learn.shape[1])


def empty_sequences_count(learn, group, aggregation, length):
    weights = token_weights(learn, group, aggregation, length)
    return weights * np.count_nonzero(learn.any(axis=1)) / len(learn)


def batches(change):
    return "cases", "batch_of", lambda *args, **more: change(batch_of(*args, **more))


BATCHES = {
    "counts of a micro-batch, tokens (T4)": (("cases", "token_weights", by_halves), "verl:grpo"),
    "counts of a micro-batch, prompts": (("cases", "token_weights", by_halves), "mean prompt"),
    "Dr. GRPO by the padded width (T3)": (("cases", "token_weights", padded_width), "paper:dr_grpo"),
    "dropped groups in the mean": (("cases", "token_weights", empty_sequences_count), "slime:grpo"),
    "behavior overwritten by proximal": (
        batches(lambda b: b.replace(behavior_logprobs=b.proximal_logprobs)), "paper:decoupled_ppo"),
    "behavior overwritten by proximal, uncorrected": (
        batches(lambda b: b.replace(behavior_logprobs=b.proximal_logprobs)), "trl:grpo"),
    "a sequence's sum over its row": (batches(lambda b: b.replace(segment=jnp.ones_like(b.segment))), "trl:gspo"),
}  # fmt: skip


# ---- losses: mutations of `jaxrl_llm.objective.losses` and `.surrogates`


def surrogate(kind, function):
    return losses, "SURROGATES", losses.SURROGATES | {kind: function}


def changed(kind, **fields):
    """The kind's surrogate with another config; `fields` may be functions of it."""
    own = losses.SURROGATES[kind]

    def mutant(logprobs, log_r, advantage, batch, cfg):
        new = {name: x(cfg) if callable(x) else x for name, x in fields.items()}
        return own(logprobs, log_r, advantage, batch, dataclasses.replace(cfg, **new))

    return surrogate(kind, mutant)


def dual_for_positive(logprobs, log_r, advantage, batch, cfg):
    terms = surrogates.clip(logprobs, log_r, advantage, batch, dataclasses.replace(cfg, dual=None))
    return terms._replace(loss=jnp.where(advantage > 0, jnp.maximum(terms.loss, -cfg.dual * advantage), terms.loss))


def always_bounded(logprobs, log_r, advantage, batch, cfg):
    """The clip without PPO's minimum: what went too far is never pulled back."""
    return surrogates.SurrogateTerms(
        -jnp.clip(jnp.exp(log_r), 1 - cfg.low, 1 + cfg.high) * advantage, advantage > 0, advantage < 0
    )


def cispo_through_the_ratio(logprobs, log_r, advantage, batch, cfg):
    ratio = jnp.clip(jnp.exp(log_r), cfg.low, cfg.high)
    return surrogates.SurrogateTerms(-ratio * advantage * logprobs, ratio < cfg.low, ratio > cfg.high)


def cispo_drops(logprobs, log_r, advantage, batch, cfg):
    """T20: a hard zero is not a clip."""
    ratio = jax.lax.stop_gradient(jnp.exp(log_r))
    inside = (ratio >= cfg.low) & (ratio <= cfg.high)
    return surrogates.SurrogateTerms(jnp.where(inside, -ratio * advantage * logprobs, 0.0), ~inside, ~inside)


def gmpo_without_signs(logprobs, log_r, advantage, batch, cfg):
    bounded = jnp.clip(log_r, -cfg.low, cfg.high)
    ratio = jnp.exp(surrogates.mean_by_id(batch.segment, batch.loss_mask, bounded))
    return surrogates.SurrogateTerms(-advantage * ratio, advantage > 0, advantage < 0)


def ipo_one_sided(logprobs, log_r, advantage, batch, cfg):
    """DPPO's mask: what went against its advantage still counts."""
    own = dataclasses.replace(Dppo(), low=cfg.eps, high=cfg.eps)
    return surrogates.dppo(logprobs, log_r, advantage, batch, own)


def ipo_by_the_ratio(logprobs, log_r, advantage, batch, cfg):
    ratio = jnp.exp(log_r)
    low, high = ratio < 1 - cfg.eps, ratio > 1 + cfg.eps
    return surrogates.SurrogateTerms(jnp.where(low | high, 0.0, -advantage * ratio), low, high)


def ipo_without_the_ratio(logprobs, log_r, advantage, batch, cfg):
    terms = surrogates.ipo(logprobs, log_r, advantage, batch, cfg)
    return terms._replace(loss=jnp.where(terms.low | terms.high, 0.0, -advantage * logprobs))


own_log_ratio, own_weighed, own_kl, own_critic = (
    losses.log_ratio,
    losses.importance_weight,
    losses.kl_terms,
    losses.critic_terms,
)
own_kl_estimate, own_moment = losses.kl_estimate, losses.second_moment_mask


def weighing(function):
    return losses, "importance_weight", function


def level(instead):
    return (
        losses,
        "log_ratio",
        lambda logprobs, anchor, batch, name: own_log_ratio(logprobs, anchor, batch, instead.get(name, name)),
    )


def token_weight(batch):
    return jnp.clip(
        jnp.exp(surrogates.zero_outside(batch.loss_mask, batch.proximal_logprobs - batch.behavior_logprobs)), 0.6, 1.5
    )


def value_loss(change):
    return losses, "critic_terms", lambda values, batch, cfg: change(values, batch, cfg)


def least_moments_dropped(batch, threshold):
    square = (batch.proximal_logprobs - batch.behavior_logprobs) ** 2
    return batch.loss_mask & (square >= threshold)


LOSSES = {
    "clip-higher's bounds swapped": (changed(Clip, low=lambda c: c.high, high=lambda c: c.low), "paper:dapo"),
    "one bound for both sides (T1)": (changed(Clip, high=lambda c: c.low), "paper:dapo"),
    "no minimum": (surrogate(Clip, always_bounded), "trl:grpo"),
    "no clip": (changed(Clip, low=1.0, high=1e9), "trl:grpo"),
    "dual clip off": (changed(Clip, dual=None), "verl:grpo"),
    "dual clip on the wrong sign": (surrogate(Clip, dual_for_positive), "clip dual"),
    "the ratio upside down": (
        (losses, "log_ratio", lambda *args: -own_log_ratio(*args)), "trl:grpo"),
    "a gradient through CISPO's ratio": (surrogate(Cispo, cispo_through_the_ratio), "trl:cispo"),
    "CISPO drops instead of clipping (T20)": (surrogate(Cispo, cispo_drops), "trl:cispo"),
    "CISPO by PPO's bounds (T5)": (changed(Cispo, low=lambda c: 1 - c.low, high=lambda c: 1 + c.high), "trl:cispo"),
    "GSPO's sum for its mean": (level({"sequence": "product"}), "trl:gspo"),
    "GSPO of single tokens": (level({"sequence": "token"}), "trl:gspo"),
    "RLOO's mean for its product (T8)": (level({"product": "sequence"}), "trl:rloo"),
    "RLOO of single tokens (T8)": (level({"product": "token"}), "trl:rloo"),
    "GSPO-token without the tokens": (level({"sequence_token": "sequence"}), "gspo token by token"),
    "GMPO clips what would be pulled back": (surrogate(Gmpo, gmpo_without_signs), "paper:gmpo"),
    "SAPO's temperatures swapped": (changed(Sapo, positive=lambda c: c.negative, negative=lambda c: c.positive), "paper:sapo"),
    "DPPO's bounds gone": (changed(Dppo, low=1.0, high=1.0), "skyrl:dppo"),
    "DPPO's documented cap (T2)": (changed(Dppo, cap=20.0), "verl:dppo_tv"),
    "DPPO by total variation for KL": (changed(Dppo, divergence="tv"), "dppo kl"),
    "IPO's mask by the sign of the advantage": (surrogate(Ipo, ipo_one_sided), "prime:rl"),
    "IPO's eps on the ratio": (surrogate(Ipo, ipo_by_the_ratio), "prime:rl"),
    "IPO without the ratio": (surrogate(Ipo, ipo_without_the_ratio), "prime:rl"),
    "IPO's eps of before September": (changed(Ipo, eps=0.1), "prime:rl"),
    "the mask ignored": ((surrogates, "zero_outside", lambda mask, x: x), "trl:gspo"),
    "TIS cap ignored": (
        weighing(lambda m, b, c: losses.ImportanceWeight(jnp.exp(jax.lax.stop_gradient(m)), b.loss_mask)), "truncated token"),
    "TIS upside down": (weighing(lambda m, b, c: own_weighed(-m, b, c)), "paper:decoupled_ppo"),
    "TIS of the ratio to the sampler (counted twice)": (
        (losses, "anchored_on_proximal", lambda cfg, correction: False), "paper:decoupled_ppo"),
    "a geometric mean for a product (T15)": (
        weighing(lambda m, b, c: own_weighed(m, b, dataclasses.replace(c, level="geometric"))), "TRL's sequence_mask"),
    "IcePop clips instead of masking": (
        weighing(lambda m, b, c: losses.ImportanceWeight(jnp.clip(jnp.exp(m), c.low, c.high), b.loss_mask)), "paper:icepop"),
    "seq-mask-tis keeps the tested weight (T9)": (
        weighing(lambda m, b, c: own_weighed(m, b, dataclasses.replace(c, weight="level"))), "masked geometric token"),
    "M2PO drops the smallest": (("cases.losses", "second_moment_mask", least_moments_dropped), "paper:m2po"),
    "M2PO's bound on each token": (
        ("cases.losses", "second_moment_mask", lambda b, threshold: b.loss_mask & (
            (b.proximal_logprobs - b.behavior_logprobs) ** 2 <= threshold)), "paper:m2po"),
    "k3's sign flipped": (
        (losses, "kl_estimate", lambda d, factor, cfg: own_kl_estimate(-d, factor, cfg)), "paper:grpo"),
    "k3 weighed by the correction": (
        (losses, "kl_terms", lambda s, r, b, cfg: token_weight(b) * own_kl(s, r, b, cfg)), "everything"),
    "k3 without a factor": (
        (losses, "kl_terms", lambda s, r, b, cfg: own_kl(s, r, b, dataclasses.replace(cfg, times="one"))), "k3 times ratio"),
    "k3 times the ratio for the score": (
        (losses, "kl_terms", lambda s, r, b, cfg: own_kl(s, r, b, dataclasses.replace(cfg, times="ratio"))), "nemo:grpo"),
    "k3+ with its own gradient (#10)": (
        (losses, "kl_terms", lambda s, r, b, cfg: own_kl(s, r, b, dataclasses.replace(cfg, kind="k3"))), "k3_plus to reference"),
    "KL to the sampler for the reference": (
        (losses, "kl_terms", lambda s, r, b, cfg: own_kl(s, r, b, dataclasses.replace(cfg, to="behavior"))), "paper:grpo"),
    "values clipped about the return": (
        value_loss(lambda v, b, c: own_critic(v, b.replace(values=b.returns), c)), "verl:ppo"),
    "the smaller value loss": (
        value_loss(lambda v, b, c: jnp.minimum(own_critic(v, b, c), (v - b.returns) ** 2 / 2)), "verl:ppo"),
    "no half": (value_loss(lambda v, b, c: 2 * own_critic(v, b, c)), "verl:ppo"),
}  # fmt: skip
MUTANTS = ADVANTAGES | BATCHES | LOSSES
# What a gradient must not flow through, in everything that stops one.
STOPPING = ("trl:cispo", "gspo token by token", "verl:dppo_tv", "k3_plus to reference", "nemo:grpo")


@pytest.mark.parametrize("name", MUTANTS)
def test_the_bug_is_told(name, monkeypatch):
    (where, attribute, mutant), part = MUTANTS[name]
    # To be detected by the comparison with the oracle, not by the guard before it.
    monkeypatch.setattr(advantages, "bound", lambda cfg, inputs: np.inf)
    if isinstance(where, str):
        monkeypatch.setattr(f"{where}.{attribute}", mutant)
    else:
        monkeypatch.setattr(where, attribute, mutant)
    assert is_detected(part)


@pytest.mark.parametrize("name", sorted({part for _, part in MUTANTS.values()} | set(STOPPING)))
def test_without_a_bug_nothing_is_told(name):
    assert not is_detected(name)


@pytest.mark.parametrize("name", STOPPING)
def test_a_gradient_that_is_not_stopped_is_told(name, monkeypatch):
    monkeypatch.setattr(jax.lax, "stop_gradient", lambda x: x)
    assert is_detected(name)

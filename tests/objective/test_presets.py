"""Every preset of the package against the oracle: eight random minibatches, advantages token by token and the loss, to 1e-6."""

import dataclasses

import numpy as np
import oracle
import pytest
from cases import SEEDS, objective_of, package, random_case

from jaxrl_llm.objective.presets import PRESETS
from jaxrl_llm.objective.rules import refusals

CASES = [random_case(seed) for seed in SEEDS]
POLICY = sorted(set(PRESETS) - {"paper:dpo"})


def test_the_oracle_has_every_preset():
    assert set(oracle.PRESETS) | {"paper:dpo"} == set(PRESETS)


@pytest.mark.parametrize("name", POLICY)
def test_a_preset_is_what_its_source_computes(name):
    preset, cfg = oracle.PRESETS[name], objective_of(name)
    for seed, case in enumerate(CASES):
        advantage, returns = preset.advantage(case)
        got, loss = package(cfg, case, packed=seed % 2 == 1)
        np.testing.assert_allclose(got, advantage, rtol=1e-6, atol=1e-6, err_msg=f"advantage, seed {seed}")
        want = oracle.loss(preset, case, advantage, returns)
        np.testing.assert_allclose(loss, want, rtol=1e-6, atol=1e-6, err_msg=f"loss, seed {seed}")


def test_dpo_is_the_loss_of_best_against_worst():
    cfg = objective_of("paper:dpo")
    for case in CASES:
        _, loss = package(cfg, case, packed=True)
        np.testing.assert_allclose(loss, oracle.dpo_loss(case, 0.1), rtol=1e-6)


# Far below what 1e-6 can see, or only an alternative to what acts here.
UNSEEN = {"advantage.eps", "loss.kl.max_difference", "loss.length"}


def numbers(value, path=()):
    """Every number of a config that a preset sets apart from the others, by its path."""
    for field in dataclasses.fields(value):
        x, at = getattr(value, field.name), (*path, field.name)
        if dataclasses.is_dataclass(x):
            yield from numbers(x, at)
        elif isinstance(x, float) and not isinstance(x, bool):
            yield at, x


def nested(path, value):
    for key in reversed(path):
        value = {key: value}
    return value


@pytest.mark.parametrize("name", POLICY)
def test_every_number_of_a_preset_matters(name):
    """Each bound, weight and threshold, moved a little, changes a loss: so no bound lies where no token comes, and the oracle pins
    each number."""
    cfg = objective_of(name)
    parts = {"advantage": cfg.advantage, "loss": cfg.loss, "reward_kl": cfg.reward_kl}
    want = [package(cfg, case) for case in CASES]
    silent = []
    for part, value in parts.items():
        for path, x in numbers(value, (part,)):
            if ".".join(path) in UNSEEN or idle(cfg, ".".join(path)):
                continue
            moved = objective_of(name, **nested(path, x * 0.9 if x else 0.1))
            if all(
                np.allclose(package(moved, case)[1], w[1], rtol=1e-6, atol=1e-6)
                for case, w in zip(CASES, want, strict=True)
            ):
                silent.append(".".join(path))
    assert not silent


def idle(cfg, path: str) -> bool:
    """Numbers of parts that a preset does not use."""
    return (
        (path.startswith("loss.kl.") and path != "loss.kl.weight" and not cfg.loss.kl.weight)
        or (path == "loss.kl.weight" and not cfg.loss.kl.weight)
        or (path.startswith("reward_kl.") and not cfg.reward_kl.weight)
        or (path.startswith("loss.critic.") and not cfg.has_critic)
        or (path == "loss.surrogate.cap" and cfg.loss.surrogate.form == "ratio")
        # Its advantages are never negative.
        or (cfg.advantage.kind == "pass_at_k" and path in ("loss.surrogate.low", "loss.surrogate.dual"))
        or (path == "advantage.gamma" and cfg.advantage.kind == "reinforce_pp" and cfg.advantage.baseline)
    )


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_no_preset_is_refused(name):
    assert refusals(objective_of(name), samples=4, packing="shared_prefix") == []


# Its baseline is the critic, or there is none: a return of 0.3 is then worth something.
WITHOUT_GROUP = {
    "paper:reinforce",
    "paper:ppo",
    "verl:ppo",
    "trl:rloo",
    "openrlhf:reinforce_pp",
    "openrlhf:grpo",
    "areal:grpo",
}


@pytest.mark.parametrize("name", sorted(set(PRESETS) - WITHOUT_GROUP))
def test_equal_rewards_are_worth_exactly_nothing(name):
    """Exactly 0, not 1e-17 over a tiny std."""
    case = CASES[0]._replace(
        reward=np.full_like(CASES[0].reward, 0.3), reward_components=np.full_like(CASES[0].reward_components, 0.2)
    )
    beside = {} if name == "paper:dpo" else {"loss": {"kl": {"weight": 0.0}}}
    advantage, loss = package(objective_of(name, **beside), case)
    assert (advantage == 0).all()
    assert loss == 0


def test_equal_rewards_over_the_batch_are_worth_exactly_nothing():
    case = CASES[0]._replace(reward=np.full_like(CASES[0].reward, 0.3))
    for over in ("group", "batch"):
        cfg = objective_of("trl:grpo", advantage={"mean_over": over, "std_over": "batch", "eps": 1e-9})
        assert (package(cfg, case)[0] == 0).all()


def test_statistics_over_the_batch():
    """TRL's scale_rewards: batch; and both over the batch, sequences counting alike, groups that were dropped not at all."""
    case = CASES[2]
    reward = case.reward.reshape(case.used.size, -1)
    kept = reward[case.used]
    for over, mean in (("group", kept.mean(axis=1, keepdims=True)), ("batch", kept.mean())):
        cfg = objective_of("trl:grpo", advantage={"mean_over": over, "std_over": "batch"})
        want = np.zeros(reward.shape)
        want[case.used] = (kept - mean) / (kept.std(ddof=1) + 1e-4)
        np.testing.assert_allclose(
            package(cfg, case)[0], np.where(case.mask, want.reshape(-1, 1), 0), rtol=1e-9, atol=1e-12
        )


def test_rloo_may_be_whitened():
    """TRL's normalize_advantages."""
    case = CASES[3]
    reward = case.reward.reshape(case.used.size, -1)
    raw = reward - (reward.sum(axis=1, keepdims=True) - reward) / (reward.shape[1] - 1)
    want = (raw - raw.mean()) / (raw.std(ddof=1) + 1e-4)
    got, _ = package(objective_of("paper:rloo", advantage={"whiten": True}), case)
    np.testing.assert_allclose(got, np.where(case.mask, want.reshape(-1, 1), 0), rtol=1e-9, atol=1e-12)


def test_pass_at_k_may_stay_unscaled():
    case = CASES[0]
    reward = case.reward.reshape(case.used.size, -1)
    ranked = np.sort(reward, axis=1)
    want = np.where(reward == ranked[:, -1:], ranked[:, -1:] - ranked[:, -2:-1], 0)
    got, _ = package(objective_of("verl:pass_at_k", advantage={"scale": False}), case)
    np.testing.assert_allclose(got, np.where(case.mask, want.reshape(-1, 1), 0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_returns_may_be_discounted(gamma):
    """By the number of sampled tokens in between, not of slots."""
    case = CASES[1]
    returns = np.zeros(case.mask.shape)
    for b, row in enumerate(case.mask):
        at = np.flatnonzero(row)
        returns[b, at] = case.reward[b] * gamma ** (len(at) - 1 - np.arange(len(at)))
    kept = returns[case.mask]
    want = np.where(case.mask, (returns - kept.mean()) / np.sqrt(kept.var(ddof=1) + 1e-8), 0)
    got, _ = package(objective_of("verl:reinforce_pp", advantage={"gamma": gamma}), case)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)

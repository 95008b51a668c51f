"""The golden vectors of the reference (section 2.17), worked out to 8 digits apart from both the package and the oracle."""

from functools import partial
from math import log

import jax
import numpy as np
import oracle
import oracle_advantages as advantages
import oracle_terms as terms
import pytest
from cases import Found, assess, batch_of, objective_of

from jaxrl_llm.distribution.score import TokenScores
from jaxrl_llm.environments.grader import Sample
from jaxrl_llm.environments.graders.text import Length
from jaxrl_llm.objective.loss_config import Clip, Gmpo, KlConfig, NoCorrection, PolicyGradient, Sapo
from jaxrl_llm.objective.losses import policy_terms
from jaxrl_llm.update.batch import token_weights

REWARD = [1.0, 0.0, 0.0, 0.5]
ADVANTAGES = {
    "verl:grpo": [1.30557969, -0.78334782, -0.78334782, 0.26111594],
    "trl:grpo": [1.30530975, -0.78318585, -0.78318585, 0.26106195],
    "openrlhf:grpo": [1.30558242, -0.78334945, -0.78334945, 0.26111648],
    "verl:dr_grpo": [0.625, -0.375, -0.375, 0.125],
    "verl:rloo": [0.83333333, -0.5, -0.5, 0.16666667],
    "nemo:grpo": [2.88674135, -0.99999800, -0.99999800, 0.28867463],
    "paper:max_rl": [1.66666667, -1, -1, 0.33333333],
    "skyrl:max_rl": [1.66666222, -0.99999733, -0.99999733, 0.33333244],
    "verl:pass_at_k": [1.04446375, 0, 0, 0],
    "verl:opo": [0.7, -0.3, -0.3, 0.2],
    "verl:gpg": [1.25, -0.75, -0.75, 0.25],
}
"""Advantages of the rewards 1, 0, 0, 0.5; opo with the lengths 10, 20, 30, 40."""
RATIOS = [(1.5, 1.0), (0.5, 1.0), (1.5, -1.0), (0.5, -1.0), (5.0, -1.0), (5.0, 1.0)]
LOSSES = {
    "clip": [-1.28, -0.5, 1.5, 0.8, 5.0, -1.28],
    "dual": [-1.28, -0.5, 1.5, 0.8, 3.0, -1.28],
    "gmpo": [-1.491825, -0.5, 1.5, 0.670320, 5.0, -1.491825],
    "sapo": [-2.489837, -1.510163, 2.393585, 1.415938, 3.753242, -3.928055],
}
"""Losses of one token with a ratio and an advantage as in RATIOS: eps 0.2 and 0.28, c 3, GMPO's eps 0.4, SAPO's tau 1 and 1.05."""


def case_of(lengths=(10, 20, 30, 40), reward=REWARD, **more):
    """One group; log-probabilities are 0 where not given."""
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    zeros = np.zeros(mask.shape)
    fields = dict.fromkeys(("now", "behavior", "proximal", "reference", "entropy", "values", "old_values"), zeros)
    fields |= {
        "reward": np.array(reward),
        "prompt": np.zeros(len(mask), int),
        "reward_components": np.array(reward)[:, None],
        "component_weights": np.ones(1),
        "used": np.ones(1, bool),
        "mask": mask,
        "length": 8,
    }
    return oracle.Case(**fields | more)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_golden_advantages(name):
    for found in (oracle.PRESETS[name].advantage(case_of())[0], assess(objective_of(name), case_of()).advantage):
        np.testing.assert_allclose(found[:, 0], ADVANTAGES[name], atol=5e-9)
        assert (found[0, 10:] == 0).all(), "padding has an advantage"


def test_a_lone_success_is_not_scaled_by_nemo():
    want = [1] + 3 * [-0.57735]
    np.testing.assert_allclose(advantages.nemo_leave_one_out([1, 0, 0, 0]), want, atol=1e-5)
    found = assess(objective_of("nemo:grpo"), case_of(reward=[1.0, 0, 0, 0]))
    np.testing.assert_allclose(found.advantage[:, 0], want, atol=1e-5)


def test_equal_others_have_no_std_in_float32_either():
    """The graders' rewards are float32, and no sum of squares of 0.1 is exact. The first has 0.9 more than seven equal others; it
    gives the others of each other one a std of 0.9 / sqrt(7) and a mean 0.9 / 7 higher."""
    reward = np.float32([1.0] + [0.1] * 7)
    want = [0.9] + 7 * [-1 / 7**0.5]
    np.testing.assert_allclose(advantages.nemo_leave_one_out(reward.tolist()), want, rtol=4e-6)
    found = assess(objective_of("nemo:grpo"), case_of((1,) * 8, reward))
    np.testing.assert_allclose(found.advantage[:, 0], want, rtol=4e-6)


@pytest.mark.parametrize(
    ("how", "want"),
    [("token", 11 / 6), ("sequence", 1.75), ("sequence_sum", 5.5), ("constant", 0.6875), ("token_sum", 11)],
)
def test_golden_aggregation(how, want):
    losses = np.array([[1.0, 2, 0, 0], [1, 1, 1, 5]])
    case = case_of((2, 4), (0.0, 1.0))
    np.testing.assert_allclose(oracle.aggregate(case, losses, how), want, rtol=1e-12)
    weights = token_weights(case.mask, np.zeros(2, int), how, case.length)
    np.testing.assert_allclose((weights * losses).sum(), want, rtol=1e-6)


def token_terms(cfg: PolicyGradient, now, advantage, reference=0.0) -> np.ndarray:
    """The package's loss of sequences of one token each, whose behavior log-probabilities are 0."""
    now, advantage = np.array(now)[:, None], np.array(advantage)[:, None]
    case = case_of(
        (1,) * len(now), [0.0] * len(now), now=now, behavior=0 * now, proximal=0 * now, reference=0 * now + reference
    )
    with jax.enable_x64(True):
        batch = batch_of(case, Found(advantage, None), case.mask, "sequence", packed=False)
        return np.asarray(policy_terms(TokenScores(now, 0 * now), batch, cfg, NoCorrection()).loss)[:, 0]


@pytest.mark.parametrize("name", LOSSES)
def test_golden_policy_losses(name):
    surrogate, cfg = {
        "clip": (partial(terms.token_clip, high=0.28), Clip(high=0.28)),
        "dual": (partial(terms.token_clip, high=0.28, dual=3.0), Clip(high=0.28, dual=3.0)),
        "gmpo": (terms.gmpo, Gmpo()),
        "sapo": (terms.sapo, Sapo()),
    }[name]
    own = [surrogate([log(r)], [log(r)], [0.0], [a])[0] for r, a in RATIOS]
    got = token_terms(PolicyGradient(surrogate=cfg), [log(r) for r, _ in RATIOS], [a for _, a in RATIOS])
    np.testing.assert_allclose(own, LOSSES[name], atol=5e-7)
    np.testing.assert_allclose(got, LOSSES[name], atol=5e-7)


@pytest.mark.parametrize(
    ("kind", "above", "below"),
    [("k1", 0.5, -0.5), ("k2", 0.125, 0.125), ("k3", 0.10653066, 0.14872127), ("k3_plus", 0.10653066, 0.14872127)],
)
def test_golden_kl(kind, above, below):
    own = getattr(terms, kind)
    np.testing.assert_allclose([own(-1.0, -1.0, -1.5, 0.0), own(-2.0, -2.0, -1.5, 0.0)], [above, below], atol=5e-9)
    got = token_terms(PolicyGradient(kl=KlConfig(kind, 1.0)), [-1.0, -2.0], [0.0, 0.0], reference=-1.5)
    np.testing.assert_allclose(got, [above, below], atol=5e-9)


def test_golden_gae():
    case = case_of((4,), [1.0], old_values=np.array([[0.5, 0.4, 0.3, 0.6]]), mask=np.array([[True, True, False, True]]))
    found = {
        whiten: (
            advantages.gae(case, 0.95, whitened=whiten),
            assess(objective_of("paper:ppo", advantage={"whiten": whiten}), case),
        )
        for whiten in (False, True)
    }
    for plain, returns in found[False]:
        np.testing.assert_allclose(plain[case.mask], [0.451, 0.58, 0.4], atol=1e-12)
        np.testing.assert_allclose(returns[case.mask], [0.951, 0.98, 1.0], atol=1e-12)
    for white, returns in found[True]:
        np.testing.assert_allclose(white[case.mask], [-0.28025102, 1.11022517, -0.82997416], atol=5e-9)
        np.testing.assert_allclose(returns[case.mask], [0.951, 0.98, 1.0], atol=1e-12)


@pytest.mark.parametrize(("length", "want"), [(16000, 0.0), (16384, 0.0), (18432, -0.5), (20480, -1.0)])
def test_golden_overlong(length, want):
    """DAPO's soft punishment is a grader: L_max 20,480, the last 4,096 of it soft."""
    grader = Length(limit=20480, soft=4096)
    assert grader(Sample("", "", "", "eos", num_tokens=length)) == want


def test_credit_skips_a_masked_span():
    """T11: SkyRL's copy of REINFORCE++ loses it there."""
    case = case_of((4,), [1.0], mask=np.array([[True, False, False, True]]))
    np.testing.assert_allclose(advantages.returns_to_go(case, advantages.token_rewards(case, 0.0)), [[1, 0, 0, 1]])
    found = assess(objective_of("paper:ppo", advantage={"lam": 1.0}), case)
    np.testing.assert_allclose(found.advantage, [[1, 0, 0, 1]])


def test_the_oracle_knows_the_package_by_name_only():
    for module in (oracle, advantages, terms):
        with open(module.__file__, encoding="utf-8") as file:
            assert not any("jax" in line for line in file if "import" in line.split()[:3])

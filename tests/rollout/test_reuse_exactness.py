"""Reuse is distributed as fresh sampling: a chi-square test over whole responses, with fresh noise in every trial, that two common
forms of reuse fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from controlled import MODEL, VOCAB
from scipy.stats import chisquare
from setups import layouts, make_params, make_policy, until_of

from jaxrl_llm.distribution.logits import process_logits
from jaxrl_llm.model.transformer import hidden, logits
from jaxrl_llm.rollout.config import RolloutConfig
from jaxrl_llm.rollout.engine import Engine, EngineModel
from jaxrl_llm.types import Prompts

PROMPT, P, G, CALLS = np.array([3, 7, 1], np.int32), 64, 8, 16
KEY, OTHER = jax.random.key(0), jax.random.key(1)
TRAIN, DECODE = layouts()


def weights():
    """Parameters of an old policy, and of one that is some updates newer."""
    old, noise = (make_params(MODEL, TRAIN, sharpness=2.0, seed=seed) for seed in (0, 1))
    return old, jax.tree.map(lambda x, y: x + 0.3 * y, old, noise)


def probabilities(params) -> np.ndarray:
    """f64[16 17]: of each response of at most two tokens, by its first and its second; 16: it ended with the first."""
    ids = np.zeros((17, 4), np.int32)
    ids[:, :3], ids[:16, 3] = PROMPT, np.arange(16)
    h = hidden(params, ids, np.tile(np.arange(4), (17, 1)), until_of(np.full(17, 4), 4), MODEL, TRAIN)
    logp = process_logits(logits(params, h, MODEL).reshape(-1, 16), jnp.ones(17 * 4), VOCAB.size).reshape(17, 4, 16)
    first, second = np.exp(np.asarray(logp, np.float64))[0, 2], np.exp(np.asarray(logp, np.float64))[:16, 3]
    found = np.concatenate([first[:, None] * second, np.zeros((16, 1))], axis=1)
    found[15] = np.r_[np.zeros(16), first[15]]
    return found / found.sum()


def test_statistic(counts: np.ndarray, want: np.ndarray) -> float:
    """p-value; responses of which fewer than five are expected count as one."""
    expected = want.reshape(-1) * counts.sum()
    common = expected >= 5
    merge = lambda x: np.append(x[common], x[~common].sum())  # noqa: E731
    return float(chisquare(merge(counts.reshape(-1)), merge(expected)).pvalue)


test_statistic.__test__ = False


def counted(tokens: np.ndarray) -> np.ndarray:
    second = np.where(tokens[:, 0] == 15, 16, tokens[:, 1])
    return np.bincount(tokens[:, 0] * 17 + second, minlength=16 * 17).reshape(16, 17).astype(float)


@pytest.fixture(scope="module")
def drawn():
    """Tokens of 8,192 trials: of the old policy, of reuse under the new one, and of fresh calls with other noise."""
    engine = Engine(EngineModel(MODEL, DECODE, VOCAB), RolloutConfig(prompts=P, samples=G, max_new_tokens=2), 3)
    old, new = (make_policy(MODEL, params, TRAIN, DECODE) for params in weights())
    found = []
    for call in range(CALLS):
        uid = np.arange(P, dtype=np.int32) + call * P
        prompts = Prompts(np.tile(PROMPT, (P, 1)), np.full(P, 3, np.int32), uid, uid * 0)
        known = engine.generate(old, prompts, KEY)
        got = engine.reuse(new, known, KEY)
        found.append(
            (known.tokens, got.rollouts.tokens, engine.generate(new, prompts, OTHER).tokens, got.kept[:, None])
        )
    return [np.concatenate(part) for part in zip(*found, strict=True)]


def test_reuse_is_distributed_as_fresh_samples(drawn):
    known, reused, fresh, kept = drawn
    want = probabilities(weights()[1])
    assert test_statistic(counted(fresh), want) > 1e-3
    assert test_statistic(counted(reused), want) > 1e-3
    assert 0.3 < kept.sum() / np.where(known[:, 0] == 15, 1, 2).sum() < 0.95
    # The test can fail: the old policy's own samples.
    assert test_statistic(counted(known), want) < 1e-12


def test_rows_that_are_picked_by_their_reward_are_not(drawn):
    """Right responses, those with an even first token, are reused; the others are sampled again with other noise."""
    known, reused, fresh, _ = drawn
    right = known[:, :1] % 2 == 0
    assert test_statistic(counted(np.where(right, reused, fresh)), probabilities(weights()[1])) < 1e-6


def test_acceptance_without_the_residual_is_not(drawn):
    """SPEC-RL's form: a token is accepted with probability min(1, new / old), and from the first rejected one on the new policy
    samples, as if nothing had been seen."""
    old, new = (probabilities(params) for params in weights())
    rng, found = np.random.default_rng(0), []
    first = [x.sum(1) for x in (old, new)]
    second = [x / x.sum(1, keepdims=True) for x in (old, new)]
    for a, b in drawn[0]:
        if rng.random() >= first[1][a] / first[0][a]:
            a = rng.choice(16, p=first[1])
            b = rng.choice(17, p=second[1][a])
        elif a != 15 and rng.random() >= second[1][a][b] / second[0][a][b]:
            b = rng.choice(17, p=second[1][a])
        found.append((a, b))
    assert test_statistic(counted(np.array(found)), new) < 1e-6

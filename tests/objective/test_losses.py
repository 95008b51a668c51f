"""Losses against numbers worked out by hand (reference vectors: eps 0.2 / 0.28)."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.distribution.score import TokenScores
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.loss_config import (
    Clip,
    Distillation,
    Dpo,
    KlConfig,
    NoCorrection,
    PolicyGradient,
)
from jaxrl_llm.objective.losses import cross_entropy_terms, kl_estimate, make_loss, policy_terms
from jaxrl_llm.objective.surrogates import clip
from jaxrl_llm.types import Batch

TABLE = [  # ratio, advantage, loss, low bound active, high bound active
    (1.5, 1.0, -1.28, False, True),
    (0.5, 1.0, -0.5, False, False),
    (1.5, -1.0, 1.5, False, False),
    (0.5, -1.0, 0.8, True, False),
    (5.0, -1.0, 5.0, False, False),
    (5.0, 1.0, -1.28, False, True),
    (1.0, 2.0, -2.0, False, False),
]


def clipped(ratio, advantage):
    """It reads neither log-probs nor the batch."""
    return clip(None, jnp.log(ratio), advantage, None, Clip(low=0.2, high=0.28))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_clipped_surrogate(wrap):
    ratio, advantage, loss, low, high = (np.array(column)[None] for column in zip(*TABLE, strict=True))
    got = wrap(clipped)(ratio.astype(np.float32), advantage.astype(np.float32))
    np.testing.assert_allclose(got.loss, loss, rtol=1e-6)
    np.testing.assert_array_equal(got.low, low)
    np.testing.assert_array_equal(got.high, high)


def test_a_clipped_token_has_no_gradient_and_an_unclipped_one_has_its_advantage():
    ratio, advantage, _, low, high = (np.array(column, np.float32) for column in zip(*TABLE, strict=True))
    gradient = jax.grad(lambda r: clipped(r, advantage).loss.sum())(ratio)
    # Through the logarithm and back: ratio / ratio.
    np.testing.assert_allclose(gradient, np.where(low + high > 0, 0.0, -advantage), rtol=1e-6)


def test_k3():
    np.testing.assert_allclose(
        kl_estimate(jnp.array([0.5, -0.5, 0.0]), 1.0, KlConfig()), [0.10653066, 0.14872127, 0.0], rtol=1e-5
    )


def batch_of(mask, behavior, advantage, reference=None) -> Batch:
    zeros = np.zeros(mask.shape, np.float32)
    return Batch(
        *[zeros.astype(int)] * 4, segment=mask.astype(int), group=mask.astype(int), loss_mask=mask, weight=mask / mask.sum(),
        behavior_logprobs=behavior, advantage=advantage, temperature=zeros + 1, reference_logprobs=reference,
    )  # fmt: skip


def test_reused_rows_are_shaped_and_fresh_ones_clipped():
    """By hand, A = 2: a reused token of ratio 1/2 has -2 * 0.5 / 0.6, of ratio 4 -2 * 4 / 4.1; a fresh one of 4 is clipped to 1.28.
    The slope of r / (r + c) by log p is r c / (r + c)^2, where a clipped ratio has none."""
    mask, advantage = np.ones((1, 3), bool), np.full((1, 3), 2, np.float32)
    behavior = np.array([[-1.0, -2.0, -2.0]], np.float32)
    now = behavior + np.log(np.array([[0.5, 4, 4]], np.float32))
    batch = batch_of(mask, behavior, advantage).replace(own={"shaped": np.array([[True, True, False]])})
    cfg = PolicyGradient(surrogate=Clip(low=0.2, high=0.28), shaping=0.1)

    def loss(logprobs):
        return policy_terms(TokenScores(logprobs, jnp.zeros((1, 3))), batch, cfg, NoCorrection()).loss

    np.testing.assert_allclose(loss(now)[0], [-2 * 0.5 / 0.6, -2 * 4 / 4.1, -2 * 1.28], rtol=1e-6)
    slope = jax.grad(lambda x: loss(x).sum())(jnp.asarray(now))[0]
    np.testing.assert_allclose(slope, [-2 * 0.05 / 0.36, -2 * 0.4 / 4.1**2, 0], rtol=1e-5)


def test_which_rows_are_reused_is_a_column_of_the_batch():
    (column,) = make_loss(ObjectiveConfig(loss=PolicyGradient(shaping=0.1))).own
    assert make_loss(ObjectiveConfig()).own == () and column.name == "shaped"
    sampled = np.array([[True, True], [True, False], [True, True]])
    groups = SimpleNamespace(
        rollouts=SimpleNamespace(sampled=sampled), reused=np.array([False, True, True]), taught=None
    )
    assert column.make(groups, None).tolist() == [[False, False], [True, False], [True, True]]
    groups.reused = None
    assert not column.make(groups, None).any()
    groups.taught = ~sampled
    assert column.make(groups, None).tolist() == [[False, False], [False, True], [False, False]]


def test_policy_terms_put_surrogate_kl_and_entropy_together():
    mask = np.array([[False, True]])
    scores = TokenScores(jnp.array([[-9.0, -1.0]]), jnp.array([[0.3, 0.7]]))
    batch = batch_of(
        mask, np.array([[0.0, -1.5]], np.float32), np.array([[0.0, 2.0]], np.float32), np.array([[0.0, -1.5]])
    )
    cfg = PolicyGradient(surrogate=Clip(low=0.2, high=0.28), kl=KlConfig(weight=0.1), entropy=0.01)
    terms = policy_terms(scores, batch, cfg, NoCorrection())
    # ratio e^0.5 = 1.6487 is clipped to 1.28; k3 at d = log p - log p_ref = 0.5 is 0.10653066
    np.testing.assert_allclose(terms.loss[0, 1], -2 * 1.28 + 0.1 * 0.10653066 - 0.01 * 0.7, rtol=1e-6)
    np.testing.assert_allclose(terms.maxima["ratio/max"][0, 1], np.exp(0.5), rtol=1e-6)
    np.testing.assert_allclose(terms.maxima["mismatch/max_abs_dlogp"][0, 1], 0.5, rtol=1e-6)


@pytest.mark.parametrize("loss", [PolicyGradient(), Dpo(), Distillation()], ids=lambda loss: loss.kind)
def test_every_loss_of_sampled_tokens_tells_how_far_the_sampler_is(loss):
    """Every loss measures the metric that `update.guards.max_mismatch_kl` reads."""
    mask, zeros = np.array([[False, True]]), np.zeros((1, 2), np.float32)
    scores = TokenScores(jnp.array([[-9.0, -1.0]]), zeros, kl=zeros)
    terms = make_loss(ObjectiveConfig(loss=loss)).terms(scores, batch_of(mask, zeros - 1.5, zeros, zeros))
    # The trainer has d = 0.5 nats more than the sampler; e^d - 1 - d.
    np.testing.assert_allclose(terms.means["mismatch/kl"], [[0, 0.14872127]], rtol=1e-6)
    np.testing.assert_allclose(terms.means["mismatch/mean_abs_dlogp"], [[0, 0.5]], rtol=1e-6)
    np.testing.assert_allclose(terms.maxima["mismatch/max_abs_dlogp"], [[0, 0.5]], rtol=1e-6)


def test_values_outside_the_mask_cannot_reach_the_gradient():
    """A prompt token may be as unlikely as it likes: e^(80 - 0) overflows f32 when squared, and inf * 0 is NaN."""
    mask = np.array([[False, True]])

    def loss(logprobs):
        batch = batch_of(
            mask, np.zeros((1, 2), np.float32), np.ones((1, 2), np.float32), np.full((1, 2), 200.0, np.float32)
        )
        batch = batch.replace(reference_logprobs=jnp.array([[200.0, -1.0]]))
        cfg = PolicyGradient(kl=KlConfig(weight=0.1))
        terms = policy_terms(TokenScores(logprobs, logprobs), batch, cfg, NoCorrection())
        return jnp.sum(jnp.where(mask, terms.loss, 0))

    gradient = jax.grad(loss)(jnp.array([[120.0, -0.1]]))
    assert np.isfinite(gradient).all()
    assert gradient[0, 0] == 0 and gradient[0, 1] != 0


def test_cross_entropy():
    scores = TokenScores(jnp.array([[-2.0, -0.5]]), jnp.zeros((1, 2)))
    batch = batch_of(np.ones((1, 2), bool), np.zeros((1, 2)), np.zeros((1, 2)))
    np.testing.assert_array_equal(cross_entropy_terms(scores, batch).loss, [[2.0, 0.5]])

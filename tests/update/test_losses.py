"""Losses against numbers worked out by hand (reference vectors: eps 0.2 / 0.28)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.model.distribution import TokenScores
from jaxrl_llm.types import Batch
from jaxrl_llm.update.config import ClippedLoss, CrossEntropyLoss, NoCorrection
from jaxrl_llm.update.losses import clipped_surrogate, clipped_terms, cross_entropy_terms, k3, token_weights

TABLE = [  # ratio, advantage, loss, held by low, held by high
    (1.5, 1.0, -1.28, False, True),
    (0.5, 1.0, -0.5, False, False),
    (1.5, -1.0, 1.5, False, False),
    (0.5, -1.0, 0.8, True, False),
    (5.0, -1.0, 5.0, False, False),
    (5.0, 1.0, -1.28, False, True),
    (1.0, 2.0, -2.0, False, False),
]


@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: jax.jit(f, static_argnums=(2, 3))], ids=["eager", "jit"])
def test_clipped_surrogate(wrap):
    ratio, advantage, loss, low, high = (np.array(column)[None] for column in zip(*TABLE, strict=True))
    got = wrap(clipped_surrogate)(ratio.astype(np.float32), advantage.astype(np.float32), 0.2, 0.28)
    np.testing.assert_allclose(got.loss, loss, rtol=1e-6)
    np.testing.assert_array_equal(got.low, low)
    np.testing.assert_array_equal(got.high, high)


def test_a_clipped_token_has_no_gradient_and_an_unclipped_one_has_its_advantage():
    ratio, advantage, _, low, high = (np.array(column, np.float32) for column in zip(*TABLE, strict=True))
    gradient = jax.grad(lambda r: clipped_surrogate(r, advantage, 0.2, 0.28).loss.sum())(ratio)
    np.testing.assert_allclose(gradient, np.where(low + high > 0, 0.0, -advantage))


def test_k3():
    np.testing.assert_allclose(k3(jnp.array([0.5, -0.5, 0.0]), jnp.zeros(3)), [0.10653066, 0.14872127, 0.0], rtol=1e-5)


LOSS = np.array([[1, 2, 0, 0], [1, 1, 1, 5]], np.float32)
MASK = np.array([[1, 1, 0, 0], [1, 1, 1, 1]], bool)


@pytest.mark.parametrize(("normalize", "want"), [("token", 11 / 6), ("sequence", 1.75), ("constant", 0.6875)])
def test_token_weights(normalize, want):
    """The reference's token losses [[1, 2], [1, 1, 1, 5]]; constant length 8."""
    segment = MASK.astype(np.int32)
    np.testing.assert_allclose((token_weights(MASK, segment, normalize, 8) * LOSS).sum(), want, rtol=1e-6)


@pytest.mark.parametrize("normalize", ["token", "sequence", "constant"])
def test_packing_two_sequences_into_a_row_changes_no_mean(normalize):
    packed_loss = np.array([[1, 2, 1, 1, 1, 5, 7]], np.float32)
    packed_mask = np.array([[1, 1, 1, 1, 1, 1, 0]], bool)
    packed_segment = np.array([[1, 1, 2, 2, 2, 2, 0]])
    apart = (token_weights(MASK, MASK.astype(int), normalize, 8) * LOSS).sum()
    together = (token_weights(packed_mask, packed_segment, normalize, 8) * packed_loss).sum()
    np.testing.assert_allclose(together, apart, rtol=1e-6)


@pytest.mark.parametrize("normalize", ["token", "sequence", "constant"])
def test_sequences_without_a_token_do_not_count_and_nothing_at_all_weighs_nothing(normalize):
    more = np.concatenate([MASK, np.zeros((3, 4), bool)])
    weights = token_weights(more, np.ones(more.shape, int), normalize, 8)
    np.testing.assert_allclose(weights[:2], token_weights(MASK, np.ones(MASK.shape, int), normalize, 8), rtol=1e-6)
    np.testing.assert_array_equal(token_weights(np.zeros((2, 4), bool), np.ones((2, 4), int), normalize, 8), 0)


def batch_of(mask, behavior, advantage, reference=None) -> Batch:
    zeros = np.zeros(mask.shape, np.float32)
    return Batch(
        tokens=zeros.astype(int), segment=mask.astype(int), position=zeros.astype(int), loss_mask=mask,
        behavior_logprobs=behavior, advantage=advantage, temperature=zeros + 1, reference_logprobs=reference,
    )  # fmt: skip


def test_clipped_terms_put_surrogate_kl_and_entropy_together():
    mask = np.array([[False, True]])
    scores = TokenScores(jnp.array([[-9.0, -1.0]]), jnp.array([[0.3, 0.7]]))
    batch = batch_of(
        mask, np.array([[0.0, -1.5]], np.float32), np.array([[0.0, 2.0]], np.float32), np.array([[0.0, -1.5]])
    )
    terms = clipped_terms(scores, batch, ClippedLoss(low=0.2, high=0.28, kl=0.1, entropy=0.01), NoCorrection())
    # ratio e^0.5 = 1.6487 is held at 1.28; k3 at d = -0.5 is 0.10653066
    np.testing.assert_allclose(terms.loss[0, 1], -2 * 1.28 + 0.1 * 0.10653066 - 0.01 * 0.7, rtol=1e-6)
    np.testing.assert_allclose(terms.maxima["ratio/max"][0, 1], np.exp(0.5), rtol=1e-6)
    np.testing.assert_allclose(terms.maxima["mismatch/max_abs_dlogp"][0, 1], 0.5, rtol=1e-6)


def test_values_outside_the_mask_cannot_reach_the_gradient():
    """A prompt token may be as unlikely as it likes: e^(80 - 0) overflows f32 when squared, and inf * 0 is NaN."""
    mask = np.array([[False, True]])

    def loss(logprobs):
        batch = batch_of(
            mask, np.zeros((1, 2), np.float32), np.ones((1, 2), np.float32), np.full((1, 2), 200.0, np.float32)
        )
        batch = batch.replace(reference_logprobs=jnp.array([[200.0, -1.0]]))
        terms = clipped_terms(TokenScores(logprobs, logprobs), batch, ClippedLoss(kl=0.1), NoCorrection())
        return jnp.sum(jnp.where(mask, terms.loss, 0))

    gradient = jax.grad(loss)(jnp.array([[120.0, -0.1]]))
    assert np.isfinite(gradient).all()
    assert gradient[0, 0] == 0 and gradient[0, 1] != 0


def test_cross_entropy():
    scores = TokenScores(jnp.array([[-2.0, -0.5]]), jnp.zeros((1, 2)))
    batch = batch_of(np.ones((1, 2), bool), np.zeros((1, 2)), np.zeros((1, 2)))
    np.testing.assert_array_equal(
        cross_entropy_terms(scores, batch, CrossEntropyLoss(), NoCorrection()).loss, [[2.0, 0.5]]
    )

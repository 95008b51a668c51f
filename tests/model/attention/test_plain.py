"""Masks, scores and the merge of partial attention, by hand and against one softmax over all keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.model.attention import plain
from jaxrl_llm.model.attention.plain import PackedRows, tree_mask

attend, attend_part, merge = (jax.jit(f) for f in (plain.attend, plain.attend_part, plain.merge))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_mask_of_packed_sequences_by_hand():
    """Two sequences per row, then padding, which attends to nothing; the second query of each sequence attends to two keys."""
    got = tree_mask(PackedRows(jnp.array([[2, 2, 4, 4, 4]]), jnp.array([[0, 1, 0, 1, 0]])))[0]
    want = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(got, np.array(want, bool))


def test_mask_of_a_shared_prompt_by_hand():
    """A prompt of two tokens, then completions of two and one: each attends to the prompt and itself."""
    got = tree_mask(PackedRows(jnp.array([[5, 5, 4, 4, 5]]), jnp.array([[0, 1, 2, 3, 2]])))[0]
    want = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
    np.testing.assert_array_equal(got, np.array(want, bool))


def test_attend_by_hand():
    """One head of width 1; scores q k = 0 and ln 3, so the weights are 1/4 and 3/4; a masked key has no weight."""
    q = jnp.ones((1, 1, 1, 1, 1))
    k = jnp.array([0.0, np.log(3.0), 50.0]).reshape(1, 3, 1, 1)
    v = jnp.array([8.0, 4.0, 1e6]).reshape(1, 3, 1, 1)
    np.testing.assert_allclose(attend(q, k, v, jnp.array([[[True, True, False]]])).ravel(), [5.0], rtol=1e-6)


def test_query_heads_of_a_group_share_a_key_head():
    q, k, v = normal(0, 2, 3, 2, 4, 8), normal(1, 2, 5, 2, 8), normal(2, 2, 5, 2, 8)
    mask = jnp.ones((2, 3, 5), bool)
    whole = attend(q, k, v, mask)
    alone = attend(q[:, :, 1:, 2:3], k[:, :, 1:], v[:, :, 1:], mask)
    np.testing.assert_allclose(whole[:, :, 1:, 2:3], alone, atol=1e-6)
    scores = np.einsum("bth,buh->btu", q[:, :, 1, 2], k[:, :, 1]) / np.sqrt(8)
    weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(whole[:, :, 1, 2], weights @ np.asarray(v[:, :, 1]), atol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 200.0])
def test_parts_merged_are_attention_over_all_keys(offset):
    """`offset` in one part's scores: exp would overflow if parts were not rescaled to the common maximum."""
    q, k, v = normal(0, 2, 3, 4, 8), normal(1, 2, 3, 7, 8), normal(2, 2, 3, 7, 8)
    k = k.at[:, :, :3].add(offset * q[:, :, :1] / jnp.sum(q[:, :, :1] ** 2, axis=-1, keepdims=True))
    mask = jnp.array([[True] * 7, [False, True, True, False, False, True, True]])
    parts = [attend_part(q, k[:, :, part], v[:, :, part], mask[:, part]) for part in (slice(0, 3), slice(3, 7))]
    whole = attend(
        q.swapaxes(1, 2)[:, None].swapaxes(1, 2).reshape(2, 4, 3, 1, 8), k.swapaxes(1, 2), v.swapaxes(1, 2),
        jnp.broadcast_to(mask[:, None], (2, 4, 7)),
    )  # fmt: skip
    np.testing.assert_allclose(merge(*parts), whole[:, :, :, 0].swapaxes(1, 2), atol=1e-5)
    np.testing.assert_allclose(merge(*parts[::-1]), merge(*parts), atol=1e-6)


def test_a_part_without_keys_has_exactly_zero_weight():
    """A prompt of one token has no key in the cache: its only token is read by the first decode step."""
    q, k, v = normal(0, 1, 2, 3, 4), normal(1, 1, 2, 5, 4), normal(2, 1, 2, 5, 4)
    none = attend_part(q, k, v, jnp.zeros((1, 5), bool))
    np.testing.assert_array_equal(none[0], 0.0)
    np.testing.assert_array_equal(none[1], 0.0)
    own = attend_part(q, k[:, :, :2], v[:, :, :2], jnp.ones((1, 2), bool))
    np.testing.assert_array_equal(merge(none, own), merge(own))


def test_values_in_bfloat16_are_summed_in_f32():
    q, k, v = (
        x.astype(jnp.bfloat16) for x in (normal(0, 1, 1, 2, 4), normal(1, 1, 1, 300, 4), normal(2, 1, 1, 300, 4))
    )
    out, weight, top = attend_part(q, k, v, jnp.ones((1, 300), bool))
    assert out.dtype == weight.dtype == top.dtype == jnp.float32
    # The weights are rounded to bf16 (2^-9 relative) before the product, their sum is not.
    exact = merge(attend_part(*(x.astype(jnp.float32) for x in (q, k, v)), jnp.ones((1, 300), bool)))
    np.testing.assert_allclose(merge((out, weight, top)), exact, atol=5e-3)


def test_scale_and_soft_cap_by_hand():
    """q k = 0 and 6, times 1/2; capped at 2: 2 tanh(3 / 2). The cap is applied before the mask: masked keys stay masked."""
    q = jnp.ones((1, 1, 1, 1, 1))
    k = jnp.array([0.0, 6.0, 50.0]).reshape(1, 3, 1, 1)
    v = jnp.array([8.0, 4.0, 1e6]).reshape(1, 3, 1, 1)
    capped = np.exp(2 * np.tanh(1.5))
    want = (8 + 4 * capped) / (1 + capped)
    mask = jnp.array([[[True, True, False]]])
    np.testing.assert_allclose(plain.attend(q, k, v, mask, 0.5, 2.0).ravel(), [want], rtol=1e-6)
    part = plain.attend_part(q[:, 0], k.swapaxes(1, 2), v.swapaxes(1, 2), mask[0], 0.5, 2.0)
    np.testing.assert_allclose(merge(part).ravel(), [want], rtol=1e-6)


def test_mask_of_a_sliding_layer_by_hand():
    """A window of two positions in the sequence, not of two slots. The last completion attends to half of the shared prompt."""
    packed = PackedRows(jnp.array([[3, 3, 3, 5, 5]]), jnp.array([[0, 1, 2, 0, 1]]))
    want = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    shared = PackedRows(jnp.array([[5, 5, 4, 4, 5]]), jnp.array([[0, 1, 2, 3, 2]]))
    tree = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 1, 0, 0, 1]]
    for window in (2, jnp.int32(2)):
        np.testing.assert_array_equal(tree_mask(packed, window)[0], np.array(want, bool))
        np.testing.assert_array_equal(tree_mask(shared, window)[0], np.array(tree, bool))

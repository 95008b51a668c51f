"""Rotary embedding: rotations by hand, and the frequencies of every scaling, by hand and as the papers define them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.model import rope as rope_module
from jaxrl_llm.model.config import LinearRope, Llama3Rope, ModelConfig, YarnRope
from jaxrl_llm.model.rope import Rotation, rotation


@jax.jit
def rope(x, position, rotation):
    return rope_module.rope(x, rope_module.angles(position, rotation))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def rotation_of(head_dim=8, slides=False, **fields) -> Rotation:
    return rotation(ModelConfig(head_dim=head_dim, **fields), slides)


def plain(theta, head_dim=8) -> Rotation:
    return rotation_of(head_dim, rope_theta=theta)


def test_rope_by_hand():
    """H = 4, theta = 100: the pairs (0, 2) and (1, 3) rotate by position and by position / 10."""
    x = jnp.array([[[[1.0, 0.0, 0.0, 1.0]]]])
    got = rope(x, jnp.array([[3]]), plain(100.0, 4))[0, 0, 0]
    np.testing.assert_allclose(got, [np.cos(3), -np.sin(0.3), np.sin(3), np.cos(0.3)], atol=1e-6)
    np.testing.assert_array_equal(rope(x, jnp.array([[0]]), plain(100.0, 4)), x)


def test_rope_makes_scores_depend_on_the_distance_only():
    q, k = normal(0, 1, 1, 1, 8), normal(1, 1, 1, 1, 8)
    score = [
        float(jnp.sum(rope(q, jnp.array([[a]]), plain(1e4)) * rope(k, jnp.array([[b]]), plain(1e4))))
        for a, b in ((5, 2), (105, 102), (5, 3))
    ]
    np.testing.assert_allclose(score[0], score[1], atol=1e-4)
    assert abs(score[0] - score[2]) > 1e-3


def test_rope_keeps_its_angle_in_f32():
    """In bfloat16 the position 257 is 256."""
    x = jnp.ones((1, 1, 1, 2), jnp.bfloat16)
    got = rope(x, jnp.array([[257]]), plain(1e4, 2))
    assert got.dtype == jnp.bfloat16
    want = [np.cos(257) - np.sin(257), np.cos(257) + np.sin(257)]
    np.testing.assert_allclose(np.asarray(got, np.float32).ravel(), want, atol=5e-3)


def test_rope_rotates_any_number_of_heads_equally():
    x, position = normal(0, 2, 3, 4, 5, 6), jnp.array([[0, 1, 2], [7, 8, 9]])
    np.testing.assert_allclose(
        rope(x, position, plain(1e4, 6))[:, :, 2, 3], rope(x[:, :, 2, 3:4], position, plain(1e4, 6))[:, :, 0], atol=1e-6
    )


def test_scale_multiplies_the_rotated_vector():
    x, position = normal(0, 1, 3, 2, 8), jnp.array([[0, 5, 900]])
    got = rope(x, position, plain(1e4)._replace(scale=1.25))
    np.testing.assert_allclose(got, 1.25 * rope(x, position, plain(1e4)), rtol=1e-6)


def test_plain_frequencies_by_hand():
    """theta = 16, H = 4: 16^0 and 16^(-2/4)."""
    found = plain(16.0, 4)
    np.testing.assert_array_equal(found.frequency, np.array([1.0, 0.25], np.float32))
    assert found.frequency.dtype == np.float32 and found.scale == 1.0


def test_linear_divides_every_frequency():
    found = rotation_of(4, rope_theta=16.0, rope_scaling=LinearRope(factor=8.0))
    np.testing.assert_array_equal(found.frequency, np.array([1 / 8, 1 / 32], np.float32))
    assert found.scale == 1.0


def test_llama3_by_hand():
    """theta = 10^4, H = 8: the pairs rotate by 1, 0.1, 0.01 and 0.001 radians per position.

    Within an original length of 200 pi they make 100, 10, 1 and 0.1 turns. Pairs with 4 turns or more are kept, those with 1 or
    fewer are divided by the factor, 8. With bounds 0.1 and 1.9 the third is half way: 0.01 * (1/2 + 1/2 / 8) = 0.005625.
    """
    # The length is an integer: 628 for 200 pi, so turns are 0.05 % fewer.
    frequency = rotation_of(rope_scaling=Llama3Rope(factor=8.0, original_length=628)).frequency
    np.testing.assert_allclose(frequency, [1.0, 0.1, 0.01 / 8, 0.001 / 8], rtol=1e-6)
    scaling = Llama3Rope(factor=8.0, original_length=628, low_freq_factor=0.1, high_freq_factor=1.9)
    np.testing.assert_allclose(rotation_of(rope_scaling=scaling).frequency, [1.0, 0.1, 0.005625, 0.000125], rtol=1e-3)


def test_llama3_as_published():
    """Llama 3.1 8B: by wavelength, pair by pair, as in Meta's inference code."""
    scaling = Llama3Rope(factor=8.0, original_length=8192, low_freq_factor=1.0, high_freq_factor=4.0)
    got = rotation_of(128, rope_theta=5e5, rope_scaling=scaling).frequency
    want = []
    for i in range(64):
        base = 5e5 ** (-2 * i / 128)
        wavelength = 2 * math.pi / base
        if wavelength < 8192 / 4:
            want.append(base)
        elif wavelength > 8192:
            want.append(base / 8)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            want.append((1 - smooth) * base / 8 + smooth * base)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    ratio = got / plain(5e5, 128).frequency
    assert ratio[0] == 1.0 and ratio[-1] == pytest.approx(1 / 8) and ((ratio > 0.13) & (ratio < 0.99)).any()


def test_yarn_by_hand():
    """theta = 10^4, H = 8: pair i makes 1 turn in 2 pi 10^i positions, so within 628 of them pair log10(628 / (2 pi n)) makes n.

    n = 10: pair 0.9998, rounded down to 0; n = 0.1: pair 2.9998, rounded up to 3. The ramp of pairs 0 to 3 is 0, 1/3, 2/3, 1;
    with factor 4 a frequency is multiplied by 1 - 3/4 of the ramp.
    """
    scaling = YarnRope(factor=4.0, original_length=628, beta_fast=10.0, beta_slow=0.1)
    found = rotation_of(rope_scaling=scaling)
    np.testing.assert_allclose(found.frequency, [1.0, 0.1 * 0.75, 0.01 * 0.5, 0.001 * 0.25], rtol=1e-6)
    assert found.scale == pytest.approx(0.1 * math.log(4) + 1)
    # Not truncated, the ramp goes from 0.9998 to 2.9998: pair 1 is kept, pair 2 half way, pair 3 divided.
    bare = rotation_of(rope_scaling=dataclasses.replace(scaling, truncate=False)).frequency
    np.testing.assert_allclose(bare, [1.0, 0.1, 0.01 * 0.625, 0.001 * 0.25], rtol=1e-3)


def test_yarn_uses_a_given_attention_factor_and_1_below_factor_1():
    given = YarnRope(factor=4.0, original_length=628, attention_factor=0.7)
    assert rotation_of(rope_scaling=given).scale == 0.7
    assert rotation_of(rope_scaling=YarnRope(factor=0.5, original_length=628)).scale == 1.0


def test_yarn_with_both_ends_at_one_pair_is_a_step():
    """beta_fast = beta_slow at a whole pair: pairs up to it are kept, later ones divided."""
    scaling = YarnRope(factor=4.0, original_length=628, beta_fast=1.0, beta_slow=1.0, truncate=False)
    ratio = rotation_of(rope_scaling=scaling).frequency / plain(1e4).frequency
    # log10(628 / 2 pi) = 1.9998: pair 2 lies a fifth of the thousandth behind it.
    np.testing.assert_allclose(ratio[[0, 1, 3]], [1, 1, 0.25], rtol=1e-6)


def test_a_separate_base_of_sliding_layers_is_never_scaled():
    fields = {"rope_theta": 1e6, "rope_scaling": LinearRope(factor=8.0), "sliding_rope_theta": 16.0}
    np.testing.assert_array_equal(rotation_of(4, slides=True, **fields).frequency, np.array([1.0, 0.25], np.float32))
    np.testing.assert_allclose(rotation_of(4, slides=False, **fields).frequency, [1 / 8, 1e-3 / 8], rtol=1e-6)
    alike = rotation_of(4, slides=True, rope_theta=1e6, rope_scaling=LinearRope(factor=8.0))
    np.testing.assert_allclose(alike.frequency, [1 / 8, 1e-3 / 8], rtol=1e-6)


def test_shared_angles_equal_angles():
    position, found = jnp.array([[3], [257]]), plain(1e4)._replace(scale=1.25)
    got = jax.jit(lambda position, count: rope_module.shared_angles(position, found, count))(position, jnp.int32(0))
    for a, b in zip(got, rope_module.angles(position, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)

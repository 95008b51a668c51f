"""8-bit matrices: the rounding by hand, the product against integers, and which leaves are quantized."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from setups import FAMILIES, SMALL, layouts

from jaxrl_llm.model import quantized_weights
from jaxrl_llm.model.linear import contract
from jaxrl_llm.model.params import ParamSpec, specs
from jaxrl_llm.model.quantized_weights import Quantized, dequantize, look_up, quantize, quantized_specs

FP8 = jnp.float8_e4m3fn


def test_by_hand():
    """Columns: largest 1 (0.25 is 31.75 of 127 parts), largest 254 (100 is 50 of 127), all zeros."""
    w = quantize(jnp.array([[1.0, -254.0, 0.0], [0.25, 100.0, 0.0]]), (0,), jnp.int8)
    np.testing.assert_array_equal(w.q, [[127, -127, 0], [32, 50, 0]])
    np.testing.assert_allclose(w.scale, [[1 / 127, 2.0, 1.0]], rtol=1e-7)
    assert w.q.dtype == jnp.int8 and w.scale.dtype == jnp.float32
    np.testing.assert_allclose(dequantize(w), [[1.0, -254.0, 0.0], [32 / 127, 100.0, 0.0]], rtol=1e-6)


@pytest.mark.parametrize("inner", [(0,), (1,), (0, 1, 2)])
def test_int8_is_off_by_half_a_scale_at_most(inner):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5, 4, 3)), jnp.float32)
    w8 = quantize(w, inner, jnp.int8)
    assert w8.scale.shape == tuple(1 if i in inner else n for i, n in enumerate(w.shape))
    off = np.abs(dequantize(w8) - w) / w8.scale
    # Division and product each have a relative error of 2^-24, of 127 parts.
    assert 0.45 < off.max() <= 0.5 + 127 * 2**-22


def test_fp8_is_off_by_half_a_step_at_most():
    """e4m3: 3 mantissa bits, and steps of 2^-9 below 2^-6."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(64, 32)) * 10.0 ** rng.uniform(-4, 0, (64, 1)), jnp.float32)
    w8 = quantize(w, (0,), FP8)
    np.testing.assert_allclose(w8.scale, np.abs(w).max(axis=0, keepdims=True) / 448, rtol=1e-6)
    most = np.maximum(np.abs(w) * 2**-4, w8.scale * 2**-10) * (1 + 1e-5)
    off = np.abs(dequantize(w8) - w)
    assert np.isfinite(off).all() and (off <= most).all() and (off > most / 2).mean() > 0.1


# Sums over one and several dimensions, with one, two and four groups, and outputs of one and two dimensions.
SHAPES = [
    ((5, 16), (16, 3), 1, 1),
    ((2, 3, 24), (24, 2, 5), 1, 1),
    ((7, 2, 3, 4), (2, 3, 4, 6), 3, 2),
    ((7, 24), (24, 6), 1, 4),
]


@pytest.mark.slow
@pytest.mark.parametrize("x_shape, w_shape, inner, groups", SHAPES)
def test_product_equals_integer_arithmetic(x_shape, w_shape, inner, groups):
    """Integers with a maximum of 127 per row and group, and per channel: scales are 1, and sums must be exact."""
    rng = np.random.default_rng(0)
    rows, outputs = int(np.prod(x_shape[: len(x_shape) - inner])), w_shape[inner:]
    x, w = (
        rng.integers(-127, 128, (rows, groups, -(-int(np.prod(w_shape[:inner])) // groups))),
        rng.integers(-127, 128, w_shape),
    )
    x[..., 0], w[(0,) * inner] = 127, -127
    exact = x.reshape(rows, -1) @ w.reshape(-1, int(np.prod(outputs)))
    w8 = quantize(jnp.asarray(w, jnp.float32), tuple(range(inner)), jnp.int8, groups)
    got = contract(jnp.asarray(x, jnp.bfloat16).reshape(x_shape), w8, inner)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, exact.reshape(*x_shape[: len(x_shape) - inner], *outputs))


def in_numpy(x, w, groups):
    """The product in NumPy, with one activation scale per row and group."""
    scale = np.abs(w).max(axis=0) / np.float32(127)
    q = np.round(w / scale).astype(np.int64)
    total = 0
    for part, q_part in zip(np.split(x, groups, axis=1), np.split(q, groups), strict=True):
        x_scale = np.abs(part).max(axis=1, keepdims=True) / np.float32(127)
        total = total + (np.round(part / x_scale).astype(np.int64) @ q_part) * x_scale.astype(np.float64)
    return total * scale


def test_each_group_of_a_row_has_its_own_scale():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(4, 64)).astype(np.float32), rng.normal(size=(64, 8)).astype(np.float32)
    x[:, :32] *= 1000
    got = contract(jnp.asarray(x), quantize(jnp.asarray(w), (0,), jnp.int8, 2))
    # An activation half-way between two steps may round either way: 1/127 of its group's largest.
    np.testing.assert_allclose(got, in_numpy(x, w, 2), rtol=1e-5, atol=1e-3)
    small = x.copy()
    small[:, :32] = 0
    error = np.abs(contract(jnp.asarray(small), quantize(jnp.asarray(w), (0,), jnp.int8, 2)) - small @ w).max()
    assert error < 0.2, "the large group's scale reached the small one"


def test_zero_activations_give_zeros():
    w = quantize(jnp.ones((4, 3)), (0,), jnp.int8, 2)
    np.testing.assert_array_equal(contract(jnp.zeros((2, 4)), w), np.zeros((2, 3)))


def test_fp8_product_is_close_to_the_exact_one():
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((6, 64), (64, 5)))
    got, exact = contract(x, quantize(w, (0,), FP8)), np.asarray(x) @ np.asarray(w)
    # Each factor is off by up to 2^-4: the sum of 64 products of order 1 by less than sqrt(64) * 2^-3.
    assert 1e-3 < np.abs(got - exact).max() < 1.0


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_look_up_returns_rows_of_the_table(sizes):
    """Tokens of both halves of the vocabulary, including the first and last of each."""
    table, layout = jnp.asarray(np.random.default_rng(0).normal(size=(8, 5)), jnp.float32), layouts(sizes)[1]
    w8, index = quantize(table, (1,), jnp.int8), jnp.array([[7, 0], [3, 4], [4, 4], [1, 6]])
    np.testing.assert_array_equal(look_up(w8, index, jnp.float32, layout), np.asarray(dequantize(w8))[index])
    np.testing.assert_array_equal(look_up(table, index, jnp.bfloat16, layout), table[index].astype(jnp.bfloat16))


MATRICES = {"qkv": 1, "out": 8, "gate_up": 1, "down": 8}
"""Activation groups per matrix, for 8 kv heads."""


def test_only_matrices_and_the_head_are_quantized():
    tied = quantized_specs(specs(SMALL), SMALL)
    assert {name for name, leaf in tied["layers"].items() if isinstance(leaf, Quantized)} == set(MATRICES)
    assert {name: tied["layers"][name].groups for name in MATRICES} == MATRICES
    assert isinstance(tied["embed"], Quantized) and isinstance(tied["final_norm"], ParamSpec)
    cfg = FAMILIES["mistral, window 3"]
    untied = quantized_specs(specs(cfg), cfg)
    assert isinstance(untied["head"], Quantized) and isinstance(untied["embed"], ParamSpec)


def test_scales_are_shaped_and_sharded_like_the_outputs():
    found = quantized_specs(specs(SMALL), SMALL)
    want = {
        "qkv": ((2, 1, 8, 4, 8), ("layers", None, "heads", None, None)),
        "out": ((2, 1, 1, 1, 32), ("layers", None, None, None, "embed")),
        "gate_up": ((2, 2, 1, 64), ("layers", None, None, "mlp")),
        "down": ((2, 1, 32), ("layers", None, "embed")),
    }
    assert {name: found["layers"][name].scale[:2] for name in MATRICES} == want
    assert found["embed"].scale[:2] == ((16, 1), ("vocab", None))


def test_unsupported_quantization_is_refused_by_name(monkeypatch):
    class Device:
        platform, device_kind, compute_capability = "gpu", "H200", "9.0"

    here = jax.devices()[0]
    assert (
        quantized_weights.problems(SMALL, "int8", here)
        == quantized_weights.problems(FAMILIES["qwen3-moe"], "compute", here)
        == []
    )
    (experts,) = quantized_weights.problems(FAMILIES["qwen3-moe"], "int8", here)
    assert experts == "rollout.engine.weights: got int8, want compute for a model with experts (4)"
    (cpu,) = quantized_weights.problems(SMALL, "fp8", here)
    assert cpu.startswith("rollout.engine.weights: got fp8 on cpu, want a GPU")
    assert quantized_weights.problems(SMALL, "fp8", Device()) == []
    monkeypatch.setattr(Device, "compute_capability", "8.0")
    assert len(quantized_weights.problems(SMALL, "fp8", Device())) == 1

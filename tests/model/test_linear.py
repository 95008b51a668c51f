"""The matrix product and its gradient: equal to einsum's, without mixed-precision products."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.model.linear import contract, contract_each

SHAPES = [
    ((5, 4), (4, 3), 1, "ti,io->to"),
    ((2, 5, 4), (4, 2, 3), 1, "bti,iko->btko"),
    ((2, 5, 3, 4), (3, 4, 6), 2, "btki,kio->bto"),
]


def arrays(*shapes, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def test_by_hand():
    x, w = jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 5.0], [7.0, 11.0]])
    np.testing.assert_array_equal(contract(x, w), [[17.0, 27.0]])
    dx, dw = jax.grad(lambda x, w: contract(x, w)[0, 1], argnums=(0, 1))(x, w)
    np.testing.assert_array_equal(dx, [[5.0, 11.0]])
    np.testing.assert_array_equal(dw, [[0.0, 1.0], [0.0, 2.0]])


@pytest.mark.parametrize("x_shape, w_shape, inner, formula", SHAPES)
def test_value_and_gradient_equal_einsum(x_shape, w_shape, inner, formula):
    x, w = arrays(x_shape, w_shape)

    def loss(product):
        return lambda x, w: jnp.sum(jnp.sin(product(x, w)))

    ours, theirs = loss(lambda x, w: contract(x, w, inner)), loss(lambda x, w: jnp.einsum(formula, x, w))
    np.testing.assert_allclose(contract(x, w, inner), jnp.einsum(formula, x, w), atol=1e-5)
    for got, want in zip(jax.grad(ours, (0, 1))(x, w), jax.grad(theirs, (0, 1))(x, w), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_f32_masters_multiply_in_the_dtype_of_the_activations():
    x, w = arrays((6, 8), (8, 4))
    half = x.astype(jnp.bfloat16)
    out = contract(half, w)
    assert out.dtype == jnp.float32
    exact = np.asarray(half, np.float64) @ np.asarray(w.astype(jnp.bfloat16), np.float64)
    # Products of bf16 are exact in f32 and so, nearly, are sums of eight of them; a bf16 sum would be off by 1e-2.
    np.testing.assert_allclose(out, exact, atol=1e-5)


def test_gradients_have_the_dtypes_of_their_arguments_and_no_product_is_mixed():
    x, w = arrays((6, 8), (8, 4))
    half = x.astype(jnp.bfloat16)
    gradient = jax.grad(lambda x, w: jnp.sum(contract(x, w) ** 2), argnums=(0, 1))
    dx, dw = gradient(half, w)
    assert (dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)
    program = jax.jit(gradient).lower(half, w).as_text()
    products = re.findall(
        r"stablehlo.dot_general .* : \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\) -> tensor<[\dx]*x(\w+)>", program
    )
    assert products == [("bf16", "bf16", "f32")] * 3
    # A bf16 cotangent is 2^-9 off, relatively.
    exact = jax.grad(lambda x, w: jnp.sum((x @ w) ** 2), argnums=(0, 1))(half.astype(jnp.float32), w)
    np.testing.assert_allclose(dw, exact[1], atol=0.03 * np.abs(exact[1]).max())


@pytest.mark.parametrize("width", [2, 6], ids=["narrower", "wider"])
def test_contract_each_equals_separate_products(width):
    x, w = arrays((2, 5, 4), (3, 4, width))

    def loss(product):
        return lambda x, w: sum(jnp.sum(jnp.sin((i + 1) * part)) for i, part in enumerate(product(x, w)))

    ours, theirs = loss(contract_each), loss(lambda x, w: [jnp.einsum("bti,io->bto", x, part) for part in w])
    np.testing.assert_allclose(ours(x, w), theirs(x, w), atol=1e-5)
    for got, want in zip(jax.grad(ours, (0, 1))(x, w), jax.grad(theirs, (0, 1))(x, w), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_contract_each_in_bfloat16():
    """Compiled: outside jit a CPU does not support every bfloat16 product with f32 sums."""
    x, w = arrays((2, 30, 16), (3, 16, 8))
    half = x.astype(jnp.bfloat16)
    gradient = jax.jit(jax.grad(lambda x, w: sum(jnp.sum(part**2) for part in contract_each(x, w)), (0, 1)))
    dx, dw = gradient(half, w)
    assert (dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)
    want = jax.grad(lambda w: sum(jnp.sum(jnp.einsum("bti,io->bto", x, part) ** 2) for part in w))(w)
    np.testing.assert_allclose(dw, want, atol=0.03 * np.max(np.abs(want)))

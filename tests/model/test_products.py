"""Products and sums of products, in f32 whatever their operands."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.model.products import inner_products, sum_of_outer_products


def arrays(*shapes, dtype):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("inputs, outputs", [((3,), (5, 2)), ((5, 2), (3,)), ((4,), (4,))])
def test_outer_products_are_summed_in_f32_whichever_operand_is_transposed(inputs, outputs, dtype):
    x, g = arrays((2, 300, *inputs), (2, 300, *outputs), dtype=dtype)
    got = jax.jit(sum_of_outer_products, static_argnums=2)(x, g, 2)
    exact = np.tensordot(np.asarray(x, np.float64), np.asarray(g, np.float64), ((0, 1), (0, 1)))
    assert got.dtype == jnp.float32 and got.shape == (*inputs, *outputs)
    # Products of bf16 are exact in f32; sums of 600 of them are off by some 1e-5.
    np.testing.assert_allclose(got, exact, atol=1e-4)


def test_neither_operand_of_a_weight_gradient_has_its_rows_first():
    """Where they are first in both, a product in bfloat16 takes three times as long on a CPU."""
    x, g = arrays((64, 16), (64, 32), dtype="bfloat16")
    for operands in ((x, g), (g, x)):
        text = jax.jit(sum_of_outer_products, static_argnums=2).lower(*operands, 1).compile().as_text()
        (product,) = [line for line in text.splitlines() if " dot(" in line]
        assert "lhs_contracting_dims={1}, rhs_contracting_dims={0}" in product
        # The barrier is no part of the program, and what it hides is not folded into the product.
        assert "conditional(" in text and "opt-barrier" not in text


def test_inner_products_in_f32():
    a, b = arrays((3, 5, 700), (3, 5, 700), dtype="bfloat16")
    got = jax.jit(inner_products)(a, b)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, np.sum(np.asarray(a, np.float64) * np.asarray(b, np.float64), -1), atol=1e-3)

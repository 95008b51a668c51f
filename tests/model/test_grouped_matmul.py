"""The products of GPUs, block by block, against ragged products, on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.model import grouped_blocks, grouped_matmul

GROUPS, ROWS, INPUTS, OUTPUTS = 5, 90, 12, 7
COUNTS = {
    "mixed": [20, 0, 1, 33, 16],
    "empty at both ends": [0, 40, 0, 17, 0],
    "whole blocks": [16, 32, 8, 24, 0],
    "all rows in one group": [0, 0, 0, ROWS, 0],
    "every row": [50, 10, 10, 10, 10],
    "no row": [0] * GROUPS,
}


@pytest.fixture(params=["in place", "copies", "one copy at a time"])
def blocks(request, monkeypatch):
    """Blocks of 8 rows: one per group and round, some per round with a copy of their matrices, and one per round."""
    monkeypatch.setattr(grouped_blocks, "ROWS_IN_PLACE", 8)
    monkeypatch.setattr(grouped_blocks, "ROWS_PER_COPY", 8)
    if request.param != "in place":
        monkeypatch.setattr(grouped_blocks, "FEW_ROWS_PER_GROUP", 4)
        monkeypatch.setattr(grouped_blocks, "BYTES_PER_ROUND", 6000 if request.param == "copies" else 1)


def arrays(parts, dtype):
    """Rows, matrices of all parts, and cotangents."""
    rng = np.random.default_rng(0)
    shapes = [(ROWS, INPUTS), (parts * GROUPS, INPUTS, OUTPUTS), *[(ROWS, OUTPUTS)] * parts]
    x, matrices, *gs = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    return x, matrices, tuple(gs)


def check(got, want, counts, tolerance):
    """Equal to a ragged product, and to rounding of f32 sums to one made of dense ones."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_blocks_equal_ragged_products(blocks, counts, parts, dtype):
    """f32 sums of up to 90 terms in another order; of bf16 the gradient of rows is rounded to it, by one step of 2**-8 at most."""
    (x, matrices, gs), counts = arrays(parts, dtype), jnp.array(counts, jnp.int32)
    with jax.default_matmul_precision("highest"):
        got = jax.jit(grouped_blocks.contract)(x, matrices, counts)
        check(got, jax.jit(grouped_matmul._contract)(x, matrices, counts), counts, 1e-5)
        rest = int(counts.sum())
        assert all(not np.asarray(out[rest:]).any() for out in got)
        dx = jax.jit(grouped_blocks.to_rows)(gs, matrices, counts)
        tolerance = 1e-5 if dtype == "float32" else 2**-7
        check(dx, jax.jit(grouped_matmul._to_rows)(gs, matrices, counts), counts, tolerance)
        assert not np.asarray(dx[rest:]).any()
        dw = jax.jit(grouped_blocks.to_weights)(x, gs, counts)
        check(dw, jax.jit(grouped_matmul._to_weights)(x, gs, counts), counts, 2e-5)
        empty = np.flatnonzero(counts == 0)
        assert not np.asarray(dw[:, empty]).any()


@pytest.mark.parametrize("seed", range(8))
def test_gradients_of_random_counts_equal_a_loop_over_groups(blocks, seed, monkeypatch):
    """Through `contract_groups` with the products of GPUs, two parts, a number of rows that no block divides."""
    for name in ("contract", "to_rows", "to_weights"):
        monkeypatch.setattr(grouped_matmul, f"_{name}", getattr(grouped_blocks, name))
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(rng.integers(ROWS + 1), rng.dirichlet([0.3] * GROUPS)).astype(np.int32)
    x, matrices, _ = arrays(2, "float32")
    w = matrices.reshape(2, GROUPS, INPUTS, OUTPUTS)
    group = np.repeat(np.arange(GROUPS), counts)

    def loss(products, x, w):
        return sum(jnp.sum(jnp.sin(3 * out)) for out in products(x, w))

    def dense(x, w):
        return [jnp.einsum("mi,mio->mo", x[: len(group)], part[group], precision="highest") for part in w]

    def ours(x, w):
        return grouped_matmul.contract_groups(x, w, jnp.asarray(counts), None, 2)

    got, want = (jax.jit(jax.value_and_grad(lambda x, w, f=f: loss(f, x, w), (0, 1)))(x, w) for f in (ours, dense))
    check(got, want, counts, 2e-4)


def test_no_more_rounds_than_rows_need(blocks, monkeypatch):
    """The loop ends with the last block: the number of rounds, by a counter that it carries."""
    for counts, in_place in (([3, 9, 0, 8, 1], 2), ([0, 0, 0, 41, 0], 6), ([0] * GROUPS, 0)):
        got = grouped_blocks._rounds(lambda n, _: n + 1, jnp.zeros((), int), ROWS, jnp.array(counts), lambda s: 1)
        per_group = [-(-n // 8) for n in counts]
        at_a_time = min(grouped_blocks.BYTES_PER_ROUND, -(-ROWS // 8) + GROUPS)
        copies = -(-sum(per_group) // at_a_time)
        assert got == (in_place if grouped_blocks.FEW_ROWS_PER_GROUP > 4 else copies)

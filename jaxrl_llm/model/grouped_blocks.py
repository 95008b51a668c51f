"""The products of `grouped_matmul` on GPUs: a loop over blocks of rows, each block of one group.

XLA:GPU makes a ragged product a dense one, of every row with every group's matrix: its operand alone is groups x rows x inputs.
Here a round of the loop multiplies a batch of blocks with a batch of matrices, and rows per group decide how many rounds there are.

Dimensions: M rows, sorted by group; E groups; C blocks per round, S rows per block.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

# Up to this many rows per group, as in decode, a round has one block of every group: matrices are used where they lie. They take
# longer to read than to multiply, so that a few rounds with idle blocks cost less than copies of the matrices in use.
FEW_ROWS_PER_GROUP = 1024
# Rows of a block: the tile of a GPU's product where matrices are read where they lie; where each block has its own copy, more, for
# more products per copy. Half a block per group is empty on average.
ROWS_IN_PLACE, ROWS_PER_COPY = 128, 256
# Operands and results of one round: some tens of microseconds of memory traffic, several times what starting a round takes.
BYTES_PER_ROUND = 2**27

Carry = TypeVar("Carry")


def contract(
    x: Float[Array, "M I"], matrices: Float[Array, "groups I O"], counts: Int[Array, " E"]
) -> tuple[Float[Array, "M O"], ...]:
    """For each part of `matrices`: rows times their group's matrix, f32; rows after the last group give 0."""
    parts, (_, inputs, outputs) = len(matrices) // len(counts), matrices.shape

    def add(outs: tuple[Array, ...], blocks: Blocks) -> tuple[Array, ...]:
        products = _batched(blocks.read([x] * parts), blocks.matrices(matrices, parts), 2, 1)
        return tuple(blocks.write(out, p) for out, p in zip(outs, jnp.split(products, parts), strict=True))

    outs = (_zeros(x, counts, jnp.float32, (len(x), outputs)),) * parts
    return _rounds(
        add, outs, len(x), counts, lambda s: _bytes(parts, x.dtype, s * inputs + inputs * outputs, s * outputs)
    )


def to_rows(
    gs: tuple[Float[Array, "M O"], ...], matrices: Float[Array, "groups I O"], counts: Int[Array, " E"]
) -> Float[Array, "M I"]:
    """Gradient of the rows, summed over parts in f32 and rounded to the dtype of `gs`."""
    (_, inputs, outputs), parts, rows = matrices.shape, len(gs), len(gs[0])

    def add(dx: Array, blocks: Blocks) -> Array:
        products = _batched(blocks.read(gs), blocks.matrices(matrices, parts), 2, 2)
        return blocks.write(dx, sum(jnp.split(products, parts)).astype(dx.dtype))

    dx = _zeros(gs[0], counts, gs[0].dtype, (rows, inputs))
    return _rounds(add, dx, rows, counts, lambda s: _bytes(parts, dx.dtype, s * outputs + inputs * outputs, s * inputs))


def to_weights(
    x: Float[Array, "M I"], gs: tuple[Float[Array, "M O"], ...], counts: Int[Array, " E"]
) -> Float[Array, "parts E I O"]:
    """Gradient of the matrices of all parts, f32."""
    parts, inputs, outputs = len(gs), x.shape[1], gs[0].shape[1]

    def add(dw: Array, blocks: Blocks) -> Array:
        products = _batched(blocks.read([x] * parts), blocks.read(gs), 1, 1).reshape(parts, -1, inputs, outputs)
        return dw + blocks.sum_by_group(products)

    dw = _zeros(gs[0], counts, jnp.float32, (parts, len(counts), inputs, outputs))
    return _rounds(add, dw, len(x), counts, lambda s: _bytes(parts, x.dtype, s * (inputs + outputs), inputs * outputs))


class Blocks(NamedTuple):
    """The blocks of one round."""

    group: Int[Array, " C"] | None
    """None: one block of every group, in order."""
    groups: int
    row: Int[Array, "C S"]
    """A different number beyond the last row for each row that a block lacks."""

    def read(self, xs: list[Array] | tuple[Array, ...]) -> Float[Array, "parts*C S I"]:
        """These rows of each part; 0 where a block has none."""
        row, own = jnp.minimum(self.row, len(xs[0]) - 1), self.row[..., None] < len(xs[0])
        return jnp.concatenate([jnp.where(own, x.at[row].get(mode="promise_in_bounds"), 0) for x in xs])

    def write(self, x: Float[Array, "M I"], rows: Float[Array, "C S I"]) -> Float[Array, "M I"]:
        return x.at[self.row].set(rows, mode="drop", unique_indices=True)

    def matrices(self, matrices: Float[Array, "groups I O"], parts: int) -> Float[Array, "parts*C I O"]:
        """The matrix of each block, for each part."""
        if self.group is None:
            return matrices
        index = jnp.concatenate([self.group + part * self.groups for part in range(parts)])
        return matrices.at[index].get(mode="promise_in_bounds")

    def sum_by_group(self, x: Float[Array, "parts C I O"]) -> Float[Array, "parts E I O"]:
        """Sums in a fixed order, as products with 0 and 1 in full f32: a scatter would add in any order."""
        if self.group is None:
            return x
        own = (self.group == jnp.arange(self.groups)[:, None]).astype(x.dtype)
        own = jnp.broadcast_to(own, (len(x), *own.shape))
        return lax.dot_general(own, x, (((2,), (1,)), ((0,), (0,))), precision=lax.Precision.HIGHEST)


def _rounds(
    add: Callable[[Carry, Blocks], Carry], carry: Carry, rows: int, counts: Array, block_bytes: Callable[[int], int]
) -> Carry:
    """Add the blocks of each round to `carry`, until no group has rows left. `block_bytes`: of a block of so many rows."""
    groups, ends = len(counts), jnp.cumsum(counts)
    in_place = rows <= FEW_ROWS_PER_GROUP * groups
    size = ROWS_IN_PLACE if in_place else ROWS_PER_COPY
    needed = -(-counts // size)
    last = jnp.cumsum(needed)
    at_a_time = groups if in_place else min(max(1, BYTES_PER_ROUND // block_bytes(size)), -(-rows // size) + groups)

    def one(n: Array | int, carry: Carry) -> Carry:
        if in_place:
            group, start, end = None, ends - counts + n * size, ends
        else:
            block = n * at_a_time + jnp.arange(at_a_time)
            # Blocks after the last start after the last group's end.
            group = jnp.minimum(jnp.searchsorted(last, block, side="right", method="compare_all"), groups - 1)
            start, end = ends[group] - counts[group] + (block - last[group] + needed[group]) * size, ends[group]
        row = start[:, None] + jnp.arange(size)
        absent = rows + jnp.arange(row.size).reshape(row.shape)
        row = jnp.where(row < end[:, None], row, absent)
        # In memory: XLA:GPU would compute it again for every element that it reads or writes.
        return add(carry, Blocks(group, groups, lax.optimization_barrier(row)))

    if in_place and rows <= size:
        return one(0, carry)
    return lax.fori_loop(0, jnp.max(needed) if in_place else -(-last[-1] // at_a_time), one, carry)


def _batched(a: Array, b: Array, over_a: int, over_b: int) -> Array:
    return lax.dot_general(a, b, (((over_a,), (over_b,)), ((0,), (0,))), preferred_element_type=jnp.float32)


def _bytes(parts: int, dtype: jnp.dtype, operands: int, results: int) -> int:
    """Bytes of a block's operands and of its f32 results."""
    return parts * (operands * jnp.dtype(dtype).itemsize + results * 4)


def _zeros(after: Array, counts: Array, dtype: jnp.dtype, shape: tuple[int, ...]) -> Array:
    """Zeros that vary over the axes of the mesh as `after`, and that exist no earlier than it.

    XLA:GPU would make the zeros of every layer, which depend on nothing, at the start of the program, and hold them all.
    """
    zero = jnp.where(counts[0] < 0, after[0, 0], 0).astype(dtype)
    return jnp.broadcast_to(zero, shape)

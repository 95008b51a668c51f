"""Linear head and per-token functions of its logits, computed in tiles so that the full logits never exist at once.

A `LogitRule` defines the function and its cotangent; this module has the tiling, the matrix products and their sharding.
Forward: chunks of tokens against the whole vocabulary. Backward: blocks of the vocabulary against chunks of tokens, with logits
recomputed. A block's gradient is accumulated in f32 while it is small, and written once; with the loops the other way round the
gradient of the whole table, which is larger than all activations, would be read and written for every chunk.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.products import sum_of_outer_products
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.types import PyTree


class TileSize(NamedTuple):
    """Sizes of the tiles of logits."""

    logits: int
    """Maximum logits per device at a time."""
    tokens: int
    """Tokens per chunk in the backward pass."""
    backward: int = 0
    """Maximum logits in the backward pass; 0: as many."""


# On a CPU a tile fits into the caches: elementwise passes over larger tiles cost 5 to 8 times as much; matrix products do not.
CPU = TileSize(logits=2**20, tokens=512)
ACCELERATOR = TileSize(logits=2**24, tokens=2048)
# Its compiler holds logits in f32 beside their cotangents, where the TPU's holds bf16 cotangents alone.
GPU = TileSize(logits=2**24, tokens=2048, backward=2**23)
# Minimum tokens per chunk in the forward pass, because each chunk reads the whole table.
MIN_TOKENS = 128
# Vocabulary entries per block are a multiple of this, the width of a TPU tile.
BLOCK_MULTIPLE = 128


class VocabularyBlock(NamedTuple):
    """The tokens that some logits belong to."""

    ids: Int[Array, " W"]
    classes: Int[Array, "A W"] | None
    """Their classes in the control tables; None: nothing is controlled."""


class LogitRule(Protocol):
    """A function of logits, per token, with its cotangent. Hashable.

    x: logits of the policy; y: logits of the reference, or None; inputs: any arrays with one entry per token.
    """

    @property
    def needs_full_vocabulary(self) -> bool:
        """True if the cotangent cannot be computed for one block of the vocabulary at a time."""

    def value(
        self, x: Float[Array, "s n V"], y: Float[Array, "s n V"] | None, block: VocabularyBlock, inputs: PyTree
    ) -> PyTree:
        """Return a tree of numbers per token, f32[s n] each. `block`: the whole vocabulary."""

    def pullback(
        self,
        x: Float[Array, "s n W"],
        y: Float[Array, "s n W"] | None,
        block: VocabularyBlock,
        inputs: PyTree,
        value: PyTree,
        given: PyTree,
    ) -> Float[Array, "s n W"]:
        """Return the cotangent of the policy's logits of a block of the vocabulary.

        Args:
            x, y, inputs: as in `value`, for the tokens of the block.
            block: the block.
            value: the result of `value`.
            given: cotangents of `value`; None: zero.
        """


class HeadInputs(NamedTuple):
    """Activations and the table they are multiplied by. s: row shards; N: tokens per shard."""

    table: Float[Array, "V D"]
    h: Float[Array, "s N D"]


@dataclass(frozen=True)
class Head:
    """The linear head: compute dtype, soft cap and sharding."""

    compute: str
    softcap: float | None
    layout: Layout

    @staticmethod
    def of(cfg: ModelConfig, layout: Layout) -> "Head":
        return Head(cfg.compute, cfg.logit_softcap, layout)

    @property
    def tile(self) -> TileSize:
        return CPU if self.layout.on_cpu else GPU if self.layout.on_gpu else ACCELERATOR

    def gather(self, table: Float[Array, "V D"]) -> Float[Array, "s t W D"]:
        """Return one copy of the table per row shard, sharded over the t vocabulary shards only; gathered in the compute dtype.

        Otherwise the compiler gathers the weight and reduces its gradient over the mesh in every iteration of the loop. With its
        own copy, a row shard accumulates its gradient locally.
        """
        gathered = self.layout.constrain(table.astype(self.compute), "vocab", "embed")
        copies = jnp.broadcast_to(gathered, (self.layout.size("rows"), *table.shape))
        copies = self.layout.constrain(copies, "rows", "vocab", None)
        return self.constrain(copies.reshape(len(copies), self.layout.size("vocab"), -1, table.shape[1]))

    def reduce(self, x: Float[Array, "s t W D"], like: Float[Array, "V D"]) -> Float[Array, "V D"]:
        """Return the sum over row shards, in the shape and sharding of the table."""
        total = self.layout.constrain(jnp.sum(self.constrain(x), axis=0), "vocab", None, "embed")
        return self.layout.constrain(total.reshape(like.shape), "vocab", "embed").astype(like.dtype)

    def constrain(self, x: Float[Array, "s t W D"]) -> Float[Array, "s t W D"]:
        return self.layout.constrain(x, "rows", "vocab", None, None)

    def outer_products(self, h: Float[Array, "s n D"], dx: Float[Array, "s n t W"]) -> Float[Array, "s t D W"]:
        """Return the sums over tokens of h times dx, in f32; on GPUs [s t W D].

        Transposed is what CPUs multiply fast; XLA:GPU would transpose the whole gradient at the end, and hold it twice.
        """
        of_row = jax.vmap(partial(sum_of_outer_products, rows=1))
        return of_row(dx, h) if self.layout.on_gpu else of_row(h, dx).swapaxes(1, 2)

    def in_table_order(self, x: Float[Array, "s t D W"]) -> Float[Array, "s t W D"]:
        """Return what `outer_products` returned as rows of the table."""
        return x if self.layout.on_gpu else x.swapaxes(2, 3)

    def over_shards(self, dh: Float[Array, "s t n D"], dtype: jnp.dtype) -> Float[Array, "s n D"]:
        """Return the sum over vocabulary shards; they send `dtype`, see `products.rounded_dot`."""
        if self.layout.on_gpu:
            added = lax.reduce(dh.astype(dtype), np.zeros((), dtype), lax.add, (1,))
        else:
            added = jnp.sum(dh, axis=1)
        return self.layout.constrain(added, "rows", None, None).astype(dtype)

    def logits(self, h: Float[Array, "s n D"], w: Float[Array, "s t W D"]) -> Float[Array, "s n t*W"]:
        x = jnp.einsum("snd,stwd->sntw", h.astype(w.dtype), w, preferred_element_type=jnp.float32)
        x = self.layout.constrain(x, "rows", None, "vocab", None).reshape(*h.shape[:2], -1)
        return x if self.softcap is None else self.softcap * jnp.tanh(x / self.softcap)

    def block(self, ids: Int[Array, " W"], classes: Int[Array, "A V"] | None) -> VocabularyBlock:
        """Return the block of these tokens. `classes`: of the whole vocabulary."""
        of = None if classes is None else self.layout.constrain(jnp.take(classes, ids, axis=1), None, "vocab")
        return VocabularyBlock(ids, of)

    def uncapped(self, dx: Float[Array, "s n W"], x: Float[Array, "s n W"]) -> Float[Array, "s n W"]:
        """Return the cotangent of the logits before the soft cap; `x`: logits after it."""
        return dx if self.softcap is None else dx * (1 - (x / self.softcap) ** 2)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def over_logits(
    rule: LogitRule,
    head: Head,
    policy: HeadInputs,
    reference: HeadInputs | None,
    inputs: PyTree,
    count: Int[Array, " s"],
    classes: Int[Array, "A V"] | None = None,
) -> PyTree:
    """Return `rule.value` of the first `count[s]` tokens of each row shard, and 0 for the others.

    Cost depends on the largest count only. The gradient flows into `policy` only; its residuals contain no logits.

    Args:
        rule: the function of the logits.
        head: the linear head.
        policy: table and activations of the policy.
        reference: table and activations of the reference, if the rule uses it.
        inputs: passed to the rule, one entry per token.
        count: tokens to compute per row shard.
        classes: of all tokens in the control tables, if the rule uses them.
    """
    h, w = (policy.h, reference and reference.h), _gathered(head, policy, reference)
    return _values(rule, head, h, w, (inputs, count, classes))


def _gathered(head: Head, policy: HeadInputs, reference: HeadInputs | None) -> tuple[Array, Array | None]:
    return head.gather(policy.table), None if reference is None else head.gather(reference.table)


def _values(
    rule: LogitRule,
    head: Head,
    h: tuple[Array, Array | None],
    w: tuple[Array, Array | None],
    given: tuple[PyTree, Array, Array | None],
) -> PyTree:
    """Return the values of all tokens. `given`: inputs, counts and classes."""
    (inputs, count, classes), tokens, width = given, h[0].shape[1], w[0].shape[2]
    size, block = _chunk(head.tile, width, tokens), head.block(jnp.arange(w[0].shape[1] * width), classes)

    def chunk(start: Array) -> PyTree:
        activations, chunk_inputs = _slice((h, inputs), start, size)
        x, y = (None if b is None else head.logits(a, b) for a, b in zip(activations, w, strict=True))
        return rule.value(x, y, block, chunk_inputs)

    def body(i: Array, out: PyTree) -> PyTree:
        start = jnp.minimum(i * size, tokens - size)
        inside = start + jnp.arange(size) < count[:, None]
        write = lambda o, x: lax.dynamic_update_slice_in_dim(o, jnp.where(inside, x, 0.0), start, axis=1)  # noqa: E731
        return jax.tree.map(write, out, chunk(start))

    shapes = jax.eval_shape(chunk, jnp.zeros((), jnp.int32))
    return lax.fori_loop(
        0, _num_chunks(count, size), body, jax.tree.map(lambda x: jnp.zeros(h[0].shape[:2], x.dtype), shapes)
    )


def _forward(rule: LogitRule, head: Head, *primals: PyTree) -> tuple[PyTree, tuple]:
    policy, reference, *given = jax.tree.map(lambda p: p.value, primals)
    h, w = (policy.h, reference and reference.h), _gathered(head, policy, reference)
    values = _values(rule, head, h, w, tuple(given))
    return values, (policy.table, h, w, given, values)


def _backward(rule: LogitRule, head: Head, saved: tuple, given: PyTree) -> tuple:
    table, h, w, (inputs, count, classes), values = saved
    given = jax.tree.map(lambda g: None if isinstance(g, SymbolicZero) else g, given)
    tokens, (_, shards, width, depth) = h[0].shape[1], w[0].shape
    size, block = _blocks(head.tile, rule, width, tokens)
    columns = jnp.arange(block)

    def tile(start: Array, first: Array, is_new: Array, of_block: tuple) -> tuple[Array, Array]:
        """Return cotangents of a chunk's activations, per vocabulary shard, and of a block of the table, in f32."""
        activations, chunk_inputs, of_values, of_given = _slice((h, inputs, values, given), start, size)
        x, y = (None if b is None else head.logits(a, b) for a, b in zip(activations, of_block, strict=True))
        ids = (jnp.arange(shards)[:, None] * width + first + columns).reshape(-1)
        dx = head.uncapped(rule.pullback(x, y, head.block(ids, classes), chunk_inputs, of_values, of_given), x)
        dx = jnp.where(is_new, dx.reshape(*dx.shape[:2], shards, block), 0.0).astype(w[0].dtype)
        dh = jnp.einsum("sntw,stwd->stnd", dx, of_block[0], preferred_element_type=jnp.float32)
        return dh, head.outer_products(activations[0].astype(dx.dtype), dx)

    def over_block(j: Array, total: tuple[Array, Array]) -> tuple[Array, Array]:
        first = jnp.minimum(j * block, width - block)
        of_block = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, first, block, axis=2), w)

        def over_chunk(i: Array, total: tuple[Array, Array]) -> tuple[Array, Array]:
            start = jnp.minimum(i * size, tokens - size)
            at = start + jnp.arange(size)
            # The last chunk and the last block start early, to be as large as the others; overlaps count once.
            is_new = ((at >= i * size) & (at < count[:, None]))[..., None, None] & (first + columns >= j * block)
            dh, dw = tile(start, first, is_new, of_block)
            return _add(total[0], dh, start, 2), total[1] + dw

        edges = (block, depth) if head.layout.on_gpu else (depth, block)
        zeros = head.constrain(jnp.zeros((len(count), shards, *edges), jnp.float32))
        dh, dw = lax.fori_loop(0, _num_chunks(count, size), over_chunk, (total[0], zeros))
        return dh, _add(total[1], head.in_table_order(dw), first, 2)

    zeros = tuple(head.constrain(jnp.zeros((len(count), shards, n, depth), jnp.float32)) for n in (tokens, width))
    dh, dw = lax.fori_loop(0, -(-width // block), over_block, zeros)
    return HeadInputs(head.reduce(dw, table), head.over_shards(dh, h[0].dtype)), None, None, None, None


over_logits.defvjp(_forward, _backward, symbolic_zeros=True)


def _chunk(tile: TileSize, width: int, tokens: int) -> int:
    """Return the tokens per forward chunk, so that logits over `width` vocabulary entries fill a tile."""
    return min(tokens, max(tile.logits // width // 8 * 8, MIN_TOKENS))


def _blocks(tile: TileSize, rule: LogitRule, width: int, tokens: int) -> tuple[int, int]:
    """Return tokens per chunk and vocabulary entries per block and shard, in the backward pass."""
    if rule.needs_full_vocabulary:
        return _chunk(tile, width, tokens), width
    size = min(tile.tokens, tokens)
    return size, min(
        width, max((tile.backward or tile.logits) // size // BLOCK_MULTIPLE * BLOCK_MULTIPLE, BLOCK_MULTIPLE)
    )


def _num_chunks(count: Int[Array, " s"], size: int) -> Int[Array, ""]:
    return (jnp.max(count) + size - 1) // size


def _slice(tree: PyTree, start: Array, size: int) -> PyTree:
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size, axis=1), tree)


def _add(total: Array, part: Array, start: Array, axis: int) -> Array:
    part = part + lax.dynamic_slice_in_dim(total, start, part.shape[axis], axis)
    return lax.dynamic_update_slice_in_dim(total, part, start, axis)

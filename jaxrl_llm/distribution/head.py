"""Head in tiles: from activations and the head matrix to a few numbers per token, without ever holding all logits.

A `LogitRule` defines what is computed from logits, and their cotangent; this file has the tiles, the products and their shardings.
Forward: a chunk of tokens against the whole vocabulary. Backward: a block of the vocabulary against chunks of tokens, with logits
recomputed. So the gradient of a block is accumulated in f32 while it is small, and written once; in chunks of tokens the gradient
of the whole matrix, which is larger than all activations, would be read and written for every chunk.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.types import PyTree


class Tile(NamedTuple):
    logits: int
    """Logits that a device holds at a time."""
    tokens: int
    """Tokens of a chunk in the backward pass."""


# On a CPU a tile fits into the caches: passes over larger ones cost 5 to 8 times as much, while products do not slow down.
CPU = Tile(logits=2**20, tokens=512)
ACCELERATOR = Tile(logits=2**24, tokens=2048)
# Least tokens per chunk in the forward pass, as each chunk reads the whole matrix.
FEWEST = 128
# A block of the vocabulary is a multiple of it: the width of a TPU's tiles.
LANES = 128


class LogitRule(Protocol):
    """What is computed from logits; hashable. x: the policy's logits, y: the reference's or None, `read`: per-token inputs."""

    @property
    def needs_all_logits(self) -> bool:
        """True if the cotangent of a part of the vocabulary depends on the other parts."""

    def value(self, x: Float[Array, "s n V"], y: Float[Array, "s n V"] | None, read: PyTree) -> PyTree:
        """Numbers per token, each f32[s n]."""

    def pullback(
        self,
        x: Float[Array, "s n W"],
        y: Float[Array, "s n W"] | None,
        ids: Int[Array, " W"],
        read: PyTree,
        value: PyTree,
        given: PyTree,
    ) -> Float[Array, "s n W"]:
        """Cotangent of the policy's logits of the tokens `ids`, from the cotangents `given` (None: zero) of `value`."""


class HeadInputs(NamedTuple):
    """Activations and the matrix they are multiplied by. s: row shards, N: tokens per shard."""

    table: Float[Array, "V D"]
    h: Float[Array, "s N D"]


@dataclass(frozen=True)
class Head:
    """Computation of logits."""

    compute: str
    softcap: float | None
    layout: Layout

    @staticmethod
    def of(cfg: ModelConfig, layout: Layout) -> "Head":
        return Head(cfg.compute, cfg.logit_softcap, layout)

    @property
    def tile(self) -> Tile:
        return CPU if self.layout.on_cpu else ACCELERATOR

    def gather(self, table: Float[Array, "V D"]) -> Float[Array, "s t W D"]:
        """A copy per row shard, split over the t vocabulary shards only; moved in the compute dtype.

        Otherwise the compiler gathers the matrix and reduces its gradient over the mesh in every iteration of the loop. With a copy
        each row shard accumulates its gradient locally.
        """
        moved = self.layout.constrain(table.astype(self.compute), "vocab", "embed")
        copies = jnp.broadcast_to(moved, (self.layout.size("rows"), *table.shape))
        copies = self.layout.constrain(copies, "rows", "vocab", None)
        return self.place(copies.reshape(len(copies), self.layout.size("vocab"), -1, table.shape[1]))

    def reduce(self, x: Float[Array, "s t W D"], like: Float[Array, "V D"]) -> Float[Array, "V D"]:
        """Sum over the row shards, in the sharding of the matrix."""
        total = self.layout.constrain(jnp.sum(self.place(x), axis=0), "vocab", None, "embed")
        return self.layout.constrain(total.reshape(like.shape), "vocab", "embed").astype(like.dtype)

    def place(self, x: Float[Array, "s t W D"]) -> Float[Array, "s t W D"]:
        return self.layout.constrain(x, "rows", "vocab", None, None)

    def logits(self, h: Float[Array, "s n D"], w: Float[Array, "s t W D"]) -> Float[Array, "s n t*W"]:
        x = jnp.einsum("snd,stwd->sntw", h.astype(w.dtype), w, preferred_element_type=jnp.float32)
        x = self.layout.constrain(x, "rows", None, "vocab", None).reshape(*h.shape[:2], -1)
        return x if self.softcap is None else self.softcap * jnp.tanh(x / self.softcap)

    def uncapped(self, dx: Float[Array, "s n W"], x: Float[Array, "s n W"]) -> Float[Array, "s n W"]:
        """Cotangent before the soft cap; `x` are the logits after it."""
        return dx if self.softcap is None else dx * (1 - (x / self.softcap) ** 2)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def over_logits(
    rule: LogitRule, head: Head, policy: HeadInputs, reference: HeadInputs | None, read: PyTree, count: Int[Array, " s"]
) -> PyTree:
    """`rule.value` of the first `count[s]` tokens of each shard, 0 behind them; what is behind the largest count costs nothing.

    The gradient flows into `policy` alone. It saves what it returns and the gathered tables: no logits.
    """
    return _values(rule, head, (policy.h, reference and reference.h), _gathered(head, policy, reference), read, count)


def _gathered(head: Head, policy: HeadInputs, reference: HeadInputs | None) -> tuple[Array, Array | None]:
    return head.gather(policy.table), None if reference is None else head.gather(reference.table)


def _values(
    rule: LogitRule,
    head: Head,
    h: tuple[Array, Array | None],
    w: tuple[Array, Array | None],
    read: PyTree,
    count: Array,
) -> PyTree:
    tokens, width = h[0].shape[1], w[0].shape[2]
    size = _chunk(head.tile, width, tokens)

    def chunk(start: Array) -> PyTree:
        part, of = _slice((h, read), start, size)
        x, y = (None if b is None else head.logits(a, b) for a, b in zip(part, w, strict=True))
        return rule.value(x, y, of)

    def turn(i: Array, out: PyTree) -> PyTree:
        start = jnp.minimum(i * size, tokens - size)
        inside = start + jnp.arange(size) < count[:, None]
        write = lambda o, x: lax.dynamic_update_slice_in_dim(o, jnp.where(inside, x, 0.0), start, axis=1)  # noqa: E731
        return jax.tree.map(write, out, chunk(start))

    shapes = jax.eval_shape(chunk, jnp.zeros((), jnp.int32))
    return lax.fori_loop(
        0, _iterations(count, size), turn, jax.tree.map(lambda x: jnp.zeros(h[0].shape[:2], x.dtype), shapes)
    )


def _forward(rule: LogitRule, head: Head, *primals: PyTree) -> tuple[PyTree, tuple]:
    policy, reference, read, count = jax.tree.map(lambda p: p.value, primals)
    h, w = (policy.h, reference and reference.h), _gathered(head, policy, reference)
    values = _values(rule, head, h, w, read, count)
    return values, (policy.table, h, w, read, count, values)


def _backward(rule: LogitRule, head: Head, saved: tuple, given: PyTree) -> tuple:
    table, h, w, read, count, values = saved
    given = jax.tree.map(lambda g: None if isinstance(g, SymbolicZero) else g, given)
    tokens, (_, shards, width, depth) = h[0].shape[1], w[0].shape
    size, block = _blocks(head.tile, rule, width, tokens)
    lanes = jnp.arange(block)

    def tile(start: Array, first: Array, fresh: Array, of_block: tuple) -> tuple[Array, Array]:
        """Cotangents of a chunk's activations, from each shard of the vocabulary, and of a block of the table, transposed;
        f32. A CPU would transpose `dx` for the other order."""
        part, of, of_values, of_given = _slice((h, read, values, given), start, size)
        x, y = (None if b is None else head.logits(a, b) for a, b in zip(part, of_block, strict=True))
        ids = (jnp.arange(shards)[:, None] * width + first + lanes).reshape(-1)
        dx = head.uncapped(rule.pullback(x, y, ids, of, of_values, of_given), x)
        dx = jnp.where(fresh, dx.reshape(*dx.shape[:2], shards, block), 0.0).astype(w[0].dtype)
        sums = partial(jnp.einsum, preferred_element_type=jnp.float32)
        return sums("sntw,stwd->stnd", dx, of_block[0]), sums("snd,sntw->stdw", part[0].astype(dx.dtype), dx)

    def over_block(j: Array, total: tuple[Array, Array]) -> tuple[Array, Array]:
        first = jnp.minimum(j * block, width - block)
        of_block = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, first, block, axis=2), w)

        def over_chunk(i: Array, total: tuple[Array, Array]) -> tuple[Array, Array]:
            start = jnp.minimum(i * size, tokens - size)
            at = start + jnp.arange(size)
            # The last chunk and the last block begin early, so that they are as large as the others.
            once = ((at >= i * size) & (at < count[:, None]))[..., None, None] & (first + lanes >= j * block)
            dh, dw = tile(start, first, once, of_block)
            return _add(total[0], dh, start, 2), total[1] + dw

        nothing = head.place(jnp.zeros((len(count), shards, depth, block), jnp.float32))
        dh, dw = lax.fori_loop(0, _iterations(count, size), over_chunk, (total[0], nothing))
        return dh, _add(total[1], dw.swapaxes(2, 3), first, 2)

    nothing = tuple(head.place(jnp.zeros((len(count), shards, n, depth), jnp.float32)) for n in (tokens, width))
    dh, dw = lax.fori_loop(0, -(-width // block), over_block, nothing)
    dh = head.layout.constrain(jnp.sum(dh, axis=1), "rows", None, None)
    return HeadInputs(head.reduce(dw, table), dh.astype(h[0].dtype)), None, None, None


over_logits.defvjp(_forward, _backward, symbolic_zeros=True)


def _chunk(tile: Tile, width: int, tokens: int) -> int:
    """Number of tokens whose logits over `width` entries of the vocabulary fill a tile."""
    return min(tokens, max(tile.logits // width // 8 * 8, FEWEST))


def _blocks(tile: Tile, rule: LogitRule, width: int, tokens: int) -> tuple[int, int]:
    """Tokens per chunk and vocabulary entries per block and shard, in the backward pass."""
    if rule.needs_all_logits:
        return _chunk(tile, width, tokens), width
    size = min(tile.tokens, tokens)
    return size, min(width, max(tile.logits // size // LANES * LANES, LANES))


def _iterations(count: Int[Array, " s"], size: int) -> Int[Array, ""]:
    return (jnp.max(count) + size - 1) // size


def _slice(tree: PyTree, start: Array, size: int) -> PyTree:
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size, axis=1), tree)


def _add(total: Array, part: Array, start: Array, axis: int) -> Array:
    part = part + lax.dynamic_slice_in_dim(total, start, part.shape[axis], axis)
    return lax.dynamic_update_slice_in_dim(total, part, start, axis)

"""Groups in as many bytes as they have: no padding, and of each token as many kept tokens as were kept.

A packed group is one array of bytes: a header of four int32 (rows, prompt tokens, completion tokens, kept tokens), then the arrays
of `Groups`, those of the largest numbers first. Which arrays there are is the same for all groups of a run.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int, UInt8

from jaxrl_llm.types import COLUMNS, FILLER, PER_PROMPT, Groups, number_rows

Packed = UInt8[np.ndarray, " n"]
HEADER = np.int32
TOKEN_COLUMNS = {column.name for column in COLUMNS if column.rollouts} | {"step_reward", "taught"}
WIDTH = 16
"""Kept tokens that are handled at once: most tokens have fewer, and one line of a processor's cache holds them."""
INSIDE = np.arange(WIDTH) < np.arange(WIDTH + 1)[:, None]
"""Places of the first n of them, for each n."""


class Size(NamedTuple):
    """Numbers of one group."""

    rows: int
    prompt_tokens: int
    tokens: int
    """Completion tokens of all its rows."""
    kept: int
    """Kept tokens of all of these."""


class Field(NamedTuple):
    """One array of packed groups."""

    name: str
    per: str
    """Field of `Size` that says how many entries a group has; "" for one."""
    dtype: np.dtype
    dims: tuple[int, ...]
    """Dimensions of an entry."""
    fill: float = 0
    """Value in slots without a token."""

    def entries(self, size: Size) -> int:
        return getattr(size, self.per) if self.per else 1

    def num_bytes(self, size: Size) -> int:
        n = self.entries(size)
        return -(-n // 8) if self.is_bits else n * int(np.prod(self.dims, dtype=int)) * self.dtype.itemsize

    @property
    def is_bits(self) -> bool:
        """True for truths of tokens."""
        return self.dtype == bool and self.per == "tokens"


class Packing:
    """Packs the groups of a run, and unpacks them."""

    def __init__(self, like: Groups, pad: int):
        """
        Args:
            like: groups with the columns, slots and kept tokens of the run, NumPy.
            pad: the pad token.
        """
        leaves, self.structure = jax.tree_util.tree_flatten_with_path(like)
        fields = [_field([getattr(key, "name", "") for key in path], x, pad) for path, x in leaves]
        self.names = [field.name for field in fields]
        # Which prompt a row has follows from the sizes.
        fields = [field for field in fields if field.name != "rollouts.prompt"]
        kept = like.rollouts.kept_tokens
        if kept is not None:
            counts = np.min_scalar_type(kept.shape[-1])
            fields.append(Field("kept_counts", "tokens", counts, ()))
        self.fields = sorted(fields, key=lambda field: (-field.dtype.itemsize, field.is_bits))

    def pack(self, groups: Groups) -> list[Packed]:
        """Return each group, packed. Filler rows belong to none."""
        rollouts, rows = groups.rollouts, groups.rollouts.size
        own, prompt_length = np.flatnonzero(rollouts.prompt >= 0), rollouts.prompts.length
        length = rollouts.length[own]
        arrays, found = dict(zip(self.names, jax.tree.leaves(groups), strict=True)), {}
        for field in self.fields:
            x = arrays.get(field.name)
            if field.per == "prompt_tokens":
                found[field.name] = _flat(x, np.arange(len(rows)), prompt_length)
            elif field.per == "tokens" and x is not None:
                found[field.name] = _flat(x, own, length)
            elif field.per == "rows":
                found[field.name] = x[own]
            elif field.per == "":
                found[field.name] = x
        tokens, kept = _sums(length, rows), np.zeros_like(rows)
        blobs = {}
        if rollouts.kept_tokens is not None:
            counts, blobs["rollouts.kept_tokens"] = _pack_kept(rollouts.kept_tokens, own, length, tokens)
            found["kept_counts"], kept = counts, _sums(counts, tokens)
        sizes = [Size(*n) for n in np.stack([rows, prompt_length, tokens, kept], axis=1).tolist()]
        return self._joined(found, blobs, sizes)

    def _joined(
        self, found: dict[str, np.ndarray], each: dict[str, list[np.ndarray]], sizes: Sequence[Size]
    ) -> list[Packed]:
        """Return the bytes of each group. `found`: arrays over all groups; `each`: arrays of each group."""
        at, packed = dict.fromkeys(found, 0), []
        for p, size in enumerate(sizes):
            parts = [np.array(size, HEADER).view(np.uint8)]
            for field in self.fields:
                if field.name in each:
                    part = each[field.name][p]
                else:
                    start = at[field.name]
                    at[field.name] = start + field.entries(size)
                    part = found[field.name][start : at[field.name]]
                part = np.ascontiguousarray(part, field.dtype)
                parts.append(np.packbits(part) if field.is_bits else part.reshape(-1).view(np.uint8))
            packed.append(np.concatenate(parts))
        return packed

    def unpack(self, packed: Sequence[Packed]) -> Groups:
        """Return the groups, in this order, with as many slots and kept tokens as the longest of them needs."""
        sizes = [Size(*blob[: 4 * HEADER().itemsize].view(HEADER).tolist()) for blob in packed]
        of: dict[str, list[np.ndarray]] = {field.name: [] for field in self.fields}
        for blob, size in zip(packed, sizes, strict=True):
            end = 4 * HEADER().itemsize
            for field in self.fields:
                start, end = end, end + field.num_bytes(size)
                of[field.name].append(_read(blob[start:end], field, size))
        prompt, _ = number_rows(np.array([size.rows for size in sizes]))
        length, prompt_length = (np.concatenate(of[name]) for name in ("rollouts.length", "rollouts.prompts.length"))
        leaves, fields = [], {field.name: field for field in self.fields}
        for name in self.names:
            if name == "rollouts.prompt":
                leaves.append(prompt)
                continue
            field, parts = fields[name], of[name]
            if field.per == "kept":
                leaves.append(_unpack_kept(parts, of["kept_counts"], length, field))
            elif field.per in ("tokens", "prompt_tokens"):
                leaves.append(_padded(parts, length if field.per == "tokens" else prompt_length, field))
            else:
                leaves.append(np.concatenate(parts))
        return jax.tree.unflatten(self.structure, leaves)


def _field(path: Sequence[str], x: np.ndarray, pad: int) -> Field:
    name, last = ".".join(path), path[-1]
    fill = pad if last == "tokens" else FILLER.get(last, 0)
    if last == "tokens" and "prompts" in path:
        return Field(name, "prompt_tokens", x.dtype, (), fill)
    if last in TOKEN_COLUMNS:
        return Field(name, "kept" if last == "kept_tokens" else "tokens", x.dtype, (), fill)
    return Field(name, "" if {*path} & PER_PROMPT else "rows", x.dtype, x.shape[1:])


def _flat(x: np.ndarray, index: Int[np.ndarray, " n"], length: Int[np.ndarray, " n"]) -> np.ndarray:
    """Return the first `length` entries of these rows, one behind the other."""
    none = x[:0].reshape(0, *x.shape[2:])
    return np.concatenate([none, *(x[i, :n] for i, n in zip(index.tolist(), length.tolist(), strict=True))])


def _padded(parts: Sequence[np.ndarray], length: Int[np.ndarray, " n"], field: Field) -> np.ndarray:
    """Return rows of these lengths, which `parts` have one behind the other, filled up."""
    shape = (len(length), length.max(initial=0))
    # Zeros cost nothing until they are written to.
    out = np.full(shape, field.fill, field.dtype) if field.fill else np.zeros(shape, field.dtype)
    out[np.arange(shape[1]) < length[:, None]] = np.concatenate(parts)
    return out


def _sums(x: np.ndarray, size: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Return the sums of neighboring parts of x of these sizes."""
    total, end = np.concatenate([[0], np.cumsum(x, dtype=np.int64)]), np.cumsum(size)
    return total[end] - total[end - size]


def _read(part: Packed, field: Field, size: Size) -> np.ndarray:
    if field.is_bits:
        return np.unpackbits(part, count=size.tokens).view(bool)
    return part.view(field.dtype).reshape(field.entries(size), *field.dims)


def _pack_kept(
    kept: Int[np.ndarray, "B C K"],
    rows: Int[np.ndarray, " n"],
    length: Int[np.ndarray, " n"],
    tokens: Int[np.ndarray, " P"],
) -> tuple[Int[np.ndarray, " t"], list[np.ndarray]]:
    """Return the number of kept tokens of each token, and the kept tokens of each group: the first WIDTH of all its tokens, then
    the next WIDTH of those that have more, and so on.

    Args:
        kept: those of a token come first, and -1 behind them.
        rows: of the groups, in their order.
        length: tokens of each row.
        tokens: of each group.
    """
    slots, most = kept.shape[1:]
    at = np.concatenate([rows[:0], *(row * slots + np.arange(n) for row, n in zip(rows, length, strict=True))])
    group, counts, chunks = np.repeat(np.arange(len(tokens)), tokens), np.zeros(len(at), np.int64), []
    alive = np.arange(len(at))
    for start in range(0, most, WIDTH):
        if not start:
            x = _flat(kept[..., :WIDTH], rows, length)
        elif most % WIDTH:
            x = kept.reshape(-1, most)[at[alive], start : start + WIDTH]
        else:
            # Whole lines of a processor's cache: four times as fast.
            x = kept.reshape(-1, WIDTH).take((at[alive] * most + start) // WIDTH, axis=0)
        there = x >= 0
        # A sum of bytes; of truths it takes ten times as long.
        more = there.view(np.uint8) @ np.ones(there.shape[1], np.uint8)
        counts[alive] += more
        chunks.append(np.split(x[there], _sums(more, np.bincount(group[alive], minlength=len(tokens))).cumsum()[:-1]))
        alive = alive[more == WIDTH]
        if not len(alive):
            break
    return counts, [np.concatenate(parts) for parts in zip(*chunks, strict=True)]


def _unpack_kept(
    parts: Sequence[np.ndarray], counts: Sequence[np.ndarray], length: Int[np.ndarray, " n"], field: Field
) -> Int[np.ndarray, "n C K"]:
    """The inverse of `_pack_kept`.

    Args:
        parts: kept tokens of each group.
        counts: of each group, kept tokens of each token.
        length: tokens of each row.
        field: of the kept tokens.
    """
    flat, tokens = np.concatenate(counts).astype(np.int64), np.array([len(c) for c in counts])
    slots, most = length.max(initial=0), flat.max(initial=0)
    out = np.full((len(length) * slots, most), field.fill, field.dtype)
    at, read = np.flatnonzero(np.arange(slots) < length[:, None]), np.zeros(len(parts), int)
    alive, group = np.arange(len(flat)), np.repeat(np.arange(len(parts)), tokens)
    for start in range(0, most, WIDTH):
        here = np.minimum(flat[alive] - start, WIDTH)
        ends = read + _sums(here, np.bincount(group[alive], minlength=len(parts)))
        chunk = np.concatenate([part[a:b] for part, a, b in zip(parts, read, ends, strict=True)])
        block = np.full((len(alive), min(WIDTH, most - start)), field.fill, field.dtype)
        block[INSIDE[:, : block.shape[1]].take(here, axis=0)] = chunk
        out[at[alive], start : start + WIDTH] = block
        read, alive = ends, alive[flat[alive] > start + WIDTH]
    return out.reshape(len(length), slots, most)

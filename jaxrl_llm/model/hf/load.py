"""Loading of a model directory onto a mesh: each host reads only its devices' blocks, never a whole model or leaf."""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from jaxrl_llm.model.hf.checkpoint import StoredTensor, find_leaves
from jaxrl_llm.model.hf.names import Leaf, Piece
from jaxrl_llm.model.params import ParamSpec, is_spec
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.types import PyTree

Box = tuple[slice, ...]

# Maximum bytes of a block on the host, per thread of WORKERS; a larger block goes to its device a few layers at a time.
CHUNK_BYTES = 2**27
WORKERS = min(4, os.cpu_count() or 1)
# Bytes read through one opened file before it is reopened: pages read from a mapped file count as memory in use.
MAX_MAPPED_BYTES = 2**26


def load(directory: str | Path, specs: PyTree, layout: Layout, dtype: jnp.dtype) -> PyTree:
    """Return a directory's parameters on the mesh. The whole index is checked before any data is read.

    Args:
        directory: a Hugging Face model directory.
        specs: the parameters' specs, layers stacked or one entry per layer.
        layout: mesh and shardings.
        dtype: dtype that the parameters are cast to.

    Raises:
        UserError: the files do not fit `specs`; see `checkpoint.find_leaves`.
    """
    found, stored = find_leaves(Path(directory), specs)
    dtype = np.dtype(dtype)
    jobs = [(leaf, box, devices) for leaf in found for box, devices in _holders(leaf, layout)]
    with ThreadPoolExecutor(WORKERS) as pool:
        placed = list(pool.map(lambda job: _place(job[0], stored, job[1], job[2], dtype), jobs))
    pieces: dict[tuple[str | int, ...], list[jax.Array]] = {leaf.path: [] for leaf in found}
    for (leaf, _, _), arrays in zip(jobs, placed, strict=True):
        pieces[leaf.path] += arrays

    def join(path: tuple, spec: ParamSpec) -> jax.Array:
        return jax.make_array_from_single_device_arrays(spec.shape, layout.sharding(spec.axes), pieces[_plain(path)])

    return jax.tree_util.tree_map_with_path(join, specs, is_leaf=is_spec)


def _plain(path: tuple) -> tuple[str | int, ...]:
    return tuple(key.key if hasattr(key, "key") else key.idx for key in path)


def _holders(leaf: Leaf, layout: Layout) -> Iterator[tuple[Box, list[jax.Device]]]:
    """Yield each distinct block held by this host's devices, with the devices that hold it."""
    shape, found = leaf.spec.shape, {}
    for device, index in layout.sharding(leaf.spec.axes).addressable_devices_indices_map(shape).items():
        box = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        found.setdefault(box, []).append(device)
    for box, devices in found.items():
        yield tuple(slice(*ends) for ends in box), devices


def _place(
    leaf: Leaf, stored: Mapping[str, StoredTensor], box: Box, devices: list[jax.Device], dtype: np.dtype
) -> list[jax.Array]:
    """Put the leaf's block `box` on each of `devices`."""
    runs = list(_runs(leaf, box, dtype))
    if len(runs) == 1:
        numbers = _read(leaf, stored, box, dtype)
        return [jax.block_until_ready(jax.device_put(numbers, device)) for device in devices]
    shape = tuple(s.stop - s.start for s in box)
    whole = [jax.device_put(jnp.zeros(shape, dtype, device=device)) for device in devices]
    for run in runs:
        numbers = _read(leaf, stored, run, dtype)
        for i, device in enumerate(devices):
            part = jax.device_put(numbers, device)
            whole[i] = jax.block_until_ready(_writer()(whole[i], part, run[0].start - box[0].start))
    return whole


def _runs(leaf: Leaf, box: Box, dtype: np.dtype) -> Iterator[Box]:
    """Split `box` along its first axis into blocks of at most `CHUNK_BYTES`, or of one entry if that is larger."""
    row = math.prod(s.stop - s.start for s in box[1:]) * dtype.itemsize
    step = max(CHUNK_BYTES // max(row, 1), 1)
    for start in range(box[0].start, box[0].stop, step):
        yield (slice(start, min(start + step, box[0].stop)), *box[1:])


@cache
def _writer() -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    """Return a compiled function that writes rows of one array into another in place, both on one device."""
    return jax.jit(partial(jax.lax.dynamic_update_slice_in_dim, axis=0), donate_argnums=0)


def _read(leaf: Leaf, stored: Mapping[str, StoredTensor], box: Box, dtype: np.dtype) -> np.ndarray:
    """Return the leaf's block `box`, assembled from slices of its tensors."""
    out = np.empty(tuple(s.stop - s.start for s in box), dtype)
    wanted = [
        (stored[piece.tensor], piece, cut) for piece in leaf.pieces if (cut := _cut(leaf, piece, box)) is not None
    ]
    for file, group in _by_file(wanted):
        with safe_open(file, framework="numpy") as handle:
            for piece, (source, inner, target) in group:
                numbers = handle.get_slice(piece.tensor)[source]
                _copy(out[target], _transpose(leaf, piece, numbers, inner))
    return out


class _Cut(NamedTuple):
    """Intersection of a piece with a block of its leaf."""

    source: Box
    """Slices of the tensor: in a product of dimensions all but the first are read in full."""
    inner: dict[str, slice]
    """Wanted slices of the dimensions that are read in full."""
    target: tuple[int | slice, ...]
    """Indices into the block."""


def _cut(leaf: Leaf, piece: Piece, box: Box) -> _Cut | None:
    """Return the intersection; None if it is empty."""
    wanted, target = {}, []
    for letter, cut in zip(leaf.dims, box, strict=True):
        at = piece.at.get(letter, range(leaf.size(letter)))
        span = range(at, at + 1) if isinstance(at, int) else at
        low, high = max(cut.start, span.start), min(cut.stop, span.stop)
        if low >= high:
            return None
        wanted[letter] = slice(low - span.start, high - span.start)
        target.append(low - cut.start if isinstance(at, int) else slice(low - cut.start, high - cut.start))
    source, inner = [], {}
    for (first, *rest), length in zip(piece.dims, leaf.shape(piece), strict=True):
        row = length // _length(leaf, piece, first)
        source.append(slice(wanted[first].start * row, wanted[first].stop * row))
        inner |= {letter: wanted[letter] for letter in rest}
    return _Cut(tuple(source), inner, tuple(target))


def _length(leaf: Leaf, piece: Piece, letter: str) -> int:
    at = piece.at.get(letter)
    return leaf.size(letter) if at is None else len(at)


def _transpose(leaf: Leaf, piece: Piece, numbers: np.ndarray, inner: dict[str, slice]) -> np.ndarray:
    """Return a view of the data that was read, in the leaf's order of dimensions."""
    dims = "".join(piece.dims)
    shape: list[int] = []
    for (_, *rest), read in zip(piece.dims, numbers.shape, strict=True):
        whole = [_length(leaf, piece, letter) for letter in rest]
        shape += [read // math.prod(whole), *whole]
    view = numbers.reshape(shape)[tuple(inner.get(letter, slice(None)) for letter in dims)]
    return view.transpose([dims.index(letter) for letter in leaf.dims if letter in dims])


def _copy(out: np.ndarray, view: np.ndarray) -> None:
    """Cast and copy; a transposed view in strips of one cache line, four times as fast as in NumPy's order."""
    strip = max(64 // out.itemsize, 1)
    if view.ndim < 2 or view.strides[-1] == view.itemsize or view.shape[-1] <= strip:
        out[...] = view
        return
    for start in range(0, view.shape[-1], strip):
        out[..., start : start + strip] = view[..., start : start + strip]


def _by_file(wanted: list[tuple[StoredTensor, Piece, _Cut]]) -> Iterator[tuple[Path, list[tuple[Piece, _Cut]]]]:
    """Group the pieces that are read through one opened file: neighbors in it, at most `MAX_MAPPED_BYTES` apart."""
    wanted = sorted(wanted, key=lambda item: (item[0].file, item[0].start))
    group, first = [], None
    for stored, piece, cut in wanted:
        if first and (stored.file != first.file or stored.start - first.start > MAX_MAPPED_BYTES):
            yield first.file, group
            group, first = [], None
        first = first or stored
        group.append((piece, cut))
    if first:
        yield first.file, group

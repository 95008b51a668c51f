"""Numbers of a model directory straight onto the mesh: each host reads its devices' pieces, and never a model or a leaf whole."""

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

from jaxrl_llm.model.hf.checkpoint import Stored, find_leaves
from jaxrl_llm.model.hf.names import Leaf, Piece
from jaxrl_llm.model.params import ParamSpec, is_spec
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.types import PyTree

Box = tuple[slice, ...]

# Bytes of a piece that lie on the host at a time, in each of WORKERS threads; a larger piece goes to its device in runs of layers.
CHUNK = 2**27
WORKERS = min(4, os.cpu_count() or 1)
# Bytes read through one opened file before it is opened anew: pages that a mapped file was read from count as memory in use.
OPEN = 2**26


def load(directory: str | Path, specs: PyTree, layout: Layout, dtype: jnp.dtype) -> PyTree:
    """The parameters that `specs` describes (layers stacked, or one entry a layer), in `layout`, cast to `dtype`.

    The whole index is checked before a number is read. Raises UserError; see `checkpoint.find_leaves`.
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
    """The blocks that this host's devices hold, each once, with all the devices that hold it."""
    shape, found = leaf.spec.shape, {}
    for device, index in layout.sharding(leaf.spec.axes).addressable_devices_indices_map(shape).items():
        box = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        found.setdefault(box, []).append(device)
    for box, devices in found.items():
        yield tuple(slice(*ends) for ends in box), devices


def _place(
    leaf: Leaf, stored: Mapping[str, Stored], box: Box, devices: list[jax.Device], dtype: np.dtype
) -> list[jax.Array]:
    """The leaf's block `box` on each of `devices`."""
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
    """`box` in runs along its first axis that hold `CHUNK` bytes, or one entry where that is more."""
    row = math.prod(s.stop - s.start for s in box[1:]) * dtype.itemsize
    step = max(CHUNK // max(row, 1), 1)
    for start in range(box[0].start, box[0].stop, step):
        yield (slice(start, min(start + step, box[0].stop)), *box[1:])


@cache
def _writer() -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    """Rows of one array written into another in place, on the one device that holds both."""
    return jax.jit(partial(jax.lax.dynamic_update_slice_in_dim, axis=0), donate_argnums=0)


def _read(leaf: Leaf, stored: Mapping[str, Stored], box: Box, dtype: np.dtype) -> np.ndarray:
    """The leaf's block `box`, assembled from slices of its tensors."""
    out = np.empty(tuple(s.stop - s.start for s in box), dtype)
    wanted = [
        (stored[piece.tensor], piece, cut) for piece in leaf.pieces if (cut := _cut(leaf, piece, box)) is not None
    ]
    for file, group in _by_file(wanted):
        with safe_open(file, framework="numpy") as handle:
            for piece, (source, inner, target) in group:
                numbers = handle.get_slice(piece.tensor)[source]
                _copy(out[target], _turn(leaf, piece, numbers, inner))
    return out


class _Cut(NamedTuple):
    """Where a piece meets a block of its leaf."""

    source: Box
    """Of the tensor: of a product of letters all but the first are read whole."""
    inner: dict[str, slice]
    """What of the letters read whole is wanted."""
    target: tuple[int | slice, ...]
    """Of the block."""


def _cut(leaf: Leaf, piece: Piece, box: Box) -> _Cut | None:
    """None where piece and block do not meet."""
    wanted, target = {}, []
    for letter, cut in zip(leaf.letters, box, strict=True):
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


def _turn(leaf: Leaf, piece: Piece, numbers: np.ndarray, inner: dict[str, slice]) -> np.ndarray:
    """What was read as a view in the order of the leaf's letters."""
    letters = "".join(piece.dims)
    shape: list[int] = []
    for (_, *rest), read in zip(piece.dims, numbers.shape, strict=True):
        whole = [_length(leaf, piece, letter) for letter in rest]
        shape += [read // math.prod(whole), *whole]
    view = numbers.reshape(shape)[tuple(inner.get(letter, slice(None)) for letter in letters)]
    return view.transpose([letters.index(letter) for letter in leaf.letters if letter in letters])


def _copy(out: np.ndarray, view: np.ndarray) -> None:
    """Cast and copy; across the grain in strips of a cache line, four times as fast as NumPy's own order."""
    strip = max(64 // out.itemsize, 1)
    if view.ndim < 2 or view.strides[-1] == view.itemsize or view.shape[-1] <= strip:
        out[...] = view
        return
    for start in range(0, view.shape[-1], strip):
        out[..., start : start + strip] = view[..., start : start + strip]


def _by_file(wanted: list[tuple[Stored, Piece, _Cut]]) -> Iterator[tuple[Path, list[tuple[Piece, _Cut]]]]:
    """Groups that one opened file serves: neighbors in it, `OPEN` bytes of it at most."""
    wanted = sorted(wanted, key=lambda item: (item[0].file, item[0].start))
    group, begun = [], None
    for place, piece, cut in wanted:
        if begun and (place.file != begun.file or place.start - begun.start > OPEN):
            yield begun.file, group
            group, begun = [], None
        begun = begun or place
        group.append((piece, cut))
    if begun:
        yield begun.file, group

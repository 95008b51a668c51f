"""Fingerprints of the leaves of a tree: one number each, the same on every mesh."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.types import PyTree

WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


class Digest(NamedTuple):
    """Digest of one leaf."""

    fingerprint: int
    finite: bool
    """All its numbers are finite. Always True for NumPy arrays, whose NaN may mean "not measured"."""


def fingerprint(tree: PyTree) -> dict[str, int]:
    """A 32-bit number per leaf, by path: the same on every mesh, another if any bit flips or an element moves.

    Sum mod 2^32 over the words of a leaf of `mix(word ^ odd * index)`, `mix` a bijection (MurmurHash3's finalizer): a change of
    one word always shows, any other with probability 1 - 2^-32. (A plain weighted sum misses every even number of flipped signs.)
    Leaves: jax arrays, also global ones of several processes, and NumPy arrays; an empty leaf gives 0.
    """
    return {path: found.fingerprint for path, found in digests(by_path(tree)).items()}


def by_path(tree: PyTree) -> dict[str, Any]:
    """Leaves by `jax.tree_util.keystr`; those that are no jax arrays or ShapeDtypeStructs become NumPy arrays."""
    device = (jax.Array, jax.ShapeDtypeStruct)
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): x if isinstance(x, device) else np.asarray(x) for path, x in flat}


def digests(leaves: dict[str, Any]) -> dict[str, Digest]:
    found: dict[str, Any] = {}
    for path, x in leaves.items():
        # One program per shape and layout: one over hundreds of leaves takes much longer to compile.
        found[path] = _device_digest(x) if isinstance(x, jax.Array) else (_host_sum(x), True)
        # On CPU many concurrent collectives wait for each other's threads, and XLA aborts after 40 seconds.
        if isinstance(x, jax.Array) and next(iter(x.sharding.device_set)).platform == "cpu":
            jax.block_until_ready(found[path])
    return {path: Digest(int(number), bool(finite)) for path, (number, finite) in jax.device_get(found).items()}


@jax.jit
def _device_digest(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    finite = jnp.isfinite(x).all() if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.bool_(True)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    # 8-byte types gain a last dimension of 2.
    words = jax.lax.bitcast_convert_type(x, WORDS[min(x.dtype.itemsize, 4)]).astype(jnp.uint32)
    index, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for dim in reversed(range(words.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim) * np.uint32(stride & 0xFFFFFFFF)
        stride *= words.shape[dim]
    return jnp.sum(_mixed(words, index), dtype=jnp.uint32), finite


def _host_sum(x: np.ndarray) -> np.uint32:
    word = WORDS[min(x.dtype.itemsize, 4)]
    words = np.ascontiguousarray(x).reshape(-1).view(word).astype(np.uint32)
    return np.sum(_mixed(words, np.arange(words.size, dtype=np.uint32)), dtype=np.uint32)


def _mixed(words: Any, index: Any) -> Any:
    mixed = words ^ (index * np.uint32(0x9E3779B1))
    mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
    return mixed ^ (mixed >> 16)

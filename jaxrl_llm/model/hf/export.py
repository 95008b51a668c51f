"""Export of parameters as a Hugging Face directory: config.json, generation_config.json, and safetensors with an index."""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jaxrl_llm.errors import UserError, describe_os_error
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.hf.checkpoint import INDEX, SINGLE
from jaxrl_llm.model.hf.config import read_config, read_json
from jaxrl_llm.model.hf.names import Leaf, Piece, leaves, tensors
from jaxrl_llm.model.hf.written_config import write_config
from jaxrl_llm.model.params import GATE_UP, specs, unstack
from jaxrl_llm.types import PyTree

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class ConfigFiles:
    """Source and contents of config.json and generation_config.json."""

    source: str | Path | None = None
    """Directory that the model was loaded from: both of its files are kept, except for the dtype. None: both are created."""
    length: int = 4096
    """max_position_embeddings of a created config.json."""
    eos: tuple[int, ...] = ()
    """Written to both files if not empty; so is `pad` if not None."""
    pad: int | None = None

    @property
    def ids(self) -> dict[str, Any]:
        """`eos` and `pad` under their keys in both files."""
        eos = {"eos_token_id": self.eos[0] if len(self.eos) == 1 else list(self.eos)} if self.eos else {}
        return eos if self.pad is None else eos | {"pad_token_id": self.pad}


def export(
    params: PyTree,
    cfg: ModelConfig,
    directory: str | Path,
    dtype: Dtype,
    files: ConfigFiles = ConfigFiles(),
    *,
    save_tokenizer: Callable[[Path], object] | None = None,
    max_shard_bytes: int = 4 * 10**9,
) -> None:
    """Write a model to `directory`, atomically. Every process calls this; the first one writes. The host holds the tensors of one
    file at a time.

    Args:
        params: layers stacked, or one entry per layer; on any mesh.
        cfg: the model.
        directory: new or empty.
        dtype: dtype of the tensors in the files.
        files: source and contents of config.json and generation_config.json.
        save_tokenizer: `save_tokenizer(path)` writes the tokenizer's files into a directory.
        max_shard_bytes: maximum bytes per file of tensors.

    Raises:
        UserError: the directory is not empty, or `cfg` belongs to no family, or differs from that of `files.source`.
    """
    texts = {"config.json": _config(cfg, dtype, files), "generation_config.json": _generation(files)}
    with atomic_directory(Path(directory), texts) as building:
        if building is not None and save_tokenizer is not None:
            try:
                save_tokenizer(building)
            except Exception as error:  # tokenizer libraries have no exception type for a full disk
                raise UserError(f"{directory}: the tokenizer cannot be written: {error}") from None
        _write_tensors(params, cfg, building, jnp.dtype(dtype), max_shard_bytes)


@contextmanager
def atomic_directory(directory: Path, texts: Mapping[str, Any]) -> Iterator[Path | None]:
    """Yield a temporary directory that becomes `directory` on success and is removed on failure; None in all processes but the
    first.

    It already contains `texts`, JSON by file name. Raises UserError if `directory` is not empty or cannot be written.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory}: got a file or a directory that is not empty, want a new or an empty directory")
    building = directory.with_name(f".{directory.name}.{os.getpid()}.part")
    first = jax.process_index() == 0
    try:
        if first:
            building.mkdir(parents=True)
            for name, text in texts.items():
                (building / name).write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")
        yield building if first else None
        if first:
            os.replace(building, directory)
    except OSError as error:
        raise UserError(describe_os_error(error, directory)) from None
    except SafetensorError as error:
        raise UserError(f"{directory}: the tensors cannot be written: {error}") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("exported")


def _config(cfg: ModelConfig, dtype: Dtype, files: ConfigFiles) -> dict[str, Any]:
    source = files.source
    if source is None:
        return write_config(cfg, dtype, files.length) | files.ids
    theirs = read_config(source, compute=cfg.compute)
    if theirs != cfg:
        pairs = zip(dataclasses.fields(cfg), dataclasses.astuple(theirs), dataclasses.astuple(cfg), strict=True)
        lines = [f"model.{f.name}: got {ours}, want {want}" for f, want, ours in pairs if want != ours]
        raise UserError(
            f"{source}: got a config.json of another model, want that of the parameters:\n" + "\n".join(lines)
        )
    given = read_json(Path(source) / "config.json")
    kept = {
        key: value for key, value in given.items() if key not in ("torch_dtype", "transformers_version", "auto_map")
    }
    if isinstance(given.get("text_config"), dict):
        # Only the text model was loaded, which is an architecture by itself.
        return write_config(cfg, dtype, given["text_config"].get("max_position_embeddings", files.length)) | files.ids
    return kept | {"dtype": dtype} | files.ids


def _generation(files: ConfigFiles) -> dict[str, Any]:
    path = Path(files.source) / "generation_config.json" if files.source is not None else None
    given = read_json(path) if path is not None and path.is_file() else {}
    return given | files.ids


def _write_tensors(params: PyTree, cfg: ModelConfig, directory: Path | None, dtype: np.dtype, max_bytes: int) -> None:
    """Write files of at most `max_bytes` in the order of the layers. If `directory` is None, only take part in gathering."""
    # One entry per layer, whether or not `params` is stacked: a file then holds consecutive layers.
    found = leaves(unstack(specs(cfg), cfg.layers))
    sizes = {name: math.prod(leaf.shape(piece)) * dtype.itemsize for name, leaf, piece in tensors(found)}
    plan = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_bytes,
    )
    file_of = {name: file for file, names in plan.filename_to_tensors.items() for name in names}
    pending: dict[str, np.ndarray] = {}
    left = {file: len(names) for file, names in plan.filename_to_tensors.items()}
    for name, numbers in _numbers(params, found, dtype, keep=directory is not None):
        file = file_of[name]
        pending[name], left[file] = numbers, left[file] - 1
        if not left[file]:
            save_file(
                {n: pending.pop(n) for n in plan.filename_to_tensors[file]}, directory / file, metadata={"format": "pt"}
            )
    if plan.is_sharded and directory is not None:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": file_of}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    assert plan.is_sharded or set(plan.filename_to_tensors) == {SINGLE}


def _numbers(params: PyTree, found: list[Leaf], dtype: np.dtype, keep: bool) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each tensor's name and values, gathering one leaf of one layer at a time."""
    for leaf in found:
        numbers = _gather(params, leaf, dtype)
        if keep:
            for piece in leaf.pieces:
                yield piece.tensor, _cut_out(leaf, piece, numbers)


def _gather(params: PyTree, leaf: Leaf, dtype: np.dtype) -> np.ndarray:
    """Return a leaf of one layer as a NumPy array, on every host."""
    if leaf.path[0] == "layers" and isinstance(params["layers"], dict):
        _, layer, name = leaf.path
        joined = name in GATE_UP
        stored = params["layers"]["gate_up" if joined else name]
        index = (layer, GATE_UP.index(name)) if joined else (layer,)
    else:
        stored, index = params, ()
        for key in leaf.path:
            stored = stored[key]
    replicated = NamedSharding(stored.sharding.mesh, PartitionSpec())
    return np.asarray(_taker(dtype, replicated)(stored, index).addressable_data(0))


@cache
def _taker(dtype: np.dtype, replicated: NamedSharding) -> Callable[[jax.Array, tuple[int, ...]], jax.Array]:
    """Return a compiled function (leaf, index) -> the leaf's entry `index`, or all of it if empty, cast and replicated."""

    def take(x: jax.Array, index: tuple[jax.Array, ...]) -> jax.Array:
        for i in index:
            x = jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
        return x.astype(dtype)

    return jax.jit(take, out_shardings=replicated)


def _cut_out(leaf: Leaf, piece: Piece, numbers: np.ndarray) -> np.ndarray:
    """Return the tensor that is this piece of the leaf, in the file's order of dimensions."""
    block: list[int | slice] = []
    for letter in leaf.dims:
        at = piece.at.get(letter, slice(None))
        block.append(slice(at.start, at.stop) if isinstance(at, range) else at)
    kept = "".join(letter for letter in leaf.dims if not isinstance(piece.at.get(letter), int))
    transposed = numbers[tuple(block)].transpose([kept.index(letter) for dim in piece.dims for letter in dim])
    return np.ascontiguousarray(transposed.reshape(leaf.shape(piece)))

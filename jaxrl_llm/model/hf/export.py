"""Parameters to a Hugging Face directory that transformers loads: config.json, generation_config.json, safetensors with index."""

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

from jaxrl_llm.errors import UserError, in_words
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
    """Where config.json and generation_config.json come from, and what goes into them."""

    source: str | Path | None = None
    """The directory the model came from: both of its files are kept, but for the dtype. None: both are made."""
    length: int = 4096
    """max_position_embeddings of a config.json that is made."""
    eos: tuple[int, ...] = ()
    """Goes, where given, into both files; so does `pad`."""
    pad: int | None = None

    @property
    def ids(self) -> dict[str, Any]:
        """`eos` and `pad`, under the names that both files have for them."""
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
    """Write a model as `directory`, whole or not at all. Every process calls this; the first one writes. The host holds one file's
    tensors at a time.

    Args:
        params: layers stacked, or one entry per layer; on any mesh.
        cfg: the model.
        directory: a new or an empty one.
        dtype: of the tensors in the files.
        files: config.json and generation_config.json.
        save_tokenizer: `save_tokenizer(path)` writes the tokenizer's files into a directory.
        max_shard_bytes: bytes of a file of tensors at most.

    Raises:
        UserError: the directory has something in it, or `cfg` is no family, or not that of `files.source`.
    """
    texts = {"config.json": _config(cfg, dtype, files), "generation_config.json": _generation(files)}
    with whole(Path(directory), texts) as building:
        if building is not None and save_tokenizer is not None:
            try:
                save_tokenizer(building)
            except Exception as error:  # the libraries beneath have no type of their own for a full disk
                raise UserError(f"{directory}: the tokenizer cannot be written: {error}") from None
        _write_tensors(params, cfg, building, jnp.dtype(dtype), max_shard_bytes)


@contextmanager
def whole(directory: Path, texts: Mapping[str, Any]) -> Iterator[Path | None]:
    """Where to build `directory`, which appears at the end, whole, or not at all; None in all processes but the first. `texts` are
    in it already, JSON by file name. Raises UserError for a place that is taken or cannot be written."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory}: got a place that is taken, want a new or an empty directory")
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
        raise UserError(in_words(error, directory)) from None
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
        # The text model alone is what we hold, and it is an architecture of its own.
        return write_config(cfg, dtype, given["text_config"].get("max_position_embeddings", files.length)) | files.ids
    return kept | {"dtype": dtype} | files.ids


def _generation(files: ConfigFiles) -> dict[str, Any]:
    path = Path(files.source) / "generation_config.json" if files.source is not None else None
    given = read_json(path) if path is not None and path.is_file() else {}
    return given | files.ids


def _write_tensors(params: PyTree, cfg: ModelConfig, directory: Path | None, dtype: np.dtype, max_bytes: int) -> None:
    """Files of at most `max_bytes`, in the order of the layers; `directory` None takes part in gathering and writes nothing."""
    # One entry a layer, whatever `params` has: a file then holds neighbors.
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
    """Each tensor's name and numbers, one leaf of one layer gathered at a time."""
    for leaf in found:
        numbers = _gather(params, leaf, dtype)
        if keep:
            for piece in leaf.pieces:
                yield piece.tensor, _cut_out(leaf, piece, numbers)


def _gather(params: PyTree, leaf: Leaf, dtype: np.dtype) -> np.ndarray:
    """A leaf of one layer as a NumPy array, on every host."""
    if leaf.path[0] == "layers" and isinstance(params["layers"], dict):
        _, layer, name = leaf.path
        joined = name in GATE_UP
        whole = params["layers"]["gate_up" if joined else name]
        index = (layer, GATE_UP.index(name)) if joined else (layer,)
    else:
        whole, index = params, ()
        for key in leaf.path:
            whole = whole[key]
    everywhere = NamedSharding(whole.sharding.mesh, PartitionSpec())
    return np.asarray(_taker(dtype, everywhere)(whole, index).addressable_data(0))


@cache
def _taker(dtype: np.dtype, everywhere: NamedSharding) -> Callable[[jax.Array, tuple[int, ...]], jax.Array]:
    """The entry `index` of a leaf, all of it where that is empty, cast, on every device."""

    def take(one: jax.Array, index: tuple[jax.Array, ...]) -> jax.Array:
        for i in index:
            one = jax.lax.dynamic_index_in_dim(one, i, keepdims=False)
        return one.astype(dtype)

    return jax.jit(take, out_shardings=everywhere)


def _cut_out(leaf: Leaf, piece: Piece, numbers: np.ndarray) -> np.ndarray:
    """The tensor that is this piece of the leaf, in the file's own order of dims."""
    block: list[int | slice] = []
    for letter in leaf.letters:
        at = piece.at.get(letter, slice(None))
        block.append(slice(at.start, at.stop) if isinstance(at, range) else at)
    kept = "".join(letter for letter in leaf.letters if not isinstance(piece.at.get(letter), int))
    turned = numbers[tuple(block)].transpose([kept.index(letter) for dim in piece.dims for letter in dim])
    return np.ascontiguousarray(turned.reshape(leaf.shape(piece)))

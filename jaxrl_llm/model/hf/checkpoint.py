"""Index of a model directory's safetensors: file, dtype, shape and offset of every tensor, checked before any data is read."""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxrl_llm.errors import UserError
from jaxrl_llm.model.hf.config import WITH_VISION, read_json
from jaxrl_llm.model.hf.names import Leaf, leaves, tensors
from jaxrl_llm.types import PyTree

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
# Bytes per number for each dtype of the format; dtypes of less than a byte are not checked.
ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4}
ITEM_BYTES |= {"U64": 8, "I64": 8, "F64": 8} | {name: dtype.itemsize for name, dtype in DTYPES.items()}
# The format's bound.
HEADER_BYTES = 100_000_000
# Problems listed per message; a wrong model has thousands.
MAX_SHOWN = 8
# Buffers that old versions of transformers saved.
ROTARY_BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|masked_bias)$")
# Tensors beside the text model of a multimodal Gemma 3.
VISION_TENSORS = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")
HEAD = "lm_head.weight"
# Numbers of two tensors compared at a time.
COMPARE_CHUNK = 2**24


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Byte offset of its data in the file."""


def find_leaves(directory: Path, tree: PyTree) -> tuple[list[Leaf], Mapping[str, StoredTensor]]:
    """Return the leaves of `tree` with this directory's tensor names, and the stored tensors by name.

    Raises:
        UserError: with all problems in one message: files missing, unreadable or truncated; tensors missing, unexpected, of a wrong
            shape or dtype; a separate head in a model whose config.json ties it to the embedding.
    """
    problems: list[str] = []
    stored = _index(directory, problems)
    if problems:
        raise UserError("\n".join(problems))
    # The text part of a multimodal model has another prefix.
    prefixes = ("model.", "model.language_model.", "language_model.model.")
    prefix = next((p for p in prefixes if f"{p}embed_tokens.weight" in stored), "model.")
    if prefix == "language_model.model." and "language_model.lm_head.weight" in stored:
        stored[HEAD] = stored.pop("language_model.lm_head.weight")
    fused = any(name.endswith(".mlp.experts.gate_up_proj") for name in stored)
    found = leaves(tree, prefix, fused)
    _compare(directory, found, stored, problems)
    if problems:
        raise UserError("\n".join(problems))
    if "head" not in tree and HEAD in stored and not _equal(stored[f"{prefix}embed_tokens.weight"], stored[HEAD]):
        raise UserError(
            f"{directory / 'config.json'}: tie_word_embeddings: got true beside {HEAD} ({stored[HEAD].file.name}), which is no "
            "copy of the embedding, want false, for a model with that head, or files without it"
        )
    return found, stored


def _equal(a: StoredTensor, b: StoredTensor) -> bool:
    """Return whether two tensors of the same shape hold the same numbers, reading them in chunks."""

    def numbers(tensor: StoredTensor, start: int) -> np.ndarray:
        dtype = DTYPES[tensor.dtype]
        return np.fromfile(tensor.file, dtype, COMPARE_CHUNK, offset=tensor.start + start * dtype.itemsize)

    size = math.prod(a.shape)
    for start in range(0, size, COMPARE_CHUNK):
        pair = (numbers(tensor, start)[: size - start].astype(np.float32) for tensor in (a, b))
        if not np.array_equal(*pair, equal_nan=True):
            return False
    return True


def _index(directory: Path, problems: list[str]) -> dict[str, StoredTensor]:
    if (directory / INDEX).exists():
        placed = read_json(directory / INDEX).get("weight_map")
        if not isinstance(placed, dict) or not all(isinstance(f, str) and Path(f).name == f for f in placed.values()):
            problems.append(f"{directory / INDEX}: weight_map: got no table of tensors and file names, want one")
            return {}
        if (directory / SINGLE).exists() and SINGLE not in placed.values():
            problems.append(
                f"{directory}: got {SINGLE} and {INDEX}, which does not name it, want one of them: they are two models"
            )
    elif (directory / SINGLE).exists():
        placed = None
    else:
        problems.append(_no_weights(directory))
        return {}
    found: dict[str, StoredTensor] = {}
    for name in sorted({SINGLE} if placed is None else set(placed.values())):
        inside = _read_header(directory / name, problems)
        listed = inside if placed is None else {tensor for tensor, file in placed.items() if file == name}
        if inside is not None:
            _list(f"{directory / INDEX}: tensors that {name} does not hold", sorted(listed - inside.keys()), problems)
            # A tensor that the index maps to another file counts there; one that it does not name at all is unexpected.
            found |= {t: s for t, s in inside.items() if placed is None or placed.get(t, name) == name}
    return found


def _no_weights(directory: Path) -> str:
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        return (
            f"{directory}: got pickle files ({', '.join(pickles[:MAX_SHOWN])}), want safetensors: opening a pickle runs any code "
            "is in it; save the model with transformers' save_pretrained, which writes safetensors"
        )
    return f"{directory}: got neither {SINGLE} nor {INDEX}, want one of them"


def _read_header(path: Path, problems: list[str]) -> dict[str, StoredTensor] | None:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, HEADER_BYTES):
                raise ValueError(f"it claims {length:,} bytes, in a file of {size:,}")
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError(f"got {type(header).__name__}, want a JSON object")
        entries = ((name, entry) for name, entry in header.items() if name != "__metadata__")
        found = {name: _stored(path, 8 + length, name, entry) for name, entry in entries}
    except FileNotFoundError:
        problems.append(f"{path}: got no such file, want it: {INDEX} lists tensors in it")
        return None
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path}: got a file whose header cannot be read, want safetensors ({str(error)[:300]})")
        return None
    want = _end(found, 8 + length)
    if isinstance(want, str):
        problems.append(f"{path}: {want}")
        return None
    if size != want:
        cut = "; it was cut short, copy or download it again" if size < want else ""
        problems.append(f"{path}: got {size} bytes, want {want} by its header{cut}")
        return None
    return {name: stored for name, (stored, _) in found.items()}


def _stored(path: Path, begin: int, name: str, entry: Any) -> tuple[StoredTensor, int]:
    """Return the tensor and the byte after its data. Raises ValueError for a malformed header entry."""
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, place = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str):
        raise ValueError(f"{name[:80]}: dtype: got {json.dumps(dtype)[:80]}, want a name")
    if not _are_counts(shape):
        raise ValueError(f"{name[:80]}: shape: got {json.dumps(shape)[:80]}, want whole numbers")
    if not _are_counts(place) or len(place) != 2 or place[0] > place[1]:
        raise ValueError(f"{name[:80]}: data_offsets: got {json.dumps(place)[:80]}, want [begin, end]")
    if dtype in ITEM_BYTES and place[1] - place[0] != (want := math.prod(shape) * ITEM_BYTES[dtype]):
        raise ValueError(
            f"{name[:80]}: data_offsets: got {place[1] - place[0]} bytes, want {want:.20g} by shape and dtype"
        )
    return StoredTensor(path, dtype, tuple(shape), begin + place[0]), begin + place[1]


def _are_counts(value: Any) -> bool:
    """Return whether `value` is a list of at most 16 integers from 0 to 2^63 - 1, so that their product stays manageable."""
    return isinstance(value, list) and len(value) <= 16 and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _end(found: Mapping[str, tuple[StoredTensor, int]], begin: int) -> int | str:
    """Return the file's size by its header, or a message about a tensor that does not begin where the one before it ends."""
    for name, (stored, end) in sorted(found.items(), key=lambda item: (item[1][0].start, item[1][1])):
        if stored.start != begin:
            return f"got {name[:80]} at byte {stored.start}, want it at {begin}, where the tensor before it ends"
        begin = end
    return begin


def _compare(directory: Path, found: list[Leaf], stored: Mapping[str, StoredTensor], problems: list[str]) -> None:
    wanted = {name: leaf.shape(piece) for name, leaf, piece in tensors(found)}
    # A tied head that was saved as well: the embedding's copy.
    embedding = next(shape for name, shape in wanted.items() if name.endswith("embed_tokens.weight"))
    allowed = {n for n, s in stored.items() if n == HEAD and s.shape == embedding and s.dtype in DTYPES}
    allowed |= {n for n in stored if ROTARY_BUFFERS.match(n)}
    if read_json(directory / "config.json").get("architectures") == [WITH_VISION]:
        allowed |= {n for n in stored if VISION_TENSORS.match(n)}
    _list(f"{directory}: tensors missing", [n for n in wanted if n not in stored], problems)
    extra = sorted(n for n in stored if n not in wanted and n not in allowed)
    extra = [f"{n} ({stored[n].file.name})" for n in extra]
    _list(f"{directory}: tensors that the model of config.json does not have", extra, problems)
    both = [(name, shape, stored[name]) for name, shape in wanted.items() if name in stored]
    wrong = [(n, shape, s) for n, shape, s in both if s.shape != shape]
    shapes = [f"{n} ({s.file.name}): got {list(s.shape)}, want {list(shape)}" for n, shape, s in wrong]
    _list(f"{directory}: tensors of another shape than by config.json", shapes, problems)
    types = [f"{n} ({s.file.name}): got {s.dtype}" for n, _, s in both if s.dtype not in DTYPES]
    _list(f"{directory}: tensors of a dtype other than {', '.join(DTYPES)}", types, problems)


def _list(what: str, lines: Iterable[str], problems: list[str]) -> None:
    if lines := list(lines):
        more = f"; and {len(lines) - MAX_SHOWN} more" if len(lines) > MAX_SHOWN else ""
        problems.append(f"{what}: {'; '.join(lines[:MAX_SHOWN])}{more}")

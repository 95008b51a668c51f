"""A model directory's safetensors as an index: every tensor with file, dtype, shape and place, checked before a number is read."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from huggingface_hub import parse_local_safetensors_file_metadata
from huggingface_hub.errors import SafetensorsParsingError

from jaxrl_llm.errors import UserError
from jaxrl_llm.model.hf.config import WITH_VISION, read_json
from jaxrl_llm.model.hf.names import Leaf, leaves, tensors
from jaxrl_llm.types import PyTree

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
# Problems shown of each kind; a wrong model has thousands.
SHOWN = 8
# Buffers that old versions of transformers saved.
BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|masked_bias)$")
# What stands beside the text model in Gemma 3 with eyes.
EYES = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")
HEAD = "lm_head.weight"
# Numbers of two tensors that are compared at a time.
COMPARED = 2**24


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor of a file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Byte of the file where its numbers begin."""


def find_leaves(directory: Path, tree: PyTree) -> tuple[list[Leaf], Mapping[str, Stored]]:
    """The leaves of `tree` with the names that this directory uses, and where each of its tensors is.

    Raises UserError that lists all at once: files missing, unreadable or cut short, tensors missing, unexpected, misshapen or of
    another dtype; and for a head of its own in a model that config.json says has none.
    """
    problems: list[str] = []
    stored = _index(directory, problems)
    if problems:
        raise UserError("\n".join(problems))
    # A vision model's text part stands under another name.
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


def _equal(a: Stored, b: Stored) -> bool:
    """Whether two tensors of one shape hold the same numbers, read in pieces."""

    def numbers(of: Stored, start: int) -> np.ndarray:
        dtype = DTYPES[of.dtype]
        return np.fromfile(of.file, dtype, COMPARED, offset=of.start + start * dtype.itemsize)

    size = math.prod(a.shape)
    for start in range(0, size, COMPARED):
        pair = (numbers(of, start)[: size - start].astype(np.float32) for of in (a, b))
        if not np.array_equal(*pair, equal_nan=True):
            return False
    return True


def _index(directory: Path, problems: list[str]) -> dict[str, Stored]:
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
    found: dict[str, Stored] = {}
    for name in sorted({SINGLE} if placed is None else set(placed.values())):
        inside = _read_header(directory / name, problems)
        listed = inside if placed is None else {tensor for tensor, file in placed.items() if file == name}
        if inside is not None:
            _list(f"{directory / INDEX}: tensors that {name} does not hold", sorted(listed - inside.keys()), problems)
            # What the index puts into another file counts there; what it does not name at all is unexpected.
            found |= {t: s for t, s in inside.items() if placed is None or placed.get(t, name) == name}
    return found


def _no_weights(directory: Path) -> str:
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        return (
            f"{directory}: got pickle files ({', '.join(pickles[:SHOWN])}), want safetensors: opening a pickle runs whatever code "
            "is in it; save the model with transformers' save_pretrained, which writes safetensors"
        )
    return f"{directory}: got neither {SINGLE} nor {INDEX}, want one of them"


def _read_header(path: Path, problems: list[str]) -> dict[str, Stored] | None:
    try:
        header = parse_local_safetensors_file_metadata(path).tensors
        with path.open("rb") as file:
            begin = 8 + int.from_bytes(file.read(8), "little")
    except FileNotFoundError:
        problems.append(f"{path}: got no such file, want it: {INDEX} lists tensors in it")
        return None
    except (SafetensorsParsingError, OSError, ValueError, KeyError, TypeError) as error:
        problems.append(f"{path}: got a file whose header cannot be read, want safetensors ({str(error)[:200]})")
        return None
    got, want = path.stat().st_size, begin + max((t.data_offsets[1] for t in header.values()), default=0)
    if got != want:
        cut = "; it was cut short, copy or download it again" if got < want else ""
        problems.append(f"{path}: got {got} bytes, want {want} by its header{cut}")
        return None
    return {n: Stored(path, t.dtype, tuple(t.shape), begin + t.data_offsets[0]) for n, t in header.items()}


def _compare(directory: Path, found: list[Leaf], stored: Mapping[str, Stored], problems: list[str]) -> None:
    wanted = {name: leaf.shape(piece) for name, leaf, piece in tensors(found)}
    # A tied head that was saved as well: the embedding's copy.
    embedding = next(shape for name, shape in wanted.items() if name.endswith("embed_tokens.weight"))
    allowed = {n for n, s in stored.items() if n == HEAD and s.shape == embedding and s.dtype in DTYPES}
    allowed |= {n for n in stored if BUFFERS.match(n)}
    if read_json(directory / "config.json").get("architectures") == [WITH_VISION]:
        allowed |= {n for n in stored if EYES.match(n)}
    _list(f"{directory}: tensors missing", [n for n in wanted if n not in stored], problems)
    extra = sorted(n for n in stored if n not in wanted and n not in allowed)
    extra = [f"{n} ({stored[n].file.name})" for n in extra]
    _list(f"{directory}: tensors that config.json has no place for", extra, problems)
    both = [(name, shape, stored[name]) for name, shape in wanted.items() if name in stored]
    wrong = [(n, shape, s) for n, shape, s in both if s.shape != shape]
    shapes = [f"{n} ({s.file.name}): got {list(s.shape)}, want {list(shape)}" for n, shape, s in wrong]
    _list(f"{directory}: tensors of a shape that config.json does not say", shapes, problems)
    types = [f"{n} ({s.file.name}): got {s.dtype}" for n, _, s in both if s.dtype not in DTYPES]
    _list(f"{directory}: tensors of a dtype other than {', '.join(DTYPES)}", types, problems)


def _list(what: str, lines: Iterable[str], problems: list[str]) -> None:
    if lines := list(lines):
        more = f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        problems.append(f"{what}: {'; '.join(lines[:SHOWN])}{more}")

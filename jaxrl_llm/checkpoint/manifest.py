"""Manifest of a checkpoint: format, shape and fingerprint of each leaf, and the run's metadata."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import orbax.checkpoint as ocp
from etils import epath

from jaxrl_llm.checkpoint.fingerprint import digests
from jaxrl_llm.errors import NonFiniteError, UserError

FORMAT_VERSION = 6
SHOWN_PATHS = 5


class Place(NamedTuple):
    """Where a blob lies, as a manifest stores it."""

    file: str
    start: int
    length: int
    checksum: int


def shapes(leaves: dict[str, Any]) -> dict[str, str]:
    return {path: f"{x.dtype}[{','.join(map(str, x.shape))}]" for path, x in leaves.items()}


def make_manifest(step: int, leaves: dict[str, Any], meta: dict[str, Any], blobs: dict[str, Place]) -> dict[str, str]:
    """Manifest as text with its checksum. Raises NonFiniteError if a leaf on devices holds NaN or infinity."""
    found = digests(leaves)
    broken = [path for path, digest in found.items() if not digest.finite]
    if broken:
        raise NonFiniteError(
            f"the state after step {step} is not finite; not saved: {', '.join(broken[:SHOWN_PATHS])}, {len(broken)} in all"
        )
    described = {path: [shape, found[path].fingerprint] for path, shape in shapes(leaves).items()}
    text = json.dumps({"format_version": FORMAT_VERSION, "leaves": described, "meta": meta, "blobs": blobs})
    return {"sha256": hashlib.sha256(text.encode()).hexdigest(), "text": text}


def read_manifest(step: epath.Path) -> dict[str, Any]:
    """Manifest of a step. Raises ValueError if its checksum is wrong."""
    return _verified(ocp.JsonCheckpointHandler().restore(step / "meta"))


def check_format(step: epath.Path | Path, manifest: dict[str, Any]) -> None:
    """Raise UserError if another version of jaxrl_llm wrote the step."""
    if (found := manifest["format_version"]) != FORMAT_VERSION:
        raise UserError(
            f"{step}: got a checkpoint of format {found}, which another version of jaxrl_llm wrote, want {FORMAT_VERSION}: "
            "continue with that version, or give another run_dir"
        )


def _verified(item: dict[str, str]) -> dict[str, Any]:
    if hashlib.sha256(item["text"].encode()).hexdigest() != item["sha256"]:
        raise ValueError("meta has another checksum than when it was saved")
    manifest = json.loads(item["text"])
    return manifest | {"blobs": {name: Place(*place) for name, place in manifest.get("blobs", {}).items()}}


def check_shapes(directory: epath.Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    """Raise UserError if paths, shapes or dtypes differ."""
    pairs = {path: (saved.get(path, "nothing"), wanted.get(path, "nothing")) for path in saved | wanted}
    lines = [f"{path}: saved {got}, want {want}" for path, (got, want) in pairs.items() if got != want]
    if lines:
        problem = f"{directory}: got {len(lines)} leaves that do not fit this config; undo its changes or give another run_dir"
        raise UserError("\n  ".join([problem, *lines[:SHOWN_PATHS]]))

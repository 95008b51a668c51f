"""Reading data files: JSONL, JSON, Parquet and saved Hugging Face datasets, as records of plain columns."""

import codecs
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrl_llm.errors import UserError

MAX_SHOWN = 5
WANT = "one JSON object per line, or one array of objects"
# Signatures of other file types.
SIGNATURES = {
    codecs.BOM_UTF16_LE: "UTF-16 text", codecs.BOM_UTF16_BE: "UTF-16 text", b"\x1f\x8b": "a gzip file", b"PK\x03\x04": "a zip file",
    b"\x28\xb5\x2f\xfd": "a zstd file", b"PAR1": "a parquet file",
}  # fmt: skip


@dataclass(frozen=True)
class Record:
    where: str
    """File and line, or file and row, for messages; both count from 1."""
    columns: Mapping[str, Any]


def refuse(problems: list[str]) -> None:
    """Raise UserError with the first few problems, if there are any."""
    if problems:
        more = [f"... and {len(problems) - MAX_SHOWN} more"] if len(problems) > MAX_SHOWN else []
        raise UserError("\n".join(problems[:MAX_SHOWN] + more))


def read(path: Path, split: str, setting: str = "") -> list[Record]:
    """Read all records. Raises UserError naming file, line and reason.

    Args:
        path: A .jsonl, .json or .parquet file, or a directory written by `datasets.save_to_disk`.
        split: Split of a saved DatasetDict.
        setting: Config key that explicitly asks for the split; then data without splits is an error.
    """
    try:
        is_saved = path.is_dir()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if is_saved:
        records = _saved(path, split, setting)
    elif setting:
        raise _without_splits(path, split, setting)
    elif path.suffix == ".parquet":
        records = _parquet(path)
    elif path.suffix in (".jsonl", ".json"):
        records = _json(path)
    else:
        want = "a .jsonl, .json or .parquet file, or a directory written by datasets.save_to_disk"
        raise UserError(f"{path}: got {path.suffix or 'no suffix'}, want {want}")
    if not records:
        raise UserError(f"{path}: got no rows, want one or more")
    return records


def _json(path: Path) -> list[Record]:
    """One object per line, or one array of objects."""
    data = _bytes(path).removeprefix(codecs.BOM_UTF8)
    if other := next((name for start, name in SIGNATURES.items() if data.startswith(start)), None):
        raise UserError(f"{path}: got {other}, want {WANT}")
    if data.lstrip()[:1] == b"[":
        return _array(path, data)
    records, bad = [], []
    for number, line in enumerate(data.splitlines(), 1):
        if line.strip():
            try:
                records.append(Record(f"{path}:{number}", _object(_value(line))))
            except ValueError as error:
                bad.append(f"{path}:{number}: {error}")
    if len(bad) > 1 and not records:
        raise UserError(f"{path}: got no line that is a JSON object, want {WANT}; the first: {bad[0]}")
    refuse(bad)
    return records


def _array(path: Path, data: bytes) -> list[Record]:
    try:
        entries = _value(data)
    except ValueError as error:
        raise UserError(f"{path}: {error}; it begins as an array, want {WANT}") from None
    records, bad = [], []
    for number, entry in enumerate(entries, 1):
        try:
            records.append(Record(f"{path} row {number}", _object(entry)))
        except ValueError as error:
            bad.append(f"{path} row {number}: {error}")
    refuse(bad)
    return records


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _value(text: bytes) -> Any:
    try:
        return json.loads(text.decode(), object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("not JSON: it is nested too deeply") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"not JSON: {error}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"got the key {twice!r} twice in one object, want it once")
    return found


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"got {type(value).__name__}, want a JSON object")
    return value


def _parquet(path: Path) -> list[Record]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: .parquet needs pyarrow: pip install 'jaxrl-llm[data]'") from None
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot be read: {why}") from None
    return [Record(f"{path} row {number}", row) for number, row in enumerate(rows, 1)]


def _without_splits(path: Path, split: str, setting: str) -> UserError:
    return UserError(f"{setting}: got {split!r}, want it left out: {path} has no splits")


def _saved(path: Path, split: str, setting: str) -> list[Record]:
    try:
        import datasets
    except ImportError:
        raise UserError(f"{path}: a saved dataset needs datasets: pip install 'jaxrl-llm[data]'") from None
    part, has_parts = path, False
    try:
        found = datasets.load_from_disk(str(path))
        has_parts = isinstance(found, datasets.DatasetDict)
        if has_parts and split in found:
            found, part = found[split], path / split
        rows = [] if isinstance(found, datasets.DatasetDict) else found.to_list()
    except Exception as error:  # a missing or broken file inside raises whatever its reader raises
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot be read as a directory written by datasets.save_to_disk: {why}") from None
    if has_parts and part == path:
        raise UserError(f"{path}: got no split {split!r}, want one of {', '.join(found)}")
    if setting and not has_parts:
        raise _without_splits(path, split, setting)
    return [Record(f"{part} row {number}", row) for number, row in enumerate(rows, 1)]

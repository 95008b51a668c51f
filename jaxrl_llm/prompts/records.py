"""Files and directories of rows, read into plain columns, each row with the place it came from."""

import codecs
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrl_llm.errors import UserError

SHOWN = 5


@dataclass(frozen=True)
class Record:
    where: str
    """For people: file and line, or file and row; both count from 1."""
    columns: Mapping[str, Any]


def refuse(problems: list[str]) -> None:
    """Raises UserError with the first few, if there are any."""
    if problems:
        more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise UserError("\n".join(problems[:SHOWN] + more))


def read(path: Path, split: str, setting: str = "") -> list[Record]:
    """`setting`: the one that asks for the split, where one does.

    Raises UserError that names file, line and reason of what cannot be read, or the setting where there are no splits.
    """
    if path.is_dir():
        records = _saved(path, split, setting)
    elif setting:
        raise _without_splits(path, split, setting)
    elif path.suffix == ".parquet":
        records = _parquet(path)
    elif path.suffix == ".jsonl":
        records = _jsonl(path)
    else:
        want = "a .jsonl file, a .parquet file, or a directory written by datasets.save_to_disk"
        raise UserError(f"{path}: got {path.suffix or 'no suffix'}, want {want}")
    if not records:
        raise UserError(f"{path}: got no rows, want one or more")
    return records


def _jsonl(path: Path) -> list[Record]:
    records, bad = [], []
    for number, line in enumerate(_bytes(path).removeprefix(codecs.BOM_UTF8).splitlines(), 1):
        if line.strip():
            try:
                records.append(Record(f"{path}:{number}", _object(line)))
            except ValueError as error:
                bad.append(f"{path}:{number}: {error}")
    refuse(bad)
    return records


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
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
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
    return [Record(f"{path} row {number}", row) for number, row in enumerate(rows, 1)]


def _without_splits(path: Path, split: str, setting: str) -> UserError:
    return UserError(f"{setting}: got {split!r}, want it left out: {path} has no splits")


def _saved(path: Path, split: str, setting: str) -> list[Record]:
    try:
        import datasets
    except ImportError:
        raise UserError(f"{path}: a saved dataset needs datasets: pip install 'jaxrl-llm[data]'") from None
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # a missing or broken file inside shows as whatever its reader raises
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot be read as a directory written by datasets.save_to_disk: {why}") from None
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise UserError(f"{path}: got no split {split!r}, want one of {', '.join(found)}")
        found, path = found[split], path / split
    elif setting:
        raise _without_splits(path, split, setting)
    return [Record(f"{path} row {number}", row) for number, row in enumerate(found.to_list(), 1)]

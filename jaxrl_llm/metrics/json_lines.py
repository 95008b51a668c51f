"""Append-only files of JSON rows that survive kills and full disks, their reader, and the two that a run writes."""

import json
import math
import mmap
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jaxrl_llm.errors import UserError

METRICS, ROLLOUTS = "metrics.jsonl", "rollouts.jsonl"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file. A torn last line is dropped; an earlier line that is not JSON raises UserError."""
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(json.loads(line))
            except ValueError:
                if not file.read(1):
                    break
                raise UserError(f"{path} line {number}: got {line[:60]!r}, want one JSON object per line") from None
    return rows


def jsonable(value: Any, digits: int = 17) -> Any:
    """`value` in the types of JSON: arrays as lists, floats to `digits` significant digits, non-finite ones as None."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): jsonable(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item, digits) for item in value]
    if hasattr(value, "tolist"):
        return jsonable(value.tolist(), digits)
    number = float(value)
    return float(f"{number:.{digits}g}") if math.isfinite(number) else None


class JsonLines:
    """Append-only file of rows. A row is handed to the kernel before `append` returns, so a kill loses none.

    On a full disk the rows wait in memory for the next `append`, so that training continues and no row is torn.
    """

    def __init__(self, path: Path):
        self._file = open(path, "ab", buffering=0)
        self.truncate(self.size())

    def truncate(self, size: int) -> None:
        """Keep the whole lines among the first `size` bytes."""
        self._waiting = b""
        self._file.truncate(size := min(size, self.size()))  # a larger size would append NUL bytes
        if size:  # an empty file cannot be mapped
            with open(self._file.name, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                end = content.rfind(b"\n") + 1
            self._file.truncate(end)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        # ASCII escapes: a lone surrogate or a line separator in model text can neither fail the encoding nor split a row.
        self._waiting += b"".join(json.dumps(row, allow_nan=False).encode("ascii") + b"\n" for row in rows)
        with suppress(OSError):
            self._write()

    def _write(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def sync(self) -> int:
        self._write()
        os.fsync(self._file.fileno())
        return self.size()

    def close(self) -> None:
        self.append([])
        self._file.close()


class JsonRecords:
    """metrics.jsonl and rollouts.jsonl of a run, the only records that a checkpoint can cut back."""

    def __init__(self, run_dir: Path):
        self._files = {name: JsonLines(run_dir / name) for name in (METRICS, ROLLOUTS)}

    def scalars(self, step: int, phase: str, row: Mapping[str, Any]) -> None:
        self._files[METRICS].append([{"step": step, **row}])

    def rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """One line per row, floats to 9 digits, from which a float32 is read back to the bit."""
        self._files[ROLLOUTS].append([{"step": step, **jsonable(row, digits=9)} for row in rows])

    def offsets(self) -> dict[str, int]:
        return {name: file.sync() for name, file in self._files.items()}

    def truncate(self, offsets: Mapping[str, int]) -> list[str]:
        """Cut the files to `offsets`; messages about those that are shorter."""
        missing = []
        for name in self._files.keys() & offsets.keys():
            if (size := self._files[name].size()) < offsets[name]:
                missing.append(f"{name}: got {size} bytes, want the checkpoint's {offsets[name]}; rows are missing")
            self._files[name].truncate(offsets[name])
        return missing

    def close(self, failed: bool) -> None:
        for file in self._files.values():
            with suppress(OSError):
                file.close()

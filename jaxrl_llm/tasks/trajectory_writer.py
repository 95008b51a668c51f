"""Writer of trajectory files: .jsonl, one object per line, or .parquet. Rows have the columns of `trajectories.COLUMNS`."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from jaxrl_llm.errors import UserError, describe_os_error
from jaxrl_llm.tasks.trajectories import COLUMNS

SIGNIFICANT = 9
"""Decimal digits from which every float32 is read back to the bit."""
Write = Callable[[Sequence[Mapping[str, Any]]], None]


def check_target(path: Path, name: str = "path") -> None:
    """Raise UserError if no trajectory file can be written there: another suffix, or a file that exists.

    Args:
        path: of the file to write.
        name: of the option that gives it.
    """
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"{name}: got {path}, want a file that ends in .jsonl or .parquet")
    if path.exists():
        raise UserError(f"{name}: got {path}, which exists, want a new file")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise UserError(f"{name}: {path}: .parquet needs pyarrow: pip install 'jaxrl-llm[data]'") from None


@contextmanager
def writing(path: Path) -> Iterator[Write]:
    """Yield a function that writes rows. The file appears when the body has ended, whole; if it raises, there is none.

    Raises:
        UserError: the file cannot be written, or the disk is full.
    """
    check_target(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            yield from (_jsonl if path.suffix == ".jsonl" else _parquet)(file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            raise UserError(f"{path}: got a file that was written meanwhile, want none there")
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{describe_os_error(error, path)}; nothing was written") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _jsonl(file: IO[bytes]) -> Iterator[Write]:
    def write(rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            plain = {name: _plain(row[name]) for name in COLUMNS if name in row}
            # ASCII escapes: no line separator in a text can split a row.
            file.write(json.dumps(plain, allow_nan=False).encode("ascii") + b"\n")

    yield write


def _plain(value: Any) -> Any:
    """The value in the types of JSON; null for numbers that it does not have."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return {name: _plain(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return float(f"{value:.{SIGNIFICANT}g}") if math.isfinite(value) else None


def _parquet(file: IO[bytes]) -> Iterator[Write]:
    import pyarrow
    import pyarrow.parquet

    plain = {"text": pyarrow.string(), "int": pyarrow.int64(), "float": pyarrow.float32(), "bool": pyarrow.bool_()}
    lists = {f"{name}s": pyarrow.list_({"int": pyarrow.int32()}.get(name, plain[name])) for name in plain}
    types = plain | lists | {"lists of ints": pyarrow.list_(lists["ints"])}
    writer = None

    def write(rows: Sequence[Mapping[str, Any]]) -> None:
        nonlocal writer
        if writer is None:
            graders = list(dict.fromkeys(name for row in rows for name in row.get("components", ())))
            types["floats by name"] = pyarrow.struct([(name, pyarrow.float32()) for name in graders])
            there = [name for name in COLUMNS if name != "components" or graders]
            writer = pyarrow.parquet.ParquetWriter(
                file, pyarrow.schema([(name, types[COLUMNS[name]]) for name in there])
            )
        per_token = [{**row, "version": np.broadcast_to(row["version"], len(row["ids"])).tolist()} for row in rows]
        writer.write_table(pyarrow.Table.from_pylist(per_token, writer.schema))

    yield write
    if writer is None:
        write([])
    writer.close()

"""Cache of automata on this machine: `$XDG_CACHE_HOME/jaxrl_llm/controls`, or under `~/.cache`.

One file per control, tokenizer and version of the code. A file that cannot be read is made again, and a directory that cannot be
written is no error.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

from jaxrl_llm.control.automaton import TokenAutomaton
from jaxrl_llm.control.config import Control, JsonSchemaControl

MAX_BYTES = 256 << 20


def cached(control: Control, fingerprint: str, make: Callable[[], TokenAutomaton]) -> TokenAutomaton:
    """Return the automaton of a control over the vocabulary of this fingerprint; if it is not there, make it and keep it."""
    try:
        path = _directory() / f"{_key(control, fingerprint)}.npz"
    except (OSError, RuntimeError):  # a file of the control cannot be read, which `make` reports; or there is no home
        return make()
    found = _load(path)
    if found is None:
        found = make()
        with contextlib.suppress(OSError):
            _save(found, path)
            _remove_oldest(path.parent)
    return found


def _directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxrl_llm" / "controls"


def _key(control: Control, fingerprint: str) -> str:
    """Hash of all that the automaton depends on. Raises OSError for a schema file that cannot be read."""
    code = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    known = json.dumps([dataclasses.asdict(control), fingerprint, version("outlines-core")], default=repr)
    parts = [known.encode(), *_files(control), *code]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def _files(control: Control) -> list[bytes]:
    if isinstance(control, JsonSchemaControl):
        return [Path(control.path).expanduser().read_bytes()] if control.path else []
    then = getattr(control, "then", None)
    return _files(then) if then else []


def _load(path: Path) -> TokenAutomaton | None:
    try:
        with np.load(path, allow_pickle=False) as found:
            fields = {field.name: found[field.name] for field in dataclasses.fields(TokenAutomaton)}
            automaton = TokenAutomaton(**(fields | {"start": int(fields["start"])}))
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # used last
    return automaton


def _save(automaton: TokenAutomaton, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **{field.name: getattr(automaton, field.name) for field in dataclasses.fields(automaton)})
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def _remove_oldest(directory: Path) -> None:
    """Keep the files that were used last, up to MAX_BYTES."""
    files = sorted(
        ((entry.stat(), entry.path) for entry in os.scandir(directory)), key=lambda found: -found[0].st_mtime
    )
    kept = 0
    for stat, path in files:
        kept += stat.st_size
        if kept > MAX_BYTES:
            os.unlink(path)

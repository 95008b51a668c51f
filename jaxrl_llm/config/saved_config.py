"""config.yaml of a run directory: the config of the run in it, against which the config of a resumption is compared."""

import logging
import os
from pathlib import Path
from typing import Any

import yaml

from jaxrl_llm.checkpoint.run_directory import write_atomically
from jaxrl_llm.config.loading import load
from jaxrl_llm.config.run_config import MAY_CHANGE, RunConfig, to_dict, with_absolute_paths
from jaxrl_llm.errors import UserError
from jaxrl_llm.metrics.recorder import RECORDS

log = logging.getLogger("jaxrl_llm.config.saved_config")


def to_yaml(cfg: RunConfig) -> str:
    return yaml.safe_dump(to_dict(cfg), sort_keys=False)


def save_config(run_dir: Path, cfg: RunConfig, is_new: bool) -> None:
    """Write config.yaml, unless the directory holds another run.

    Args:
        is_new: the directory holds no checkpoint. An earlier run in it cannot be resumed, and its records are moved out of the way.

    Raises:
        UserError: the directory holds a run whose config differs in a key that is not in `MAY_CHANGE`.
    """
    path, text = run_dir / "config.yaml", to_yaml(with_absolute_paths(cfg)).encode()
    before = path.read_bytes() if path.exists() else b""
    # A power failure may leave zeros.
    is_blank = not before.strip(b"\0\r\n\t ")
    if is_new:
        move_old_records(run_dir, warn=not is_blank and before != text)
    elif is_blank:
        got = "an empty file" if path.exists() else "none"
        log.warning("%s: got %s, so it is written from the config of this command", path, got)
    elif before != text and (differing := differences(path, cfg)):
        listed = "\n  ".join(differing)
        raise UserError(
            f"{run_dir}: holds a run with another config; use another run_dir, or undo these changes:\n  {listed}"
        )
    if before != text:
        write_atomically(path, text)


def differences(path: Path, cfg: RunConfig) -> list[str]:
    """Changes between the config.yaml at `path` and `cfg`; two spellings of one path are equal."""
    try:
        saved = load(path)
    except UserError as error:
        remedy = f"correct {path}; or remove it, and start with the run's own CONFIG, which writes it again"
        raise UserError(f"{error}\n{remedy}") from None
    before, now = (to_dict(with_absolute_paths(c, os.path.realpath)) for c in (saved, cfg))
    return changes(before, now)


def changes(before: dict[str, Any], now: dict[str, Any], path: str = "") -> list[str]:
    """`name: before -> now` for each value that differs and is not in `MAY_CHANGE`."""
    found = []
    for name in sorted(before.keys() | now.keys()):
        full_name, old, new = f"{path}{name}", before.get(name), now.get(name)
        if full_name in MAY_CHANGE or old == new:
            continue
        old, new = _by_index(old), _by_index(new)
        if isinstance(old, dict) and isinstance(new, dict):
            found += changes(old, new, f"{full_name}.")
        else:
            found.append(f"{full_name}: {old!r} -> {new!r}")
    return found


def _by_index(value: Any) -> Any:
    """Return a list of sections as a mapping; anything else as it is."""
    is_list = isinstance(value, list | tuple) and bool(value) and all(isinstance(part, dict) for part in value)
    return {str(i): part for i, part in enumerate(value)} if is_list else value


def move_old_records(run_dir: Path, warn: bool) -> None:
    """Rename the metrics and rollouts of a run that ended before its first checkpoint. `warn` even if there are none."""
    records = [path for path in (run_dir / name for name in RECORDS) if path.exists() and path.stat().st_size]
    for path in records:
        os.replace(path, path.with_name(f"{path.name}.before"))
    if warn or records:
        names = ", ".join(f"{path.name}.before" for path in records)
        kept = names and f"; earlier records are kept as {names}"
        log.warning("%s: holds no checkpoint, so this run starts at step 0%s", run_dir, kept)

"""Whose a run directory is: the run's that is in it, or free for another."""

import logging
import os
from pathlib import Path

from jaxrl_llm.checkpoint.run_directory import write_atomically
from jaxrl_llm.config import run_config
from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.errors import UserError
from jaxrl_llm.metrics.recorder import METRICS, ROLLOUTS

log = logging.getLogger("jaxrl_llm.config.saved")


def claim(run_dir: Path, cfg: RunConfig, is_new: bool) -> None:
    """Write config.yaml. A run with checkpoints may differ from it in what may change and in nothing else; one without them
    (`is_new`) is over, and its records are moved aside. Raises UserError if the directory holds another run."""
    path, text = run_dir / "config.yaml", run_config.dump(run_config.with_places(cfg)).encode()
    before = path.read_bytes() if path.exists() else b""
    # Power that fails may leave zeros.
    is_blank = not before.strip(b"\0\r\n\t ")
    if is_new:
        start_anew(run_dir, told=not is_blank and before != text)
    elif is_blank:
        got = "an empty file" if path.exists() else "none"
        log.warning("%s: got %s, so it is written anew as this command has it", path, got)
    elif before != text and (differing := differences(path, cfg)):
        listed = "\n  ".join(differing)
        raise UserError(
            f"{run_dir}: holds a run with another config; use another run_dir, or undo these changes:\n  {listed}"
        )
    if before != text:
        write_atomically(path, text)


def differences(path: Path, cfg: RunConfig) -> list[str]:
    """Between a run's config.yaml and what is now to run in its directory; two paths to one place are equal."""
    try:
        saved = run_config.load(path)
    except UserError as error:
        remedy = f"put {path} right; or remove it, and start with the run's own CONFIG, which writes it anew"
        raise UserError(f"{error}\n{remedy}") from None
    was, now = (run_config.to_dict(run_config.with_places(cfg, os.path.realpath)) for cfg in (saved, cfg))
    return run_config.changes(was, now)


def start_anew(run_dir: Path, told: bool) -> None:
    """Put aside what a run has recorded that ended before its first checkpoint."""
    records = [path for path in (run_dir / METRICS, run_dir / ROLLOUTS) if path.exists() and path.stat().st_size]
    for path in records:
        os.replace(path, path.with_name(f"{path.name}.before"))
    if told or records:
        names = ", ".join(f"{path.name}.before" for path in records)
        kept = names and f"; what the run before recorded is kept as {names}"
        log.warning("%s: holds no checkpoint, so this run begins anew%s", run_dir, kept)

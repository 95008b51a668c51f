"""Whose a run directory is: the run's that is in it, or free for another."""

import logging
import os
from pathlib import Path

from jaxrl_llm import config as run_config
from jaxrl_llm.checkpoint import Checkpoints
from jaxrl_llm.config import RunConfig
from jaxrl_llm.errors import UserError
from jaxrl_llm.metrics import METRICS, ROLLOUTS
from jaxrl_llm.run_directory import write_whole

log = logging.getLogger("jaxrl_llm.claim")


def claim(run_dir: Path, cfg: RunConfig, checkpoints: Checkpoints) -> None:
    """Write config.yaml. Of a run with checkpoints only what may change may differ from it; one without is over, and its
    records are put aside. Raises UserError where another run is in the directory."""
    path, text = run_dir / "config.yaml", run_config.dump(run_config.with_places(cfg)).encode()
    before = path.read_bytes() if path.exists() else b""
    if before == text and not checkpoints.is_empty():
        return
    if checkpoints.is_empty():
        start_anew(run_dir, told=before.strip() and before != text)
    elif before.strip():
        if differing := differences(path, cfg):
            listed = "\n  ".join(differing)
            raise UserError(
                f"{run_dir}: holds a run with another config; use another run_dir, or undo these changes:\n  {listed}"
            )
    else:
        log.warning(
            "%s: got %s, so it is written anew as this command has it",
            path,
            "an empty file" if path.exists() else "none",
        )
    write_whole(path, text)


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
    aside = [
        run_dir / name for name in (METRICS, ROLLOUTS) if (run_dir / name).exists() and (run_dir / name).stat().st_size
    ]
    for path in aside:
        os.replace(path, path.with_name(f"{path.name}.before"))
    if told or aside:
        kept = (
            f"; what the run before recorded is kept as {', '.join(f'{path.name}.before' for path in aside)}"
            if aside
            else ""
        )
        log.warning("%s: holds no checkpoint, so this run begins anew%s", run_dir, kept)

"""Everything a resume needs, as one tree: saved while training goes on, verified when it comes back, laid out for any mesh.

A step is a directory of Orbax with two items: `state`, the leaves by their path, and `meta`, a JSON text with the shape, dtype
and fingerprint of each leaf and a checksum of itself. What is on disk decides, never a list in memory: Orbax lists half-deleted
steps, forgets good ones after a failed save, casts dtypes, and reads flipped bits without a word.
"""

import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from jaxrl_llm.checkpoint.fingerprint import by_path, digests
from jaxrl_llm.checkpoint.manifest import SHOWN_PATHS, must_be_ours, must_fit, read_manifest, sealed, shapes
from jaxrl_llm.checkpoint.run_directory import sync
from jaxrl_llm.checkpoint.storage_errors import is_blocked, reason
from jaxrl_llm.errors import CheckpointError
from jaxrl_llm.parallel import hosts
from jaxrl_llm.types import PyTree

MAX_FAILURES = 3
# Seconds between the tries of a read that the storage refuses.
PAUSES = (0.2, 1.0, 4.0)
# Seconds until a save counts as failed: what Orbax itself gives the processes of a job to meet.
SAVE_DEADLINE = 1200
logger = logging.getLogger("jaxrl_llm.checkpoint.store")
# Orbax reports each of its steps, and a failed save twice with its traceback. What matters reaches this file as an exception.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)
# When one of a step's readers or writers fails, Orbax leaves the others: what they say afterwards is no news.
logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())


def _keep_quiet(unraisable: Any, told_before: Callable[[Any], None] = sys.unraisablehook) -> None:
    code = getattr(unraisable.object, "cr_code", None)
    is_orbax = code is not None and f"{os.sep}orbax{os.sep}" in code.co_filename
    if not is_orbax and str(unraisable.exc_value) != "Event loop is closed":
        told_before(unraisable)


sys.unraisablehook = _keep_quiet


@dataclass(frozen=True)
class Restored:
    """One step as it was saved; `tree` has the target's structure and shardings, `meta` is what `save` was given."""

    step: int
    tree: PyTree
    meta: dict[str, Any]


class _WrongError(Exception):
    """A step was read, and is not what was written; known to every process of the job."""


class Checkpoints:
    """The checkpoints below `directory`, of which the newest `keep` stay. Every process of a job calls every method, in one order.

    `<directory>/<step>` are the steps; moved aside, never deleted, are `corrupt-<step>`, which was read and is wrong, and
    `condemned-<step>`, which a guard has condemned. Reading changes nothing in a directory whose steps are good.
    """

    def __init__(self, directory: Path, keep: int = 3):
        self.directory, self._keep, self._failures = Path(directory).absolute(), keep, 0
        self._manager: ocp.CheckpointManager | None = None
        self._pending: int | None = None
        self._prunes, self._size = True, 0

    def steps(self) -> list[int]:
        """Steps on disk, oldest first."""
        return sorted(int(name) for name in self._names() if name.isdecimal() and name == str(int(name)))

    def has(self, step: int) -> bool:
        """Whether it is on disk, as the first process sees it."""
        return hosts.all_agree(jax.process_index() > 0 or step in self.steps())

    def is_empty(self) -> bool:
        """No step was ever saved, or all were condemned."""
        return not self.steps() and not any(name.startswith("corrupt-") for name in self._names())

    def save(self, step: int, tree: PyTree, meta: dict[str, Any], prune: bool = True) -> None:
        """Start to save the values of this moment; the caller may donate or overwrite them at once. `meta` must fit into JSON.

        Waits for the save before, if that still runs. A save that fails is warned about and tried again when the next one is
        due; the third failure in a row raises CheckpointError, and so does a step that is not newer than those on disk. A tree
        whose numbers on devices are not all finite raises NonFiniteError and is not saved. `prune=False`: no older step goes.
        """
        if failure := self._finish():
            self.give_up(*failure)
        leaves = by_path(tree)
        # On CPU Orbax writes from the very memory of the arrays; JAX does not donate memory that is viewed in this way, and
        # on an accelerator the copy to the host is over when save returns. Empty arrays it refuses: their shape says it all.
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave({path: x for path, x in leaves.items() if x.size}),
            meta=ocp.args.JsonSave(sealed(step, leaves, meta)),
        )
        self._prunes, self._size = prune, sum(x.nbytes for x in leaves.values())
        try:
            self._manager = self._manager or self._open()
            saved = self._manager.save(step, args=arguments)
        except Exception as error:
            self.give_up(step, error)
            return
        if not saved:
            raise CheckpointError(f"{self.directory}: got step {step} to save, want one newer than {self.steps()}")
        self._pending = step

    def poll(self) -> None:
        """Take note of a save that has ended, without waiting for one that has not. Call it every step.

        A failure is logged as a warning; the third in a row, or any in a job of several processes (whose others would wait
        for this one), raises CheckpointError.
        """
        if self._manager is None and self._failures:
            # A step later, as Orbax gives up at the first writer that fails while the others still write.
            self._clean()
        elif self._pending is not None and not self._manager.is_saving_in_progress() and (failure := self._finish()):
            self.give_up(*failure)

    def wait(self) -> None:
        """Return when the last save is on disk. Raises CheckpointError if it failed."""
        if failure := self._finish():
            self._drop_manager()
            step, error = failure
            raise CheckpointError(self._not_saved(step, error)) from error

    def close(self) -> None:
        """Like `wait`, then free what Orbax holds."""
        try:
            self.wait()
        finally:
            self._drop_manager()

    def give_up(self, step: int, error: Exception) -> None:
        """Count a save that failed, or could not begin; see `save`."""
        if failure := self._finish():
            self.give_up(*failure)
        self._failures += 1
        # Orbax forgets good steps when a save fails; the next manager reads them from disk.
        self._drop_manager()
        message = self._not_saved(step, error)
        if self._failures >= MAX_FAILURES or jax.process_count() > 1:
            remedy = (
                f"{self._failures} failed in a row; remove the cause and start again: steps {self.steps()} are kept"
            )
            raise CheckpointError(f"{message}; {remedy}") from error
        logger.warning("%s; trying again when the next one is due (%d of %d)", message, self._failures, MAX_FAILURES)

    def condemn(self, since: int) -> list[Path]:
        """Move the steps from `since` on aside, so that the next start goes on from the one before them. Returns where to."""
        self.wait()
        self._drop_manager()
        return [self._move(step, "condemned") for step in _agreed(self.directory, self.steps) if step >= since]

    def restore(self, target: Callable[[dict[str, Any]], PyTree], owned: bool = True) -> Restored | None:
        """The newest step of which every leaf has the fingerprint it was saved with; None where no step was ever saved.

        `target(meta)` has the wanted structure: a ShapeDtypeStruct with a sharding (of any mesh) for each leaf on devices, a NumPy
        array of the right shape and dtype for each on the host. Raises UserError if a step holds other paths, shapes or dtypes. One
        that was read and is wrong is moved to `corrupt-<step>` with a warning, and the one before is tried; when none is left,
        CheckpointError, never a fresh start. A read that the storage refuses is tried again, then told as a CheckpointError;
        nothing is moved then.

        `owned=False`, for who does not hold the run's lock: nothing is moved, and what the target leaves out is not read.
        """
        self.wait()
        # Orbax refuses steps below the newest it remembers: the next save reads the directory anew.
        self._drop_manager()
        passed = set()
        # Listed anew each time: while one was read, a run that goes on may have deleted it and saved newer ones.
        while left := [step for step in _agreed(self.directory, self.steps) if step not in passed]:
            try:
                return self._read(left[-1], target, owned)
            except _WrongError as error:
                passed.add(left[-1])
                self._set_aside(left[-1], left[-2] if left[1:] else None, str(error), owned)
        if passed or not self.is_empty():
            problem = f"{self.directory}: no checkpoint can be read{' (see corrupt-*)' if owned else ''}"
            raise CheckpointError(f"{problem}; put a good copy back, or give another run_dir to start anew")
        return None

    def _read(self, step: int, target_of: Callable[[dict[str, Any]], PyTree], whole: bool) -> Restored:
        directory = epath.Path(self.directory / str(step))
        manifest = _agreed(directory, lambda: read_manifest(directory))
        must_be_ours(directory, manifest)
        target = target_of(manifest["meta"])
        wanted = {path: _placed(x) for path, x in by_path(target).items()}
        saved = {path: x for path, x in manifest["leaves"].items() if whole or path in wanted}
        must_fit(directory, {path: x[0] for path, x in saved.items()}, shapes(wanted))
        # Not through the manager: its barriers would hang the processes that could read when one could not.
        filled = {path: x for path, x in wanted.items() if x.size}
        args = ocp.args.PyTreeRestore(
            filled, restore_args=ocp.checkpoint_utils.construct_restore_args(filled), partial_restore=not whole
        )
        leaves = _agreed(directory, lambda: ocp.PyTreeCheckpointHandler().restore(directory / "state", args=args))
        leaves |= {path: _empty(x) for path, x in wanted.items() if not x.size}
        found = digests(leaves)
        changed = [path for path in wanted if found[path].fingerprint != saved[path][1]]
        if not hosts.all_agree(not changed):
            raise _WrongError(f"not the bits that were saved: {changed[:SHOWN_PATHS]}, {len(changed)} in all")
        tree = jax.tree.unflatten(jax.tree.structure(target), [leaves[path] for path in wanted])
        return Restored(step, tree, manifest["meta"])

    def refuse_other_formats(self) -> None:
        """Raises UserError where the newest step was written by another version of this program. Reads no array."""
        for step in self.steps()[-1:]:
            directory = epath.Path(self.directory / str(step))
            try:
                manifest = read_manifest(directory)
            except Exception:
                # In whatever way it is broken, `restore` tells, and takes the one before.
                return
            must_be_ours(directory, manifest)

    def _set_aside(self, step: int, older: int | None, why: str, moves: bool) -> None:
        using = "no older step is left" if older is None else f"using step {older}"
        place = f"moved to {self._move(step, 'corrupt')}" if moves else "it is left where it is"
        logger.warning("step %d unreadable (%s), %s; %s", step, why, using, place)

    def _move(self, step: int, verdict: str) -> Path:
        moved = self.directory / f"{verdict}-{step}"
        if verdict == "condemned" and jax.process_index() == 0:
            # A run that is started again and blows up again would fill the disk.
            shutil.rmtree(moved, ignore_errors=True)
        while moved.exists():
            moved = moved.with_name(f"{moved.name}-again")
        try:
            if jax.process_index() == 0 and (self.directory / str(step)).is_dir():
                (self.directory / str(step)).rename(moved)
        except OSError as error:
            raise CheckpointError(
                f"{self.directory / str(step)}: cannot be moved to {moved}: {error.strerror}"
            ) from error
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"checkpoint {step} was moved")
        return moved

    def _names(self) -> list[str]:
        """Of the directories below. Raises OSError where they cannot be listed: none found would be a run that starts anew."""
        try:
            with os.scandir(self.directory) as entries:
                return [entry.name for entry in entries if entry.is_dir()]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _open(self) -> ocp.CheckpointManager:
        self._clean()
        options = ocp.CheckpointManagerOptions(
            # Old steps are `_prune`'s. Orbax deletes them before it looks whether the new one failed, if its error was taken.
            max_to_keep=None,
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(timeout_secs=SAVE_DEADLINE),
        )
        return ocp.CheckpointManager(self.directory, options=options)

    def _drop_manager(self) -> None:
        manager, self._manager, self._pending = self._manager, None, None
        # Its errors were noted when they happened. One that still saves, after its deadline, would be waited for without end.
        with suppress(Exception):
            if manager is not None and not manager.is_saving_in_progress():
                manager.close()

    def _finish(self) -> tuple[int, Exception] | None:
        """Wait for the save under way; the step and the error if it failed."""
        if self._pending is None:
            return None
        deadline = time.monotonic() + SAVE_DEADLINE
        while self._manager.is_saving_in_progress() and time.monotonic() < deadline:
            time.sleep(0.005)
        step, self._pending = self._pending, None
        if self._manager.is_saving_in_progress():
            return step, TimeoutError(f"the storage has not taken it in {SAVE_DEADLINE} s")
        try:
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                _sync_to_disk(self.directory / str(step))
            self._prune()
            self._clean()
        except Exception as error:
            return step, error
        self._failures = 0
        return None

    def _not_saved(self, step: int, error: Exception) -> str:
        return f"{self.directory}: step {step} was not saved: {reason(error, self.directory, self._size)}"

    def _prune(self) -> None:
        """Renamed, then deleted: killed in between, half a step would be taken for a whole one."""
        for step in self.steps()[: -self._keep] if self._prunes and jax.process_index() == 0 else []:
            (self.directory / "trash").mkdir(exist_ok=True)
            (self.directory / str(step)).rename(self.directory / "trash" / str(step))

    def _clean(self) -> None:
        """Delete what was given up: the trash, and what failed saves have left. Only while no save is under way."""
        given_up = [*self.directory.glob("trash"), *self.directory.glob("*.orbax-checkpoint-tmp*")]
        for path in given_up if jax.process_index() == 0 else []:
            shutil.rmtree(path, ignore_errors=True)


def _agreed(directory: Path, read: Callable[[], Any]) -> Any:
    """What `read` gives on every process of the job.

    All try again together while the storage refuses any of them, and CheckpointError ends that; _WrongError where what was read is
    wrong, and so once more.
    """
    pauses, wrong = list(PAUSES), 0
    while True:
        value, failed, blocked = None, "", False
        try:
            value = read()
        except (MemoryError, jax.errors.JaxRuntimeError):
            # A machine too small: no reason to move good steps away.
            raise
        except Exception as error:
            failed, blocked = reason(error), is_blocked(error, Path(directory))
        if hosts.all_agree(not failed):
            return value
        failed = failed or "on another process"
        if hosts.all_agree(not blocked):
            wrong += 1
            if wrong == 2:
                raise _WrongError(failed)
        elif pauses:
            logger.info("%s: cannot be read now (%s); trying again", directory, failed)
            time.sleep(pauses.pop(0))
        else:
            raise CheckpointError(
                f"{directory}: the storage does not give it, after {len(PAUSES) + 1} tries ({failed}); nothing was moved: "
                "see to the storage, then start the same command again"
            )


def _placed(x: Any) -> Any:
    """A leaf of the target as Orbax wants it."""
    if isinstance(x, np.ndarray):
        return x
    sharding = x.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _empty(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return np.empty(x.shape, x.dtype)
    return jax.make_array_from_callback(x.shape, x.sharding, lambda _: np.empty(x.shape, x.dtype))


def _sync_to_disk(step: Path) -> None:
    """Orbax syncs the data, neither its JSON nor the directories; raises FileNotFoundError where the step is not there."""
    step.stat()
    for path in [*step.rglob("*"), step, step.parent]:
        sync(path)

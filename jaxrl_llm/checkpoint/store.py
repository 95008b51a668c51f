"""Checkpoints: the state of a run as one tree, saved while training continues, verified when restored, onto any mesh.

A step is an Orbax directory with two items: `state`, the leaves by path, and `meta`, a JSON text with the shape, dtype and
fingerprint of each leaf and a checksum of itself. The steps are listed from disk, never from memory: Orbax lists half-deleted
steps, forgets good ones after a failed save, casts dtypes, and reads flipped bits without an error.
"""

import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from jaxrl_llm.checkpoint.blobs import Blob, Blobs
from jaxrl_llm.checkpoint.fingerprint import by_path, digests
from jaxrl_llm.checkpoint.manifest import SHOWN_PATHS, check_format, check_shapes, make_manifest, read_manifest, shapes
from jaxrl_llm.checkpoint.run_directory import sync
from jaxrl_llm.checkpoint.storage_errors import is_blocked, reason
from jaxrl_llm.errors import CheckpointError
from jaxrl_llm.parallel import hosts
from jaxrl_llm.types import PyTree

MAX_FAILURES = 3
NO_BLOBS: Mapping[str, Blob] = MappingProxyType({})
# Seconds between tries of a read that the storage refuses.
PAUSES = (0.2, 1.0, 4.0)
# Seconds until a save counts as failed: Orbax's own limit for the processes of a job to meet.
SAVE_DEADLINE = 1200
logger = logging.getLogger("jaxrl_llm.checkpoint.store")
# Orbax logs each of its steps, and a failed save twice with its traceback. Errors reach this file as exceptions.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)
# When one of a step's readers or writers fails, Orbax abandons the others, whose later errors mean nothing.
logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())


def _without_orbax(unraisable: Any, report: Callable[[Any], None] = sys.unraisablehook) -> None:
    code = getattr(unraisable.object, "cr_code", None)
    is_orbax = code is not None and f"{os.sep}orbax{os.sep}" in code.co_filename
    if not is_orbax and str(unraisable.exc_value) != "Event loop is closed":
        report(unraisable)


sys.unraisablehook = _without_orbax


@dataclass(frozen=True)
class Restored:
    """A restored step; `tree` has the structure and shardings of the target, `meta` is the argument of `save`."""

    step: int
    tree: PyTree
    meta: dict[str, Any]
    blobs: dict[str, Blob]


class _WrongError(Exception):
    """A step was read and is corrupt; raised on every process of the job."""


class Checkpoints:
    """Checkpoints in `directory`, of which the newest `keep` stay. All processes of a job call all methods, in the same order.

    `<directory>/<step>` are the steps. `corrupt-<step>`, which was read and is wrong, and `condemned-<step>`, which followed a
    blow-up, are renamed and never deleted. Reading changes nothing in a directory with good steps.
    """

    def __init__(self, directory: Path, keep: int = 3):
        self.directory, self._keep, self._failures = Path(directory).absolute(), keep, 0
        self._manager: ocp.CheckpointManager | None = None
        self._pending: int | None = None
        self._prunes, self._size = True, 0
        self._blobs = Blobs(self.directory / "blobs")

    def steps(self) -> list[int]:
        """Steps on disk, oldest first."""
        return sorted(int(name) for name in self._names() if name.isdecimal() and name == str(int(name)))

    def has(self, step: int) -> bool:
        """True if the step is on disk, as the first process sees it."""
        return hosts.all_agree(jax.process_index() > 0 or step in self.steps())

    def is_empty(self) -> bool:
        """True if no step was ever saved, or all were condemned."""
        return not self.steps() and not any(name.startswith("corrupt-") for name in self._names())

    def save(
        self, step: int, tree: PyTree, meta: dict[str, Any], prune: bool = True, blobs: Mapping[str, Blob] = NO_BLOBS
    ) -> None:
        """Start saving a tree, whose arrays the caller may donate or overwrite at once. Waits for the previous save.

        Args:
            step: newer than those on disk.
            tree: of jax and NumPy arrays.
            meta: stored beside it, as JSON.
            prune: delete the steps that are too many.
            blobs: arrays that never change, by name. What an earlier step holds is not written again.

        Raises:
            CheckpointError: the third consecutive save failed, or `step` is not new. Earlier failures are logged as warnings, and
                saving is tried again when the next save is due.
            NonFiniteError: an array on devices is not finite; it is not saved.
        """
        if failure := self._finish():
            self.give_up(*failure)
        leaves, places = by_path(tree), self._blobs.save(step, blobs)
        # On CPU Orbax writes from the memory of the arrays, and JAX does not donate memory that is viewed like this; on an
        # accelerator the copy to the host is done when `save` returns. Orbax refuses empty arrays: their shape is enough.
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave({path: x for path, x in leaves.items() if x.size}),
            meta=ocp.args.JsonSave(make_manifest(step, leaves, meta, places)),
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
        """Check whether a save has ended, without waiting. To be called every step.

        A failure is logged as a warning; the third consecutive one, or any in a job of several processes (where the others would
        wait for this one), raises CheckpointError.
        """
        if self._manager is None and self._failures:
            # One step later, because Orbax gives up at the first failed writer while the others still write.
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
        """Wait, then free what Orbax holds."""
        try:
            self.wait()
        finally:
            self._drop_manager()

    def give_up(self, step: int, error: Exception) -> None:
        """Count a save that failed or could not begin; see `save`."""
        if failure := self._finish():
            self.give_up(*failure)
        self._failures += 1
        # Orbax forgets good steps when a save fails; a new manager reads them from disk.
        self._drop_manager()
        message = self._not_saved(step, error)
        if self._failures >= MAX_FAILURES or jax.process_count() > 1:
            remedy = f"{self._failures} consecutive saves failed; remove the cause and start again: steps {self.steps()} are kept"
            raise CheckpointError(f"{message}; {remedy}") from error
        logger.warning("%s; trying again when the next save is due (%d of %d)", message, self._failures, MAX_FAILURES)

    def condemn(self, since: int) -> list[Path]:
        """Rename the steps from `since` on, so that the next start resumes from the one before them. Returns the new paths."""
        self.wait()
        self._drop_manager()
        return [self._rename(step, "condemned") for step in _agreed(self.directory, self.steps) if step >= since]

    def restore(self, target: Callable[[dict[str, Any]], PyTree], owned: bool = True) -> Restored | None:
        """Restore the newest step whose leaves all have the fingerprints they were saved with; None if no step was ever saved.

        A corrupt step is renamed to `corrupt-<step>` with a warning, and the one before it is tried.

        Args:
            target: meta -> tree of the wanted structure: a ShapeDtypeStruct with a sharding (of any mesh) per leaf on devices, a
                NumPy array of the right shape and dtype per leaf on the host.
            owned: the caller holds the run's lock. If not, nothing is renamed, and leaves that the target lacks are not read.

        Raises:
            UserError: the step holds other paths, shapes or dtypes.
            CheckpointError: no good step is left, or the storage refuses to be read after several tries (nothing is renamed then).
        """
        self.wait()
        # Orbax refuses steps below the newest it remembers: the next save reads the directory again.
        self._drop_manager()
        passed = set()
        # Listed again each time: a running process may have deleted the step while it was read, and saved newer ones.
        while left := [step for step in _agreed(self.directory, self.steps) if step not in passed]:
            try:
                return self._read(left[-1], target, owned)
            except _WrongError as error:
                passed.add(left[-1])
                self._pass_over(left[-1], left[-2] if left[1:] else None, str(error), owned)
        if passed or not self.is_empty():
            problem = f"{self.directory}: no checkpoint can be read{' (see corrupt-*)' if owned else ''}"
            raise CheckpointError(f"{problem}; put a good copy back, or give another run_dir to start again")
        return None

    def _read(self, step: int, target_of: Callable[[dict[str, Any]], PyTree], all_leaves: bool) -> Restored:
        directory = epath.Path(self.directory / str(step))
        manifest = _agreed(directory, lambda: read_manifest(directory))
        check_format(directory, manifest)
        target = target_of(manifest["meta"])
        wanted = {path: _placed(x) for path, x in by_path(target).items()}
        saved = {path: x for path, x in manifest["leaves"].items() if all_leaves or path in wanted}
        check_shapes(directory, {path: x[0] for path, x in saved.items()}, shapes(wanted))
        # Not through the manager: if one process could not read, its barriers would hang the others.
        filled = {path: x for path, x in wanted.items() if x.size}
        args = ocp.args.PyTreeRestore(
            filled, restore_args=ocp.checkpoint_utils.construct_restore_args(filled), partial_restore=not all_leaves
        )
        leaves = _agreed(directory, lambda: ocp.PyTreeCheckpointHandler().restore(directory / "state", args=args))
        leaves |= {path: _empty(x) for path, x in wanted.items() if not x.size}
        found = digests(leaves)
        changed = [path for path in wanted if found[path].fingerprint != saved[path][1]]
        if not hosts.all_agree(not changed):
            raise _WrongError(f"not the bits that were saved: {changed[:SHOWN_PATHS]}, {len(changed)} in all")
        blobs = _agreed(directory, lambda: self._blobs.read(manifest["blobs"])) if all_leaves else {}
        tree = jax.tree.unflatten(jax.tree.structure(target), [leaves[path] for path in wanted])
        return Restored(step, tree, manifest["meta"], blobs)

    def refuse_other_formats(self) -> None:
        """Raise UserError if another version of this program wrote the newest step. Reads no array."""
        for step in self.steps()[-1:]:
            directory = epath.Path(self.directory / str(step))
            try:
                manifest = read_manifest(directory)
            except Exception:
                # `restore` reports a broken step, and takes the one before it.
                return
            check_format(directory, manifest)

    def _pass_over(self, step: int, older: int | None, why: str, moves: bool) -> None:
        using = "no older step is left" if older is None else f"using step {older}"
        place = f"moved to {self._rename(step, 'corrupt')}" if moves else "it is left where it is"
        logger.warning("step %d unreadable (%s), %s; %s", step, why, using, place)

    def _rename(self, step: int, reason: str) -> Path:
        moved = self.directory / f"{reason}-{step}"
        if reason == "condemned" and jax.process_index() == 0:
            # A run that is restarted and blows up again would fill the disk.
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
        """Names of the subdirectories. Raises OSError if they cannot be listed: an empty list would start a new run."""
        try:
            with os.scandir(self.directory) as entries:
                return [entry.name for entry in entries if entry.is_dir()]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _open(self) -> ocp.CheckpointManager:
        self._clean()
        options = ocp.CheckpointManagerOptions(
            # `_prune` deletes old steps. Orbax would delete them before it checks whether the new one failed.
            max_to_keep=None,
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(timeout_secs=SAVE_DEADLINE),
        )
        return ocp.CheckpointManager(self.directory, options=options)

    def _drop_manager(self) -> None:
        manager, self._manager, self._pending = self._manager, None, None
        # Its errors were handled when they happened. Closing one that still saves, after its deadline, would wait for ever.
        with suppress(Exception):
            if manager is not None and not manager.is_saving_in_progress():
                manager.close()

    def _finish(self) -> tuple[int, Exception] | None:
        """Wait for the running save. Returns step and error if it failed."""
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
        """Rename old steps, to be deleted later: a process killed while deleting would leave half a step that looks whole."""
        for step in self.steps()[: -self._keep] if self._prunes and jax.process_index() == 0 else []:
            (self.directory / "trash").mkdir(exist_ok=True)
            (self.directory / str(step)).rename(self.directory / "trash" / str(step))

    def _clean(self) -> None:
        """Delete the trash and the remains of failed saves. Only while no save is running."""
        leftovers = [*self.directory.glob("trash"), *self.directory.glob("*.orbax-checkpoint-tmp*")]
        for path in leftovers if jax.process_index() == 0 else []:
            shutil.rmtree(path, ignore_errors=True)
        if jax.process_index() == 0:
            self._blobs.clean(self.directory / name for name in self._names())


def _agreed(directory: Path, read: Callable[[], Any]) -> Any:
    """Result of `read`, called on every process of the job until all succeed.

    Raises:
        CheckpointError: the storage refused one of them in every try.
        _WrongError: what was read is corrupt, in two tries.
    """
    pauses, wrong = list(PAUSES), 0
    while True:
        value, failed, blocked = None, "", False
        try:
            value = read()
        except (MemoryError, jax.errors.JaxRuntimeError):
            # A machine with too little memory is no reason to rename good steps.
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
                "repair the storage, then start the same command again"
            )


def _placed(x: Any) -> Any:
    """Leaf of the target in the form that Orbax takes."""
    if isinstance(x, np.ndarray):
        return x
    sharding = x.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _empty(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return np.empty(x.shape, x.dtype)
    return jax.make_array_from_callback(x.shape, x.sharding, lambda _: np.empty(x.shape, x.dtype))


def _sync_to_disk(step: Path) -> None:
    """Sync JSON files and directories, which Orbax does not. Raises FileNotFoundError if the step does not exist."""
    step.stat()
    for path in [*step.rglob("*"), step, step.parent]:
        sync(path)

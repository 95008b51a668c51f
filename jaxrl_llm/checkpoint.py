"""Everything a resume needs, as one tree: saved while training goes on, verified when it comes back, laid out for any mesh.

A step is a directory of Orbax with two items: `state`, the leaves by their path, and `meta`, a JSON text with the shape, dtype
and fingerprint of each leaf and a checksum of itself. What is on disk decides, never a list in memory: Orbax lists half-deleted
steps, forgets good ones after a failed save, casts dtypes, and reads flipped bits without a word.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from jaxrl_llm.errors import CheckpointError, UserError
from jaxrl_llm.parallel import hosts
from jaxrl_llm.types import PyTree

FORMAT_VERSION = 1
MAX_FAILURES = 3
SHOWN_PATHS = 5
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}
logger = logging.getLogger("jaxrl_llm.checkpoint")
# Orbax reports each of its steps, and a failed save twice with its traceback. What matters reaches this file as an exception.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)


def fingerprint(tree: PyTree) -> dict[str, int]:
    """A 32-bit number for each leaf, by its path: the same on every mesh, another if any bit flips or an element moves.

    Sum mod 2^32 over the words of a leaf of `mix(word ^ odd * index)`, `mix` a bijection (MurmurHash3's finaliser): a change of
    one word always shows, any other with probability 1 - 2^-32. (A plain weighted sum misses every even number of flipped signs.)
    Leaves: jax arrays, also global ones of several processes, and NumPy arrays; an empty leaf gives 0.
    """
    return _fingerprints(_by_path(tree))


def _by_path(tree: PyTree) -> dict[str, Any]:
    """The leaves by `jax.tree_util.keystr`; whatever is no jax array or ShapeDtypeStruct as a NumPy array."""
    device = (jax.Array, jax.ShapeDtypeStruct)
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): x if isinstance(x, device) else np.asarray(x) for path, x in flat}


def _fingerprints(leaves: dict[str, Any]) -> dict[str, int]:
    sums: dict[str, Any] = {}
    for path, x in leaves.items():
        # One program for each shape and layout: a single one over hundreds of leaves takes much longer to compile.
        sums[path] = _device_sum(x) if isinstance(x, jax.Array) else _host_sum(x)
        # On CPU many collectives under way at once wait for each other's threads, and XLA aborts after 40 seconds.
        if isinstance(x, jax.Array) and next(iter(x.sharding.device_set)).platform == "cpu":
            sums[path].block_until_ready()
    return {path: int(number) for path, number in jax.device_get(sums).items()}


@jax.jit
def _device_sum(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    # Types of 8 bytes gain a last dimension of 2.
    words = jax.lax.bitcast_convert_type(x, WORDS[min(x.dtype.itemsize, 4)]).astype(jnp.uint32)
    index, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for dim in reversed(range(words.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim) * np.uint32(stride & 0xFFFFFFFF)
        stride *= words.shape[dim]
    return jnp.sum(_mixed(words, index), dtype=jnp.uint32)


def _host_sum(x: np.ndarray) -> np.uint32:
    word = WORDS[min(x.dtype.itemsize, 4)]
    words = np.ascontiguousarray(x).reshape(-1).view(word).astype(np.uint32)
    return np.sum(_mixed(words, np.arange(words.size, dtype=np.uint32)), dtype=np.uint32)


def _mixed(words: Any, index: Any) -> Any:
    mixed = words ^ (index * np.uint32(0x9E3779B1))
    mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
    return mixed ^ (mixed >> 16)


def prepare_run_directory(path: Path) -> None:
    """Create it and prove that a file can be written, synced and renamed there. Raises UserError otherwise."""
    probe = path / f".probe-{socket.gethostname()}-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        with probe.open("w", encoding="utf-8") as file:
            file.write("probe")
            file.flush()
            os.fsync(file.fileno())
        probe.rename(f"{probe}-renamed").unlink()
    except OSError as error:
        raise UserError(f"run_dir: got {path}, want a directory that can be made and written ({error})") from error


class RunLock:
    """Held by the one process that writes into a run directory (process 0 of a job); the kernel drops it when that process ends.

    Raises UserError at once if another process holds it.
    """

    def __init__(self, run_directory: Path):
        self.path = Path(run_directory) / "lock"

    def __enter__(self) -> Self:
        # "a+": opening must not wipe the holder's name.
        file = self.path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            reason = f"is in use by {holder}" if holder else f"cannot be locked ({error.strerror})"
            raise UserError(f"run_dir: {self.path.parent} {reason}; stop that run or give another directory") from None
        file.truncate(0)
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        file.write(f"pid {os.getpid()} on {socket.gethostname()} since {since}\n")
        file.flush()
        self._file = file
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@dataclass(frozen=True)
class Restored:
    """One step as it was saved; `tree` has the target's structure and shardings, `meta` is what `save` was given."""

    step: int
    tree: PyTree
    meta: dict[str, Any]


class _UnreadableError(Exception):
    """A step's bytes are not those that were written; known to every process of the job."""


class Checkpoints:
    """The checkpoints below `directory`, of which the newest `keep` stay. Every process of a job calls every method, in one order.

    `<directory>/<step>` are the steps, `corrupt-<step>` those that could not be read: moved aside, never deleted.
    Reading changes nothing in a directory whose steps are good, so it may belong to a run that goes on elsewhere.
    """

    def __init__(self, directory: Path, keep: int = 3):
        self.directory, self._keep, self._failures = Path(directory).absolute(), keep, 0
        self._manager: ocp.CheckpointManager | None = None
        self._pending: int | None = None

    def steps(self) -> list[int]:
        """Steps on disk, oldest first."""
        names = [p.name for p in self.directory.glob("*") if p.name.isdecimal() and p.is_dir()]
        return sorted(int(name) for name in names if name == str(int(name)))

    def save(self, step: int, tree: PyTree, meta: dict[str, Any]) -> None:
        """Start to save the values of this moment; the caller may donate or overwrite them at once. `meta` must fit into JSON.

        Waits for the save before, if that still runs. A save that fails is warned about and tried again when the next one is
        due; the third failure in a row raises CheckpointError, and so does a step that is not newer than those on disk.
        """
        if failure := self._finish():
            self._give_up(*failure)
        leaves = _by_path(tree)
        # On CPU Orbax writes from the very memory of the arrays; JAX does not donate memory that is viewed in this way, and
        # on an accelerator the copy to the host is over when save returns. Empty arrays it refuses: their shape says it all.
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave({path: x for path, x in leaves.items() if x.size}),
            meta=ocp.args.JsonSave(_sealed(leaves, meta)),
        )
        try:
            self._manager = self._manager or self._open()
            saved = self._manager.save(step, args=arguments)
        except Exception as error:
            self._give_up(step, error)
            return
        if not saved:
            raise CheckpointError(f"{self.directory}: got step {step} to save, want one newer than {self.steps()}")
        self._pending = step

    def poll(self) -> None:
        """Take note of a save that has ended, without waiting for one that has not. Call it every step.

        A failure is logged as a warning; the third in a row, or any in a job of several processes (whose others would wait
        for this one), raises CheckpointError.
        """
        # Orbax's check_for_errors is never called: it takes the error away from the thread that deletes old steps, which then
        # believes in the new one and deletes the only good one.
        if self._manager is None and self._failures:
            # A step later, as Orbax gives up at the first writer that fails while the others still write.
            self._clean()
        elif self._pending is not None and not self._manager.is_saving_in_progress() and (failure := self._finish()):
            self._give_up(*failure)

    def wait(self) -> None:
        """Return when the last save is on disk. Raises CheckpointError if it failed."""
        if failure := self._finish():
            self._drop_manager()
            step, error = failure
            raise CheckpointError(f"{self.directory}: step {step} was not saved: {_reason(error)}") from error

    def close(self) -> None:
        """Like `wait`, then free what Orbax holds."""
        try:
            self.wait()
        finally:
            self._drop_manager()

    def restore(self, target: Callable[[dict[str, Any]], PyTree]) -> Restored | None:
        """The newest step of which every leaf has the fingerprint it was saved with; None where no step was ever saved.

        `target(meta)` has the wanted structure: a ShapeDtypeStruct with a sharding (of any mesh) for each leaf on devices, a NumPy
        array of the right shape and dtype for each on the host. Raises UserError if a step holds other paths, shapes or dtypes. One
        that cannot be read is moved to `corrupt-<step>` with a warning, and the one before is tried; when none is left,
        CheckpointError, never a fresh start.
        """
        self.wait()
        # Orbax refuses steps below the newest it remembers: the next save reads the directory anew.
        self._drop_manager()
        newest_first = self.steps()[::-1]
        for step, older in zip(newest_first, [*newest_first[1:], None], strict=False):
            try:
                return self._read(step, target)
            except _UnreadableError as error:
                self._set_aside(step, older, str(error))
        if newest_first or any(self.directory.glob("corrupt-*")):
            problem = f"{self.directory}: no checkpoint can be read (see corrupt-*)"
            raise CheckpointError(f"{problem}; put a good copy back, or give another run_dir to start anew")
        return None

    def _read(self, step: int, target_of: Callable[[dict[str, Any]], PyTree]) -> Restored:
        directory = epath.Path(self.directory / str(step))
        document = _agreed(lambda: _unsealed(ocp.JsonCheckpointHandler().restore(directory / "meta")))
        if document["format_version"] != FORMAT_VERSION:
            raise UserError(f"{directory}: got format {document['format_version']}, want {FORMAT_VERSION}")
        target = target_of(document["meta"])
        wanted = {path: _placed(x) for path, x in _by_path(target).items()}
        saved = document["leaves"]
        _must_fit(directory, {path: x[0] for path, x in saved.items()}, _shapes(wanted))
        # Not through the manager: its barriers would hang the processes that could read when one could not.
        handler = ocp.StandardCheckpointHandler()
        filled = ocp.args.StandardRestore({path: x for path, x in wanted.items() if x.size})
        leaves = _agreed(lambda: handler.restore(directory / "state", args=filled))
        leaves |= {path: _empty(x) for path, x in wanted.items() if not x.size}
        found = _fingerprints(leaves)
        changed = [path for path in wanted if found[path] != saved[path][1]]
        if not hosts.all_agree(not changed):
            raise _UnreadableError(f"not the bits that were saved: {changed[:SHOWN_PATHS]}, {len(changed)} in all")
        tree = jax.tree.unflatten(jax.tree.structure(target), [leaves[path] for path in wanted])
        return Restored(step, tree, document["meta"])

    def _set_aside(self, step: int, older: int | None, reason: str) -> None:
        moved = self.directory / f"corrupt-{step}"
        while moved.exists():
            moved = moved.with_name(f"{moved.name}-again")
        if jax.process_index() == 0 and (self.directory / str(step)).is_dir():
            (self.directory / str(step)).rename(moved)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"checkpoint {step} was moved")
        using = "no older step is left" if older is None else f"using step {older}"
        logger.warning("step %d unreadable (%s), %s; moved to %s", step, reason, using, moved)

    def _open(self) -> ocp.CheckpointManager:
        self._clean()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep,
            # Renamed, then deleted: killed in between, Orbax would go on listing half a step.
            todelete_subdir="trash",
            cleanup_tmp_directories=True,
        )
        return ocp.CheckpointManager(self.directory, options=options)

    def _drop_manager(self) -> None:
        manager, self._manager, self._pending = self._manager, None, None
        # Its errors were noted when they happened.
        with suppress(Exception):
            if manager is not None:
                manager.close()

    def _finish(self) -> tuple[int, Exception] | None:
        """Wait for the save under way; the step and the error if it failed."""
        if self._pending is None:
            return None
        step, self._pending = self._pending, None
        try:
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                _sync_to_disk(self.directory / str(step))
            self._clean()
        except Exception as error:
            return step, error
        self._failures = 0
        return None

    def _give_up(self, step: int, error: Exception) -> None:
        self._failures += 1
        # Orbax forgets good steps when a save fails; the next manager reads them from disk.
        self._drop_manager()
        message = f"{self.directory}: step {step} was not saved: {_reason(error)}"
        if self._failures >= MAX_FAILURES or jax.process_count() > 1:
            remedy = (
                f"{self._failures} failed in a row; remove the cause and start again: steps {self.steps()} are kept"
            )
            raise CheckpointError(f"{message}; {remedy}") from error
        logger.warning("%s; trying again when the next one is due (%d of %d)", message, self._failures, MAX_FAILURES)

    def _clean(self) -> None:
        """Delete what was given up: the trash, and what failed saves have left. Only while no save is under way."""
        given_up = [*self.directory.glob("trash"), *self.directory.glob("*.orbax-checkpoint-tmp*")]
        for path in given_up if jax.process_index() == 0 else []:
            shutil.rmtree(path, ignore_errors=True)


def _shapes(leaves: dict[str, Any]) -> dict[str, str]:
    return {path: f"{x.dtype}[{','.join(map(str, x.shape))}]" for path, x in leaves.items()}


def _sealed(leaves: dict[str, Any], meta: dict[str, Any]) -> dict[str, str]:
    numbers = _fingerprints(leaves)
    described = {path: [shape, numbers[path]] for path, shape in _shapes(leaves).items()}
    text = json.dumps({"format_version": FORMAT_VERSION, "leaves": described, "meta": meta})
    return {"sha256": hashlib.sha256(text.encode()).hexdigest(), "text": text}


def _unsealed(item: dict[str, str]) -> dict[str, Any]:
    if hashlib.sha256(item["text"].encode()).hexdigest() != item["sha256"]:
        raise ValueError("meta does not have the checksum it was saved with")
    return json.loads(item["text"])


def _must_fit(directory: epath.Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    pairs = {path: (saved.get(path, "nothing"), wanted.get(path, "nothing")) for path in saved | wanted}
    lines = [f"{path}: saved {got}, want {want}" for path, (got, want) in pairs.items() if got != want]
    if lines:
        problem = f"{directory}: got {len(lines)} leaves that do not fit this config; undo its changes or give another run_dir"
        raise UserError("\n  ".join([problem, *lines[:SHOWN_PATHS]]))


def _agreed(read: Callable[[], Any]) -> Any:
    """What `read` gives; _UnreadableError on every process if it failed on any."""
    value, reason = None, ""
    try:
        value = read()
    except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
        # A machine too small, or the wrong user: no reason to move good steps away.
        raise
    except Exception as error:
        reason = _reason(error)
    if not hosts.all_agree(not reason):
        raise _UnreadableError(reason or "on another process")
    return value


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


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
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)

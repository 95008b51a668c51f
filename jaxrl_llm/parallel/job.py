"""Equal configs and a common end for all processes of a job: an error in one ends the others, which would wait for it.

JAX itself ends a job only when a process has been gone for 100 s, and an exiting process waits up to 300 s for the others. The
processes communicate through the key-value store of JAX's coordination service, held by process 0. A single process does nothing.
"""

import atexit
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from jaxrl_llm.errors import Preempted, UserError

CONFIG, AGREED, FAILED, LEFT = "jaxrl/config/", "jaxrl/agreed", "jaxrl/failed", "jaxrl/left/"
AGREE_LIMIT_S = 120
POLL_S = 0.5
# Time for a process to exit by itself after the same error.
GRACE_S = 3.0
MAX_SHOWN = 20


class OtherProcessError(UserError):
    """Another process of the job failed; the message is repeated in this one."""

    def __init__(self, process: int, code: int, text: str):
        super().__init__(f"process {process} of this job failed, so this one exits too: {text}")
        self.exit_code = code


def join(config: Mapping[str, Any]) -> None:
    """Join the job described by environment variables; returns once all of its processes have joined with an equal `config`.

    Raises UserError in every process if the configs differ.
    """
    from jaxrl_llm.parallel.hosts import start_distributed

    start_distributed()
    if client := _client():
        _agree(client, config)
        done = threading.Event()
        watcher = threading.Thread(target=_watch, args=(client, done), name="job", daemon=True)
        watcher.start()
        atexit.register(lambda: (done.set(), watcher.join(timeout=2 * POLL_S)))


@contextmanager
def ends_together() -> Iterator[None]:
    """Context manager in which an error ends all processes of the job, without waiting for them."""
    try:
        yield
    except Preempted:
        raise
    except BaseException as error:
        if not (client := _client()):
            raise
        code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
        _set_once(client, FAILED, [_process_id(), code, str(error) or type(error).__name__])
        process, code, text = _failure(client) or (_process_id(), code, "")
        # After the message is printed, and before JAX waits.
        atexit.register(_leave, client, code)
        if process == _process_id() or isinstance(error, UserError):
            raise
        # Collectives fail when another process is gone: report its error.
        raise OtherProcessError(process, code, text) from error


def _agree(client: Any, config: Mapping[str, Any]) -> None:
    """Compare configs in process 0: comparing all with all would grow with the square of the number of processes."""
    mine = _flatten(config)
    if _process_id():
        client.key_value_set(f"{CONFIG}{_process_id()}", json.dumps(mine))
        found = _get(client, AGREED, "process 0")
    else:
        found = []
        for process in range(1, _num_processes()):
            theirs = _get(client, f"{CONFIG}{process}", f"process {process}")
            found += [
                f"{name}: got {_shown(theirs, name)} in process {process}, want {_shown(mine, name)} as in process 0"
                for name in sorted(mine.keys() | theirs.keys())
                if mine.get(name) != theirs.get(name)
            ]
        client.key_value_set(AGREED, json.dumps(found))
    if found:
        more = [f"... and {len(found) - MAX_SHOWN} more"] if len(found) > MAX_SHOWN else []
        head = "got different configs in the processes of a job, want the same in all:"
        raise UserError("\n".join([head, *found[:MAX_SHOWN], *more]))


def _flatten(config: Mapping[str, Any], path: str = "") -> dict[str, str]:
    """JSON of each value, by dotted path."""
    found: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= _flatten(value, f"{path}{name}.")
        else:
            found[f"{path}{name}"] = json.dumps(value, default=str)
    return found


def _shown(values: Mapping[str, str], name: str) -> str:
    return values.get(name, "nothing")


def _watch(client: Any, done: threading.Event) -> None:
    """End this process some seconds after another one has failed."""
    while not done.wait(POLL_S):
        if failure := _failure(client):
            break
    if done.is_set() or done.wait(GRACE_S):
        return
    other = OtherProcessError(*failure)
    if failure[0] != _process_id():
        print(f"jaxrl: {other}", file=sys.stderr)
    _leave(client, other.exit_code)


def _failure(client: Any) -> tuple[int, int, str] | None:
    """Process that failed first, its exit code and message; None if none failed."""
    with suppress(Exception):
        process, code, text = json.loads(client.key_value_try_get(FAILED))
        return process, code, text
    return None


def _leave(client: Any, code: int) -> None:
    """End this process at once. Process 0 waits for the others first: without its store they would abort."""
    _set_once(client, f"{LEFT}{_process_id()}", None)
    limit = time.monotonic() + POLL_S + GRACE_S + 1
    with suppress(Exception):
        while not _process_id() and time.monotonic() < limit and len(client.key_value_dir_get(LEFT)) < _num_processes():
            time.sleep(POLL_S / 10)
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code)


def _set_once(client: Any, key: str, value: Any) -> None:
    """Set a key unless it is set; errors of the store are ignored."""
    with suppress(Exception):
        client.key_value_set(key, json.dumps(value))


def _get(client: Any, key: str, sender: str) -> Any:
    from jax.errors import JaxRuntimeError

    try:
        return json.loads(client.blocking_key_value_get(key, 1000 * AGREE_LIMIT_S))
    except JaxRuntimeError as error:
        raise UserError(
            f"distributed start: got no answer from {sender} in {AGREE_LIMIT_S} s; see its output"
        ) from error


def _client() -> Any:
    """Client of the coordination service; None in a single process. JAX has no public API for its store."""
    if "jax" not in sys.modules:
        return None
    from jax._src.distributed import global_state

    return global_state.client if global_state.num_processes and global_state.num_processes > 1 else None


def _process_id() -> int:
    from jax._src.distributed import global_state

    return global_state.process_id


def _num_processes() -> int:
    from jax._src.distributed import global_state

    return global_state.num_processes

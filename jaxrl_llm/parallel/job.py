"""The processes of one job have one config, and end together: an error in one ends the others, which would wait for it.

JAX itself ends a job when a process is gone for 100 s, and at its end a process waits up to 300 s for the others. Here all that
is said goes through the key-value store of its coordination service, which process 0 holds. Alone, a process says nothing.
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

CONFIG, AGREED, ENDED, LEFT = "jaxrl/config/", "jaxrl/agreed", "jaxrl/ended", "jaxrl/left/"
AGREE_LIMIT_S = 120
POLL_S = 0.5
# For a process that ends by itself, since the same error has met it.
GRACE_S = 3.0
SHOWN = 20


class OtherEndedError(UserError):
    """Another process of the job ended by an error, which is told here too."""

    def __init__(self, process: int, code: int, text: str):
        super().__init__(f"process {process} of this job has ended, and so does this one: {text}")
        self.exit_code = code


def join(config: Mapping[str, Any]) -> None:
    """Joins the job that the environment describes; returns when all of its processes have, with an equal `config`.

    Raises UserError, in every process, if one has another.
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
    """Around what a process does: an error that leaves it ends the other processes of its job, for which this one does not wait."""
    try:
        yield
    except Preempted:
        raise
    except BaseException as error:
        if not (client := _client()):
            raise
        code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
        _say_once(client, ENDED, [_me(), code, str(error) or type(error).__name__])
        process, code, text = _ended(client) or (_me(), code, "")
        # After the message is printed, and before JAX waits.
        atexit.register(_leave, client, code)
        if process == _me() or isinstance(error, UserError):
            raise
        # Collectives fail when the other is gone: its reason is ours.
        raise OtherEndedError(process, code, text) from error


def _agree(client: Any, config: Mapping[str, Any]) -> None:
    """Process 0 compares, since what all tell all grows with the square of the job."""
    mine = _flat(config)
    if _me():
        client.key_value_set(f"{CONFIG}{_me()}", json.dumps(mine))
        found = _hear(client, AGREED, "process 0")
    else:
        found = []
        for process in range(1, _num_processes()):
            theirs = _hear(client, f"{CONFIG}{process}", f"process {process}")
            found += [
                f"{name}: got {_of(theirs, name)} in process {process}, want {_of(mine, name)} as in process 0"
                for name in sorted(mine.keys() | theirs.keys())
                if mine.get(name) != theirs.get(name)
            ]
        client.key_value_set(AGREED, json.dumps(found))
    if found:
        more = [f"... and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        raise UserError("\n".join(["every process of a job needs the same config:", *found[:SHOWN], *more]))


def _flat(config: Mapping[str, Any], path: str = "") -> dict[str, str]:
    """JSON of each value, by its path."""
    found: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{path}{name}.")
        else:
            found[f"{path}{name}"] = json.dumps(value, default=str)
    return found


def _of(values: Mapping[str, str], name: str) -> str:
    return values.get(name, "nothing")


def _watch(client: Any, done: threading.Event) -> None:
    """Ends this process some seconds after another has told of its error."""
    while not done.wait(POLL_S):
        if ended := _ended(client):
            break
    if done.is_set() or done.wait(GRACE_S):
        return
    other = OtherEndedError(*ended)
    if ended[0] != _me():
        print(f"jaxrl: {other}", file=sys.stderr)
    _leave(client, other.exit_code)


def _ended(client: Any) -> tuple[int, int, str] | None:
    """Which process ended by an error first, with what exit code, and why."""
    with suppress(Exception):
        process, code, text = json.loads(client.key_value_try_get(ENDED))
        return process, code, text
    return None


def _leave(client: Any, code: int) -> None:
    """Ends this process at once. Process 0 sees the others off first: without its store they abort."""
    _say_once(client, f"{LEFT}{_me()}", None)
    limit = time.monotonic() + POLL_S + GRACE_S + 1
    with suppress(Exception):
        while not _me() and time.monotonic() < limit and len(client.key_value_dir_get(LEFT)) < _num_processes():
            time.sleep(POLL_S / 10)
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code)


def _say_once(client: Any, key: str, value: Any) -> None:
    """The first who says it is heard; that nobody can hear any more stops nobody."""
    with suppress(Exception):
        client.key_value_set(key, json.dumps(value))


def _hear(client: Any, key: str, whom: str) -> Any:
    from jax.errors import JaxRuntimeError

    try:
        return json.loads(client.blocking_key_value_get(key, 1000 * AGREE_LIMIT_S))
    except JaxRuntimeError as error:
        raise UserError(f"distributed start: got no word of {whom} in {AGREE_LIMIT_S} s; see its output") from error


def _client() -> Any:
    """Of the coordination service; None in a process that is alone. Private to JAX, as is all that offers the store."""
    if "jax" not in sys.modules:
        return None
    from jax._src.distributed import global_state

    return global_state.client if global_state.num_processes and global_state.num_processes > 1 else None


def _me() -> int:
    from jax._src.distributed import global_state

    return global_state.process_id


def _num_processes() -> int:
    from jax._src.distributed import global_state

    return global_state.num_processes

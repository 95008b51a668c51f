"""Weights & Biases: scalars, tables of sampled responses and the config of a run, sent by a process of their own.

wandb waits for the network, asks for keys on a terminal, replaces sys.exit and leaves hooks for the end of the interpreter. In a
separate process none of that reaches the trainer, which only writes to a socket without waiting, and can end it at any time.

A resumed run continues the same W&B run, whose id is in wandb.json of the run directory. W&B refuses steps of its own that go
back, as they do after a resume from an older checkpoint. So it numbers the rows itself, and the metric `step` is the x-axis of all
charts (`define_metric`). The steps since that checkpoint are logged twice; a resumed run computes the same numbers again, so the
second point covers the first. Skipping them instead would lose what a killed process had not sent.
"""

import importlib.util
import json
import os
import secrets
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jaxrl_llm.metrics import wandb_process
from jaxrl_llm.metrics.config import WandbConfig
from jaxrl_llm.metrics.json_lines import jsonable
from jaxrl_llm.metrics.writer import numbers

RUN_FILE = "wandb.json"
COLUMNS = "step", "uid", "sample", "prompt", "completion", "reward", "advantage", "finish"
# Largest table: rows, and characters of a text in it.
MAX_ROWS, MAX_CHARACTERS = 64, 4000
MAX_WAITING = 2**26
"""Bytes that wait for the process before rows are dropped."""
CLOSE_S = 60
"""Seconds after which a process that has not finished is ended."""


def why_unavailable() -> str:
    """Reason why W&B cannot be used; "" if it can."""
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:  # a folder wandb/, as W&B leaves them, counts as a package without origin
        return (
            "metrics.wandb: got a config without the package wandb: nothing is sent to W&B; "
            "pip install 'jaxrl-llm[track]', or set metrics.wandb: null"
        )
    return ""


def run_id(run_dir: Path) -> str:
    """Id of the W&B run of a run directory, made on first use. A moved directory keeps it, a copy gets one of its own: else both
    would write to one W&B run. Raises OSError if it cannot be stored."""
    path, here = run_dir / RUN_FILE, str(run_dir.resolve())
    saved = _read(path)
    original = Path(saved.get("run_dir", here)) / RUN_FILE
    is_copy = bool(saved) and _read(original) == saved and not original.samefile(path)
    now = {"id": secrets.token_hex(6) if is_copy or not saved else saved["id"], "run_dir": here}
    if now != saved:
        partial = path.with_name(f"{RUN_FILE}.partial")
        partial.write_text(json.dumps(now), encoding="utf-8")
        os.replace(partial, path)
    return now["id"]


def _read(path: Path) -> dict[str, str]:
    """The stored id; {} if there is none, or a power failure left none."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        saved = json.loads(path.read_text(encoding="utf-8"))
        return {name: str(saved[name]) for name in ("id", "run_dir")}
    return {}


class WeightsAndBiases:
    """Client of the process that calls wandb."""

    def __init__(self, run_dir: Path, config: WandbConfig, run_config: Mapping[str, Any], say: Callable[[str], None]):
        """
        Args:
            run_dir: the run directory; W&B's own files are in its folder wandb.
            config: which project, and what.
            run_config: config of the whole run.
            say: shows the user a message.

        Raises:
            OSError: the run's id cannot be stored, or no process can be started.
        """
        self._table_every, self._say = config.table_every, say
        self._waiting, self._heard = bytearray(), bytearray()
        self._is_full = self._is_closing = False
        options = {
            "id": run_id(run_dir), "resume": "allow", "dir": str(run_dir.resolve()), "project": config.project,
            "name": config.name or run_dir.resolve().name, "entity": config.entity or None,
            "group": config.group or None, "tags": list(config.tags) or None, "config": jsonable(run_config),
            "allow_val_change": True,  # of keys that may differ in a resumed run
            "mode": "offline" if config.mode == "offline" else None,
        }  # fmt: skip
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                # -P: files beside that one must not shadow modules of other packages.
                [sys.executable, "-P", wandb_process.__file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C on the terminal is for the trainer, which closes this process
            )  # fmt: skip
        self._socket.setblocking(False)
        self._send("init", options)

    def scalars(self, step: int, phase: str, row: Mapping[str, Any]) -> None:
        """Metrics of the warm start but its evaluation begin with its name: its loss and that of RL are two charts."""
        plain = phase in ("", "rl")
        named = {n if plain or n.startswith("eval/") else f"{phase}/{n}": value for n, value in numbers(row).items()}
        self._send("scalars", {**named, "step": step})

    def rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        if self._table_every and step % self._table_every == 0:
            cells = [[_cell({"step": step, **row}.get(name)) for name in COLUMNS] for row in rows[:MAX_ROWS]]
            self._send("table", {"step": step, "columns": COLUMNS, "rows": cells})

    def close(self, failed: bool) -> None:
        self._is_closing = True  # the process may end as soon as it has this line
        self._send("close", failed)
        deadline = time.monotonic() + CLOSE_S
        try:
            while self._socket.fileno() >= 0 and (left := deadline - time.monotonic()) > 0:
                if not self._waiting:
                    with suppress(OSError):  # the process has ended
                        self._socket.shutdown(socket.SHUT_WR)
                ready = select.poll()
                ready.register(self._socket, select.POLLIN | (select.POLLOUT if self._waiting else 0))
                ready.poll(1000 * left)
                self._exchange()
            if self._socket.fileno() >= 0:
                self._say(f"metrics.wandb: not finished after {CLOSE_S} s, the rest is not sent to W&B")
        finally:
            self._socket.close()
            self._process.kill()  # where it still runs; its child wandb-core ends with it
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=10)

    def _send(self, kind: str, content: Any) -> None:
        if self._socket.fileno() < 0:
            return
        line = json.dumps([kind, content]).encode("ascii") + b"\n"
        if len(self._waiting) + len(line) <= MAX_WAITING:
            self._waiting += line
        elif not self._is_full:
            self._is_full = True
            self._say("metrics.wandb: W&B takes nothing for a long time, so rows for it are dropped")
        self._exchange()

    def _exchange(self) -> None:
        """Send what waits and show what was said, as far as that needs no waiting; the socket is closed at its end."""
        is_open = True
        try:
            with suppress(BlockingIOError):
                while self._waiting:
                    del self._waiting[: self._socket.send(self._waiting)]
            with suppress(BlockingIOError):
                while text := self._socket.recv(2**16):
                    self._heard += text
                is_open = False
        except OSError:
            is_open = False
        *said, rest = self._heard.split(b"\n")
        self._heard = rest
        for line in said:
            self._say(f"metrics.wandb: {line.decode('utf-8', 'replace')}")
        if not is_open:
            self._socket.close()
            if not self._is_closing:
                self._say("metrics.wandb: its process ended, nothing more is sent to W&B")


def _cell(value: Any) -> Any:
    """`value` for a table: numbers to 6 digits, long texts without their middle, no half characters."""
    if not isinstance(value, str):
        return jsonable(value, digits=6)
    if len(value) > MAX_CHARACTERS:
        value = f"{value[: MAX_CHARACTERS // 2]} … {value[-MAX_CHARACTERS // 2 :]}"
    return value.encode("utf-8", "replace").decode("utf-8")

"""A chat template is a program that came with a model. It runs in a process of its own, with a limit of time, memory and text.

The sandbox of jinja2 keeps a template from files and from the interpreter; it does not end a loop, and no thread can be ended in
the middle of `10 ** 10 ** 10`. This file is that process's program too: nothing of the package is imported at its top.
"""

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

SECONDS = 10
"""For one conversation."""
CHARACTERS = 10_000_000
"""That one conversation may become."""
BYTES = 2**30
"""Memory beyond that of a process that has rendered nothing."""
WAIT_S = 120
"""For an answer from a process that does not end itself as it should, or is slow to start."""
IDLE_S = 30
"""After so long without work the process ends by itself."""


class Renderer:
    """The parent's end. The process starts with the first conversation, and anew after a template that had to be ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._pipe: Connection | None = None
        self._used = 0.0

    def render(
        self, source: str, arguments: Mapping[str, Any], conversations: Sequence[Sequence[Mapping[str, Any]]]
    ) -> list[tuple[str | None, str]]:
        """Each conversation's text, and what is wrong instead. The first that breaks a limit is the last."""
        self._start()
        found: list[tuple[str | None, str]] = []
        try:
            self._pipe.send((source, dict(arguments), conversations))
            while len(found) < len(conversations):
                if not self._pipe.poll(WAIT_S):
                    raise EOFError
                text, wrong = json.loads(self._pipe.recv_bytes())
                found.append((text, wrong))
        except (EOFError, OSError):
            self._end()
            return [*found, (None, f"takes more than {SECONDS} s, or more memory than it may have")]
        except BaseException:  # Ctrl-C: answers that nobody reads any more must not be taken for others
            self._end()
            raise
        self._used = time.monotonic()
        return found

    def _start(self) -> None:
        if self._process is not None and time.monotonic() - self._used < IDLE_S / 2 and self._process.poll() is None:
            return
        self._end()
        self._pipe, theirs = Pipe()
        limits = map(str, (theirs.fileno(), SECONDS, CHARACTERS, BYTES, IDLE_S))
        self._process = subprocess.Popen(
            # -P: what stands beside this file must not be taken for modules of other packages.
            [sys.executable, "-P", __file__, *limits],
            pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        theirs.close()

    def _end(self) -> None:
        if self._process is not None:
            self._pipe.close()
            self._process.kill()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(SECONDS)
        self._process = self._pipe = None


RENDERER = Renderer()


def serve(pipe: Connection, seconds: int, characters: int, memory: int, idle_s: int) -> None:
    """The other end: conversations in, texts out, until there are no more. SIGALRM ends this process, whatever it is doing."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then closes the pipe
    signal.alarm(WAIT_S)
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory(memory)
    while pipe.poll(idle_s):
        source, arguments, conversations = pipe.recv()
        for conversation in conversations:
            signal.alarm(seconds)
            answer = None, ""
            try:
                (text,), _ = render_jinja_template([conversation], chat_template=source, **arguments)
                answer = (
                    (text, "") if len(text) <= characters else (None, f"writes more than {characters:,} characters")
                )
            except Exception as error:  # the template is a program of its own and raises what it likes
                answer = None, f"raises {type(error).__name__}: {(str(error).splitlines() or [''])[0][:500]}"
            pipe.send_bytes(json.dumps(answer).encode())
        signal.alarm(0)


def _limit_memory(more: int) -> None:
    """Beyond what it has now, where the system can tell; elsewhere there is the limit of time alone."""
    import resource

    with suppress(OSError, ValueError):
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + more, now + more))


if __name__ == "__main__":
    with suppress(EOFError, OSError, KeyboardInterrupt):
        serve(Connection(int(sys.argv[1])), *map(int, sys.argv[2:]))

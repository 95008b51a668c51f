"""Renders chat templates in a separate process, with limits on time, memory and output.

A chat template is untrusted code that comes with a model. The sandbox of jinja2 keeps it from files and from the interpreter, but
ends no loop, and no thread can be stopped in the middle of `10 ** 10 ** 10`. This file is also the program of that process: it
imports nothing of the package.
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
"""Time limit per conversation."""
CHARACTERS = 10_000_000
"""Maximum length of one rendered conversation."""
BYTES = 2**30
"""Memory limit, on top of what the process uses before it renders anything."""
WAIT_S = 120
"""Timeout of the parent for an answer, including the start of the process."""
IDLE_S = 30
"""Idle time after which the process exits."""


class Renderer:
    """Client of the rendering process, which starts on first use and is restarted after a template was killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._pipe: Connection | None = None
        self._used = 0.0

    def render(
        self, source: str, arguments: Mapping[str, Any], conversations: Sequence[Sequence[Mapping[str, Any]]]
    ) -> list[tuple[str | None, str]]:
        """Return (text, error) per conversation; text is None on error. The result ends at the first that exceeds a limit."""
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
        except BaseException:  # Ctrl-C: unread answers must not be taken for those of the next call
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
            # -P: files beside this one must not shadow modules of other packages.
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
    """Main loop of the rendering process. SIGALRM kills it if a conversation takes too long.

    Args:
        pipe: Receives (source, arguments, conversations), sends one JSON [text, error] per conversation.
        seconds: Time limit per conversation.
        characters: Maximum length of one rendered conversation.
        memory: Limit of additional memory in bytes.
        idle_s: Exit after this many seconds without a request.
    """
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and closes the pipe
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
            except Exception as error:  # templates are programs and may raise anything
                answer = None, f"raises {type(error).__name__}: {(str(error).splitlines() or [''])[0][:500]}"
            pipe.send_bytes(json.dumps(answer).encode())
        signal.alarm(0)


def _limit_memory(more: int) -> None:
    """Limit memory to `more` bytes above current use. Without /proc there is only the time limit."""
    import resource

    with suppress(OSError, ValueError):
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + more, now + more))


if __name__ == "__main__":
    with suppress(EOFError, OSError, KeyboardInterrupt):
        serve(Connection(int(sys.argv[1])), *map(int, sys.argv[2:]))

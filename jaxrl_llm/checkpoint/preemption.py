"""Ctrl-C and SIGTERM: the first lets the step end and be saved, a second Ctrl-C stops at once. Imports no jax until asked."""

import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
# Seconds between two looks of the listening thread at whether it is still wanted.
LOOK = 0.5


class Stop:
    """A question to ask after each step, `stop(step)`: what told the run to stop, as "Ctrl-C"; "" where nothing did.

    Nothing is lost that was never begun: before the first question Ctrl-C stops at once. Several processes must stop after the
    same step: there JAX's preemption service listens to SIGTERM (a handler of ours, set after it, would make it deaf), and Ctrl-C
    is passed on to it.
    """

    def __init__(self, num_processes: int, ends_process: bool, last: int | None):
        self._is_alone, self._ends_process, self._last = num_processes == 1, ends_process, last
        self._step: int | None = None
        self._came: list[str] = []
        self._waits: dict[int, bool] = {}
        self._is_over = False

    def __call__(self, step: int) -> str:
        if not self._came:  # else this is the step that ends, and the thread may have yet to say so
            self._step = step
        if not self._is_alone:
            from jax.experimental import multihost_utils

            return [*self._came, "SIGTERM"][0] if multihost_utils.reached_preemption_sync_point(step) else ""
        return self._came[0] if self._came else ""

    def _lets_it_end(self, nth: int) -> bool:
        """Whether the nth Ctrl-C waits for the step. The handler and the thread ask, either first: both get the one answer."""
        return self._waits.setdefault(nth, nth == 0 and self._step is not None)

    def handle(self, signum: int, _frame: object) -> None:
        """In the main thread, which may be long in coming here."""
        if signum == signal.SIGINT and not self._lets_it_end(self._came.count("Ctrl-C")):
            if not self._ends_process:
                raise KeyboardInterrupt
            return
        self._came.append(NAMES[signum])
        if not self._is_alone:
            os.kill(os.getpid(), signal.SIGTERM)

    def listen(self, pipe: int) -> None:
        """In a thread of its own, which hears of each signal at once."""
        num = 0
        while not self._is_over:
            if not select.select([pipe], [], [], LOOK)[0]:
                continue
            for signum in os.read(pipe, 64):
                if signum == signal.SIGTERM or (signum == signal.SIGINT and self._lets_it_end(num)):
                    self._acknowledge()
                elif signum == signal.SIGINT and self._ends_process:
                    end_process()
                num += signum == signal.SIGINT

    def _acknowledge(self) -> None:
        if self._step is None:
            return
        what = (
            f"finishing step {self._step + 1}, then"
            if self._is_alone
            else "finishing the step that all can stop after, then"
        )
        what = "all steps are done;" if self._step == self._last else what
        print(f"jaxrl: {what} saving; Ctrl-C again stops at once", file=sys.stderr, flush=True)

    def end(self) -> None:
        self._is_over = True


def end_process() -> NoReturn:
    """Now, whatever the main thread is in: inside a compilation no Python runs. Half a checkpoint has a name that says so, and what
    else is written appears whole or in whole lines."""
    # Raw writes: the main thread may hold the locks of the streams.
    if os.isatty(1):
        # A progress bar hides the cursor.
        os.write(1, b"\x1b[?25h\n")
    os.write(2, b"jaxrl: interrupted\n")
    os._exit(130)


@contextmanager
def stop_signal(ends_process: bool = False, last: int | None = None) -> Iterator[Stop]:
    """Listen while the body runs, whose `last` step is followed by no other.

    `ends_process`: a Ctrl-C that stops at once ends the process, with exit code 130, even where no Python runs; otherwise it raises
    KeyboardInterrupt as soon as it can, as in a notebook.
    """
    import jax

    stop = Stop(jax.process_count(), ends_process, last)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    # A run in the background of a script has SIGINT ignored, and keeps it so.
    heard = [signal.SIGINT] if signal.getsignal(signal.SIGINT) != signal.SIG_IGN else []
    heard += [signal.SIGTERM] if jax.process_count() == 1 else []
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    before = {signum: signal.signal(signum, stop.handle) for signum in heard}
    pipe_before = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    thread = threading.Thread(target=stop.listen, args=[reads], name="stop signal", daemon=True)
    thread.start()
    try:
        yield stop
    finally:
        stop.end()
        signal.set_wakeup_fd(pipe_before)
        os.write(writes, b"\0")
        for signum, handler in before.items():
            # All is saved: a Ctrl-C on the interpreter's way out need not be told in a traceback.
            signal.signal(signum, signal.SIG_DFL if ends_process else handler)
        thread.join(2 * LOOK)
        os.close(reads)
        os.close(writes)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Ctrl-C ends the process, until `stop_signal` listens: an exception in the middle of an import of JAX is swallowed there, or
    aborts with a stack trace."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    before = signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is _end:
            signal.signal(signal.SIGINT, before)


def _end(_signum: int, _frame: object) -> None:
    end_process()

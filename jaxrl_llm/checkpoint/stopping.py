"""Ctrl-C and SIGTERM: the first lets the step finish and be saved, a second Ctrl-C stops at once. Imports no jax until called."""

import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
# Seconds between two checks of the listening thread for its end.
POLL_S = 0.5


class StopRequest:
    """Called after each step, `stop(step)`: name of the signal that asks to stop, as "Ctrl-C"; "" if there is none.

    Before the first call there is nothing to save, so Ctrl-C stops at once. Several processes must stop after the same step: there
    JAX's preemption service handles SIGTERM (a handler set after it would replace it), and Ctrl-C is forwarded to it.
    """

    def __init__(self, num_processes: int, ends_process: bool, last: int | None):
        self._is_alone, self._ends_process, self._last = num_processes == 1, ends_process, last
        self._step: int | None = None
        self._received: list[str] = []
        self._waits: dict[int, bool] = {}
        self._is_over = False

    def __call__(self, step: int) -> str:
        if not self._received:  # else this step is finishing, and the thread may not have reported it yet
            self._step = step
        if not self._is_alone:
            from jax.experimental import multihost_utils

            return [*self._received, "SIGTERM"][0] if multihost_utils.reached_preemption_sync_point(step) else ""
        return self._received[0] if self._received else ""

    def _waits_for_step(self, nth: int) -> bool:
        """True if the nth Ctrl-C waits for the step. Handler and thread call this in either order and get the same answer."""
        return self._waits.setdefault(nth, nth == 0 and self._step is not None)

    def handle(self, signum: int, _frame: object) -> None:
        """Signal handler, in the main thread, which may take long to get here."""
        if signum == signal.SIGINT and not self._waits_for_step(self._received.count("Ctrl-C")):
            if not self._ends_process:
                raise KeyboardInterrupt
            return
        self._received.append(NAMES[signum])
        if not self._is_alone:
            os.kill(os.getpid(), signal.SIGTERM)

    def listen(self, pipe: int) -> None:
        """Body of the listening thread, which sees each signal at once."""
        num = 0
        while not self._is_over:
            if not select.select([pipe], [], [], POLL_S)[0]:
                continue
            for signum in os.read(pipe, 64):
                if signum == signal.SIGTERM or (signum == signal.SIGINT and self._waits_for_step(num)):
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
            else "finishing the step after which all can stop, then"
        )
        what = "all steps are done;" if self._step == self._last else what
        print(f"jaxrl: {what} saving; Ctrl-C again stops at once", file=sys.stderr, flush=True)

    def end(self) -> None:
        self._is_over = True


def end_process() -> NoReturn:
    """End the process at once, whatever the main thread does: during a compilation no Python runs. An unfinished checkpoint is
    recognized by its name, and other files appear whole or in whole lines."""
    # Raw writes, because the main thread may hold the locks of the streams.
    if os.isatty(1):
        # A progress bar hides the cursor.
        os.write(1, b"\x1b[?25h\n")
    os.write(2, b"jaxrl: interrupted\n")
    os._exit(130)


@contextmanager
def stop_signal(ends_process: bool = False, last: int | None = None) -> Iterator[StopRequest]:
    """Listen to signals while the body runs.

    Args:
        ends_process: a Ctrl-C that stops at once ends the process with exit code 130, even while no Python runs; otherwise it
            raises KeyboardInterrupt as soon as possible, as in a notebook.
        last: the run's last step.
    """
    import jax

    stop = StopRequest(jax.process_count(), ends_process, last)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    # A background process of a script ignores SIGINT, and continues to.
    handled = [signal.SIGINT] if signal.getsignal(signal.SIGINT) != signal.SIG_IGN else []
    handled += [signal.SIGTERM] if jax.process_count() == 1 else []
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    before = {signum: signal.signal(signum, stop.handle) for signum in handled}
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
            # Everything is saved: a Ctrl-C while the interpreter exits needs no traceback.
            signal.signal(signum, signal.SIG_DFL if ends_process else handler)
        thread.join(2 * POLL_S)
        os.close(reads)
        os.close(writes)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Let Ctrl-C end the process until `stop_signal` listens: while it is imported, JAX swallows a KeyboardInterrupt or aborts with
    a stack trace."""
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

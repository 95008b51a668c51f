"""Another library's training loop, run one step at a time. Standard library only: it runs in every peer's environment."""

import threading
from collections.abc import Callable

STEP_LIMIT_S = 3600
Loop = Callable[[Callable[[], None]], None]
"""A whole training run; it calls its argument after each step."""


class Paced:
    """Runs `loop` in a thread that waits after each step until `step` is called again."""

    def __init__(self, loop: Loop) -> None:
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(loop,), daemon=True)

    def step(self) -> None:
        """Run one step; the first includes the loop's setup. Raises the loop's exception, or RuntimeError if it ends."""
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        if not self._done.acquire(timeout=STEP_LIMIT_S):
            raise TimeoutError(f"no step in {STEP_LIMIT_S} s")
        if self._error is not None:
            raise self._error

    def _run(self, loop: Loop) -> None:
        try:
            loop(self._pause)
            self._error = RuntimeError("the training loop ended")
        except BaseException as error:
            self._error = error
        self._done.release()

    def _pause(self) -> None:
        self._done.release()
        self._go.acquire()

"""Times of the parts of a step, and the number of compilations."""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Timers:
    """Monotonic seconds per named part of a step: `with timers("generate"): ...`, then `timers.take()`."""

    def __init__(self):
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the seconds of the `with` body to `name`, also when the body raises."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.add(name, time.monotonic() - start)

    def timed(self, name: str, function: Callable) -> Callable:
        """`function` with its calls timed under `name`."""

        def call(*args: Any) -> Any:
            with self(name):
                return function(*args)

        return call

    def add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """Return {"time/<name>": seconds} since the last take and reset."""
        taken, self._seconds = self._seconds, {}
        return {f"time/{name}": seconds for name, seconds in taken.items()}


@functools.cache
def _compile_seconds() -> list[float]:
    """Return the process-wide, growing list of compile durations; the first call registers the one listener that fills it."""
    import jax.monitoring

    seconds: list[float] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return seconds


class CompileCounter:
    """Counts the XLA compilations of this process since the counter was made, loads from jax's persistent cache included."""

    def __init__(self):
        self._seen = len(_compile_seconds())

    @property
    def any(self) -> bool:
        """True if something was compiled since the last take."""
        return len(_compile_seconds()) > self._seen

    def take(self) -> dict[str, float]:
        """Return {"compiles": count, "time/compile": seconds} since the last take."""
        new = _compile_seconds()[self._seen :]
        self._seen += len(new)
        return {"compiles": len(new), "time/compile": sum(new)}

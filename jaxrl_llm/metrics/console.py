"""Console output of a run: on a terminal a status line with tables above it, elsewhere plain lines.

Long activities (compiling, evaluating, saving) are shown while they run: `with console.during("saving")`. A thread keeps the
status line's clock running meanwhile; every write holds the lock. After a closed pipe, a lost terminal or a full disk the console
stays silent.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TextIO

from jaxrl_llm.metrics.terminal import printable

# Seconds between two updates by the thread, and least seconds between two by steps.
TICK, SELDOM = 0.5, 0.1
# Seconds that an activity lasts before a terminal shows it, and before a plain log prints it.
SHOWN_AFTER, PRINTED_AFTER = 1.0, 5.0
WIDEST_BAR, NARROWEST_BAR = 30, 8
# Columns of a terminal below which tables end after the reward.
NARROW = 70


@dataclass(frozen=True)
class Progress:
    """Position of a run."""

    phase: str
    step: int
    total: int
    numbers: tuple[str, ...]
    """Metrics of the step, the most important first."""
    speed: str
    left: str
    """Time left; "" if not known yet."""


@dataclass
class Activity:
    """A long activity, and since when it runs."""

    words: str
    start: float
    is_printed: bool
    """It was printed to the plain log, or is not to be."""


def status_line(progress: Progress | None, activity: str, seconds: float, width: int) -> str:
    """Status line of at most `width` cells. Step and time are dropped last.

    Args:
        progress: position of the run, if it has one yet.
        activity: what is running; "": nothing long.
        seconds: since the activity began.
        width: of the terminal, in cells.
    """
    from rich.cells import cell_len, set_cell_size

    clock = str(timedelta(seconds=int(seconds)))
    # In the order of the line, each with its rank: the highest is dropped first.
    parts = [(0, f"{progress.step}/{progress.total}")] if progress else []
    if activity:
        free = max(width - sum(len(text) + 1 for _, text in parts) - len(clock) - 1, 0)
        parts += [(1, set_cell_size(activity, min(cell_len(activity), free))), (0, clock)]
    elif progress:
        parts += [*((1 + i, text) for i, text in enumerate(progress.numbers)), (3, progress.speed), (0, progress.left)]
    if progress:
        parts = [(4, progress.phase), *parts]
    parts = [(rank, text) for rank, text in parts if text]

    def joined() -> str:
        return " ".join(text for _, text in parts)

    while cell_len(joined()) > width and max(rank for rank, _ in parts):
        parts.remove(max(parts, key=lambda part: part[0]))
    free = min(width - cell_len(joined()) - 3, WIDEST_BAR)
    if progress and free >= NARROWEST_BAR and parts[0][0] == 4:
        done = free * progress.step // max(progress.total, 1)
        parts.insert(1, (5, f"[{'#' * done}{'.' * (free - done)}]"))
    return set_cell_size(joined(), width) if cell_len(joined()) > width else joined()


def wrapped(parts: Sequence[str], width: int | None) -> str:
    """Join the parts into lines of at most `width` cells, unless a part is longer; None: one line."""
    lines = [""]
    for part in parts:
        if width and lines[-1] and len(lines[-1]) + 1 + len(part) > width:
            lines.append("")
        lines[-1] += f" {part}" if lines[-1] else part.lstrip()
    return "\n".join(lines)


@contextmanager
def shown_on_stderr(words: str) -> Iterator[None]:
    """Show an activity on standard error, for commands whose output is a result; a terminal is cleared of it afterwards."""
    console = Console(sys.stderr)
    try:
        with console.during(words):
            yield
    finally:
        console.close()


class Console:
    """Console on a stream, to be closed; without a stream it does nothing."""

    def __init__(self, stream: TextIO | None):
        self._lock = threading.RLock()
        self._stream, self._live, self._rich, self._bar = stream, False, None, None
        self._is_silent = stream is None or stream.closed
        self._progress: Progress | None = None
        self._refreshed = -SELDOM
        self._activities: list[Activity] = []
        self._seen: set[str] = set()
        self._closing, self._clock = threading.Event(), threading.Thread(target=self._keep_time, daemon=True)
        self._guarded(self._open)

    def _open(self) -> None:
        from rich.console import Console as RichConsole
        from rich.live import Live
        from rich.text import Text

        class Terminal(RichConsole):
            def on_broken_pipe(self) -> None:
                raise BrokenPipeError  # rich would exit the process

        if hasattr(self._stream, "reconfigure"):  # a response in Chinese must not fail in an ASCII locale
            self._stream.reconfigure(errors="backslashreplace")
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._rich = Terminal(file=self._stream, highlight=False, width=None if self._live else 160)
        if self._live:
            # Refreshed by `_draw` alone: rich's own thread would meet a broken pipe where it cannot be caught.
            options = {"get_renderable": lambda: Text(self._line(), no_wrap=True), "auto_refresh": False}
            self._bar = Live(console=self._rich, redirect_stdout=self._stream is sys.stdout, **options)
            self._bar.start()

    @property
    def is_terminal(self) -> bool:
        """True for a terminal with a movable cursor."""
        return self._live

    @contextmanager
    def during(self, words: str, first: str = "") -> Iterator[None]:
        """Show `words` while the body runs; the first time `first` instead, if given.

        An activity with a `first` recurs every step, so a plain log gets only the first one.
        """
        is_first = bool(first) and first not in self._seen
        self._seen.add(first)
        with self._lock:
            is_printed = bool(first) and not is_first
            self._activities.append(Activity(first if is_first else words, time.monotonic(), is_printed))
        if not (self._is_silent or self._clock.ident):
            self._clock.start()
        try:
            yield
        finally:
            with self._lock:
                self._activities.pop()

    def text(self, text: str) -> None:
        self._guarded(lambda: self._rich.print(text, markup=False, emoji=False, soft_wrap=True))

    def step(self, progress: Progress, printed: Sequence[str]) -> None:
        """Show a step in the status line, and print the parts `printed`, on a terminal in lines that break between parts."""
        self._progress = progress
        if printed:
            self._guarded(lambda: self.text(wrapped(printed, self._rich.width - 1 if self._live else None)))
        if printed or time.monotonic() - self._refreshed >= SELDOM:
            self._guarded(self._draw)

    def table(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Print a table of sampled responses; log-prob is the sum over a response's tokens, in nats."""
        self._guarded(lambda: self._rich.print(self._grid(rows)))

    def _grid(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        from rich import box, table, text

        titles = "prompt", "response", "reward", "advantage", "log-prob", "finish"
        titles = titles[:3] if self._rich.width < NARROW else titles
        is_long = any(len(str(row.get("completion"))) > self._rich.width // 2 for row in rows)
        grid = table.Table(*titles, box=box.ROUNDED if self._live else None, show_lines=self._live and is_long)
        for row in rows:
            logprobs = row.get("logprobs")
            numbers = row.get("reward"), row.get("advantage"), None if logprobs is None else sum(map(float, logprobs))
            cells = [
                printable(str(row.get("prompt", "-")), 160 if self._live else 32),
                printable(str(row.get("completion", "-")), 480 if self._live else 56),
                *("-" if number is None else f"{float(number):.3f}" for number in numbers),
                printable(str(row.get("finish", "-")), 16),
            ]
            grid.add_row(*(text.Text(cell, overflow="fold") for cell in cells[: len(titles)]))
        return grid

    def close(self) -> None:
        self._closing.set()
        if self._clock.is_alive():
            self._clock.join(timeout=10 * TICK)
        self._guarded(self._stop)

    def _stop(self) -> None:
        if self._bar:
            self._bar.transient = self._progress is None
            self._draw()
            self._bar.stop()

    def _keep_time(self) -> None:
        while not self._closing.wait(TICK):
            self._guarded(self._tick)

    def _tick(self) -> None:
        self._draw()
        now = time.monotonic()
        for activity in self._activities if not self._live else ():
            if not activity.is_printed and now - activity.start >= PRINTED_AFTER:
                activity.is_printed = True
                self.text(f"{activity.words} ...")

    def _draw(self) -> None:
        if self._bar:
            self._bar.refresh()
            self._refreshed = time.monotonic()

    def _line(self) -> str:
        activity = self._activities[-1] if self._activities else None
        seconds = time.monotonic() - activity.start if activity else 0.0
        # The last column stays free: some terminals wrap as soon as it is written to.
        width = max(self._rich.width - 1, 1)
        return status_line(
            self._progress, activity.words if activity and seconds >= SHOWN_AFTER else "", seconds, width
        )

    def _guarded(self, show: Callable[[], None]) -> None:
        """Call `show`; stay silent from now on if the stream is gone."""
        with self._lock:
            if self._is_silent:
                return
            try:
                show()
            except OSError:
                self._is_silent = True
                with suppress(OSError):  # the interpreter flushes stdout at exit and would end with status 120
                    os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
                if self._bar:
                    with suppress(OSError):
                        self._bar.stop()

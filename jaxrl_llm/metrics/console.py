"""What a run shows while it lives: on a terminal one line that says where it is, tables above it; elsewhere plain lines.

What lasts (compiling, evaluating, saving) is said while it happens: `with screen.during("saving")`. A thread keeps the line's
clock going meanwhile; whoever draws holds the lock. A closed pipe, a lost terminal or a full disk silence the screen for good.
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

TICK, SELDOM = 0.5, 0.1  # seconds between two looks of the thread, and at least between two drawings of steps
# Seconds that something lasts before a terminal shows it, and before a plain log says it.
SHOWN_AFTER, PRINTED_AFTER = 1.0, 5.0
WIDEST_BAR, NARROWEST_BAR = 30, 8
NARROW = 70  # cells: tables on a terminal that has fewer stop behind the reward


@dataclass(frozen=True)
class Progress:
    """Where a run is."""

    phase: str
    step: int
    total: int
    told: tuple[str, ...]
    """Numbers of the step, the first the most important."""
    speed: str
    left: str
    """Time to the end; "" where it is not known yet."""


@dataclass
class Doing:
    """What is going on, since when."""

    words: str
    start: float
    is_printed: bool
    """A plain log has it, or is not to have it."""


def line(progress: Progress | None, doing: str, seconds: float, width: int) -> str:
    """One line of `width` cells at most. The step stays to the last, and the time: until the end, or of what is `doing`."""
    from rich.cells import cell_len, set_cell_size

    clock = str(timedelta(seconds=int(seconds)))
    # In the order of the line, each with its rank: the highest gives way first.
    parts = [(0, f"{progress.step}/{progress.total}")] if progress else []
    if doing:
        room = max(width - sum(len(text) + 1 for _, text in parts) - len(clock) - 1, 0)
        parts += [(1, set_cell_size(doing, min(cell_len(doing), room))), (0, clock)]
    elif progress:
        parts += [*((1 + i, text) for i, text in enumerate(progress.told)), (3, progress.speed), (0, progress.left)]
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
    """The parts in lines of `width` cells at most, as far as a part allows; None: one line."""
    lines = [""]
    for part in parts:
        if width and lines[-1] and len(lines[-1]) + 1 + len(part) > width:
            lines.append("")
        lines[-1] += f" {part}" if lines[-1] else part.lstrip()
    return "\n".join(lines)


@contextmanager
def saying(words: str) -> Iterator[None]:
    """Say on standard error what lasts, for commands whose output is an answer; nothing of it stays on a terminal."""
    screen = Screen(sys.stderr)
    try:
        with screen.during(words):
            yield
    finally:
        screen.close()


class Screen:
    """Call `close` in the end. Without a stream it does nothing."""

    def __init__(self, stream: TextIO | None):
        self._lock = threading.RLock()
        self._stream, self._live, self._screen, self._bar = stream, False, None, None
        self._is_silent = stream is None or stream.closed
        self._progress: Progress | None = None
        self._drawn = -SELDOM
        self._doing: list[Doing] = []
        self._seen: set[str] = set()
        self._closing, self._clock = threading.Event(), threading.Thread(target=self._keep_time, daemon=True)
        self._guarded(self._open)

    def _open(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        class Terminal(Console):
            def on_broken_pipe(self) -> None:
                raise BrokenPipeError  # rich would end the process

        if hasattr(self._stream, "reconfigure"):  # an ASCII locale must not fail on a response in Chinese
            self._stream.reconfigure(errors="backslashreplace")
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._screen = Terminal(file=self._stream, highlight=False, width=None if self._live else 160)
        if self._live:
            # Drawn by `_draw` alone: a refreshing thread of rich's would meet a broken pipe where nobody can catch it.
            drawn = {"get_renderable": lambda: Text(self._line(), no_wrap=True), "auto_refresh": False}
            self._bar = Live(console=self._screen, redirect_stdout=self._stream is sys.stdout, **drawn)
            self._bar.start()

    @property
    def is_terminal(self) -> bool:
        """One whose cursor moves."""
        return self._live

    @contextmanager
    def during(self, words: str, first: str = "") -> Iterator[None]:
        """Say `words` while the body lasts; the first time `first`, where that is given.

        What has a `first` is done in every step: a plain log hears of the first time alone.
        """
        is_first = bool(first) and first not in self._seen
        self._seen.add(first)
        with self._lock:
            is_printed = bool(first) and not is_first
            self._doing.append(Doing(first if is_first else words, time.monotonic(), is_printed))
        if not (self._is_silent or self._clock.ident):
            self._clock.start()
        try:
            yield
        finally:
            with self._lock:
                self._doing.pop()

    def text(self, text: str) -> None:
        self._guarded(lambda: self._screen.print(text, markup=False, emoji=False, soft_wrap=True))

    def step(self, progress: Progress, said: Sequence[str]) -> None:
        """The line is about this step from now on; `said` is printed, on a terminal in lines that end between two of its parts."""
        self._progress = progress
        if said:
            self._guarded(lambda: self.text(wrapped(said, self._screen.width - 1 if self._live else None)))
        if said or time.monotonic() - self._drawn >= SELDOM:
            self._guarded(self._draw)

    def table(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Print sampled responses; log-prob is the sum over a response's tokens, in nats."""
        self._guarded(lambda: self._screen.print(self._grid(rows)))

    def _grid(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        from rich import box, table, text

        titles = "prompt", "response", "reward", "advantage", "log-prob", "finish"
        titles = titles[:3] if self._screen.width < NARROW else titles
        is_long = any(len(str(row.get("completion"))) > self._screen.width // 2 for row in rows)
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
        for doing in self._doing if not self._live else ():
            if not doing.is_printed and now - doing.start >= PRINTED_AFTER:
                doing.is_printed = True
                self.text(f"{doing.words} ...")

    def _draw(self) -> None:
        if self._bar:
            self._bar.refresh()
            self._drawn = time.monotonic()

    def _line(self) -> str:
        doing = self._doing[-1] if self._doing else None
        seconds = time.monotonic() - doing.start if doing else 0.0
        # The last column stays free: some terminals wrap as soon as it is written to.
        width = max(self._screen.width - 1, 1)
        return line(self._progress, doing.words if doing and seconds >= SHOWN_AFTER else "", seconds, width)

    def _guarded(self, show: Callable[[], None]) -> None:
        """Where nobody reads any more, silence for good."""
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

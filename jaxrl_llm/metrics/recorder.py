"""What a run tells about itself: scalars and sampled text -> metrics.jsonl, rollouts.jsonl, TensorBoard, the console.

Enters: flat "room/name" scalars once per step, rows of sampled responses, the byte sizes a checkpoint remembered. Leaves: files
with exactly one row per step, whatever was killed or resumed in between. Knows nothing of models, batches or algorithms; imports
no jax until a `CompileCounter` is made.
"""

import functools
import json
import math
import mmap
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Self

from annotated_types import Ge
from pydantic import ConfigDict

from jaxrl_llm.errors import UserError
from jaxrl_llm.metrics.console import Progress, Screen
from jaxrl_llm.metrics.tensorboard import Boards, why_not
from jaxrl_llm.metrics.terminal import printable, printable_lines

METRICS, ROLLOUTS = "metrics.jsonl", "rollouts.jsonl"
SHOWN = (  # metric, word on the console, format
    ("loss", "loss", ".4f"),
    ("reward", "reward", ".3f"),
    ("groups/kept", "kept", ".0f"),
    ("eval/exact", "exact", ".3f"),
    ("eval/pass@1", "pass@1", ".3f"),
    ("completions/mean_length", "length", ".1f"),
    ("entropy", "entropy", ".3f"),
    ("kl", "kl", ".2e"),
    ("ratio/max", "ratio max", ".3f"),
    ("grad_norm", "grad", ".2e"),
    ("tokens_per_s", "tokens/s", ",.0f"),
)


@dataclass(frozen=True)
class MetricsConfig:
    """What is written and shown, and how often."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    console_every: Annotated[int, Ge(1)] = 1
    """Steps between console lines. Steps with an evaluation and the last step are always shown."""
    samples_every: Annotated[int, Ge(0)] = 10
    """Steps between printed tables of sampled responses; 0 = never."""
    rollouts_every: Annotated[int, Ge(0)] = 1
    """Steps between records of whole rollouts in rollouts.jsonl; 0 = never."""
    rollout_groups: Annotated[int, Ge(-1)] = 4
    """Groups (prompts with all their samples) recorded each time; -1 = all."""
    tensorboard: bool = True
    """Write TensorBoard scalars under <run>/tensorboard. Needs tensorboardX; where it is missing, the start of a run says so."""


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
        """`function`, whose calls are timed."""

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
    """Counts this process's XLA compilations from its own birth on, loads from jax's persistent cache included."""

    def __init__(self):
        self._seen = len(_compile_seconds())

    def take(self) -> dict[str, float]:
        """Return {"compiles": count, "time/compile": seconds} since the last take."""
        new = _compile_seconds()[self._seen :]
        self._seen += len(new)
        return {"compiles": len(new), "time/compile": sum(new)}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON-lines file; a torn last line is dropped, one before it that is not JSON raises UserError."""
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(json.loads(line))
            except ValueError:
                if not file.read(1):
                    break
                raise UserError(f"{path} line {number}: got {line[:60]!r}, want one JSON object per line") from None
    return rows


def _jsonable(value: Any, digits: int = 17) -> Any:
    """Return `value` as JSON can hold it: arrays as lists, floats to `digits` significant digits, non-finite ones as None."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item, digits) for item in value]
    if hasattr(value, "tolist"):
        return _jsonable(value.tolist(), digits)
    number = float(value)
    return float(f"{number:.{digits}g}") if math.isfinite(number) else None


class _JsonLines:
    """An append-only file of rows. A row reaches the kernel before `append` returns, so a kill loses none.

    On a full disk the rows wait in memory for the next `append`: training outlives a full disk, and no row is torn.
    """

    def __init__(self, path: Path):
        self._file = open(path, "ab", buffering=0)
        self.truncate(self.size())

    def truncate(self, size: int) -> None:
        """Keep the whole lines among the first `size` bytes."""
        self._waiting = b""
        self._file.truncate(size := min(size, self.size()))  # to a larger size it would fill up with NUL bytes
        if size:  # an empty file cannot be mapped
            with open(self._file.name, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                end = content.rfind(b"\n") + 1
            self._file.truncate(end)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        # ASCII escapes: a lone surrogate or a line separator in model text can neither fail the encoding nor split a row.
        self._waiting += b"".join(json.dumps(row, allow_nan=False).encode("ascii") + b"\n" for row in rows)
        with suppress(OSError):
            self._write()

    def _write(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def sync(self) -> int:
        self._write()
        os.fsync(self._file.fileno())
        return self.size()

    def close(self) -> None:
        self.append([])
        self._file.close()


def _tell(row: Mapping[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    """Return "word value" for each of `names` that `row` has, in the order of SHOWN."""
    shown = [(word, row[name], form) for name, word, form in SHOWN if name in names and name in row]
    return tuple(f"{word} {'nan' if value is None else format(value, form)}" for word, value, form in shown)


class Pace:
    """How fast the steps are, evaluations apart, and how long the rest takes."""

    def __init__(self):
        self._past: dict[
            str, deque[tuple[int, float]]
        ] = {}  # phase -> (step, seconds without evaluations) of the last steps
        self._evaluating, self._last = 0.0, 0.0  # seconds of all evaluations, and of the last one

    def evaluated(self, seconds: float) -> None:
        self._evaluating, self._last = self._evaluating + seconds, seconds

    def stepped(self, phase: str, step: int) -> None:
        past = self._past.setdefault(phase, deque(maxlen=20))
        past.append((step, time.monotonic() - self._evaluating))

    def told(self, phase: str, total: int, evaluations: int) -> tuple[str, str]:
        """("s/step", "left h:mm:ss") with so many evaluations to come; "" before two steps of the phase are known."""
        (first, start), (last, end) = self._past[phase][0], self._past[phase][-1]
        if last <= first:
            return "", ""
        step_s = (end - start) / (last - first)
        left = timedelta(seconds=round(max(0, total - last) * step_s + evaluations * self._last))
        return f"{step_s:.2f} s/step", f"left {left}"


class Recorder:
    """The one writer of a run's metrics and rollouts: a context manager whose methods do nothing unless `active`.

    After a restore call `truncate` with the checkpoint's `offsets` (zeros where there is none), then `log` once per step. Set
    `total_steps` when a phase with its own count begins. A closed pipe, a lost terminal or a full disk do not stop training.
    """

    def __init__(
        self, run_dir: Path, config: MetricsConfig, total_steps: int, active: bool,
        evaluations: Callable[[int], int] = lambda step: 0,
    ):  # fmt: skip
        """`evaluations`: how many are to come after a step."""
        self.run_dir, self.config, self.total_steps, self.active = Path(run_dir), config, total_steps, active
        self._files: dict[str, _JsonLines] = {}
        self._boards: Boards | None = None
        self._screen, self._pace, self._evaluations = Screen(None), Pace(), evaluations

    def __enter__(self) -> Self:
        if not self.active:
            return self
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._files = {name: _JsonLines(self.run_dir / name) for name in (METRICS, ROLLOUTS)}
        self._screen = Screen(sys.stdout)
        if self.config.tensorboard:
            missing = why_not()
            self._boards = None if missing else Boards(self.run_dir / "tensorboard")
            if missing:
                self.message(missing)
        return self

    def __exit__(self, *_: object) -> None:
        self._screen.close()
        if self._boards:
            self._boards.close()
        for file in self._files.values():
            with suppress(OSError):
                file.close()

    def during(self, words: str, first: str = "") -> AbstractContextManager[None]:
        """Say what is going on while the body lasts: `Screen.during`."""
        return self._screen.during(words, first)

    @contextmanager
    def evaluating(self, words: str) -> Iterator[None]:
        """The same for an evaluation, whose seconds are none of its step's."""
        start = time.monotonic()
        with self.during(words):
            yield
        self._pace.evaluated(time.monotonic() - start)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record one step: `metrics` are scalars (JSON null where non-finite); "phase" may be "warm_start" or "rl"."""
        if not self.active:
            return
        row = {name: _jsonable(value) for name, value in metrics.items()}
        self._files[METRICS].append([{"step": int(step), **row}])
        phase = str(row.get("phase", ""))
        if self._boards:
            with suppress(OSError):
                self._boards.draw(phase, int(step), row)
        self._pace.stepped(phase, step)
        is_evaluated = any(name.startswith("eval/") for name in row)
        is_due = step % self.config.console_every == 0 or step == self.total_steps or is_evaluated
        if is_due or self._screen.is_terminal:
            self._show(int(step), phase, row, is_evaluated)

    def _show(self, step: int, phase: str, row: Mapping[str, Any], is_evaluated: bool) -> None:
        speed, left = self._pace.told(phase, self.total_steps, self._evaluations(step))
        name = printable(phase or "train").replace("_", " ")
        head = f"{name} step" if name == "warm start" else "step"
        is_said = is_evaluated or not self._screen.is_terminal
        numbers = _tell(row, [name for name, _, _ in SHOWN])
        said = (
            [f"{head} {step}/{self.total_steps}", *numbers, *(f" {part}" for part in (speed, left) if part)]
            if is_said
            else []
        )
        short = _tell(row, ["reward", "tokens_per_s"] if "reward" in row else ["loss"])
        self._screen.step(Progress(name, step, self.total_steps, short, speed, left), said)

    def offsets(self) -> dict[str, int]:
        """Return {file name: bytes} after an fsync, for the checkpoint; {} where not active. Raises OSError on a full disk."""
        return {name: file.sync() for name, file in self._files.items()}

    def truncate(self, offsets: Mapping[str, int]) -> None:
        """Cut the files back to `offsets`: what was written after that checkpoint will be written again."""
        for name in self._files.keys() & offsets.keys():
            if (size := self._files[name].size()) < offsets[name]:
                self.message(f"{name}: got {size} bytes, want the checkpoint's {offsets[name]}; rows are missing")
            self._files[name].truncate(offsets[name])

    def wants(self, step: int, every: int) -> bool:
        """Whether this process records at `step` what is due each `every` steps (0 = never); ask before building rows."""
        return self.active and every > 0 and step % every == 0

    def rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append one line per row to rollouts.jsonl, floats to 6 digits.

        Keys: uid, sample, prompt, completion, tokens (text pieces), logprobs, entropy (nats), reward, advantage, finish.
        """
        if self.active:
            self._files[ROLLOUTS].append([{"step": int(step), **_jsonable(row, digits=6)} for row in rows])

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Print a table of responses; rows as in `rollouts`, missing keys allowed."""
        self._screen.table(rows)

    def message(self, text: str) -> None:
        """Print `text`, its control characters escaped line by line."""
        self._screen.text(printable_lines(text))

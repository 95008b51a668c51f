"""Records of a run: scalars and sampled text -> metrics.jsonl, rollouts.jsonl, TensorBoard, Weights & Biases, the console.

Input: flat "package/name" scalars once per step, rows of sampled responses, the file sizes that a checkpoint stores. Output: files
with exactly one row per step, whatever was killed or resumed in between. Independent of models, batches and algorithms; imports no
jax.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from jaxrl_llm.metrics import tensorboard, weights_and_biases
from jaxrl_llm.metrics.config import MetricsConfig
from jaxrl_llm.metrics.console import Console, Progress
from jaxrl_llm.metrics.json_lines import METRICS, ROLLOUTS, JsonRecords, jsonable
from jaxrl_llm.metrics.pace import Pace
from jaxrl_llm.metrics.terminal import printable, printable_lines
from jaxrl_llm.metrics.writer import Writer

# Files that belong to one run, and not to the next one in the same directory.
RECORDS = METRICS, ROLLOUTS, weights_and_biases.RUN_FILE
SHOWN = (  # metric, word on the console, format
    ("loss", "loss", ".4f"),
    ("reward", "reward", ".3f"),
    ("groups/kept", "kept", ".0f"),
    ("reuse/tokens", "reused", ".2f"),
    ("eval/exact", "exact", ".3f"),
    ("eval/pass@1", "pass@1", ".3f"),
    ("completions/mean_length", "length", ".1f"),
    ("entropy", "entropy", ".3f"),
    ("kl", "kl", ".2e"),
    ("ratio/max", "ratio max", ".3f"),
    ("ess/sequences", "ess", ".2f"),
    ("grad_norm", "grad", ".2e"),
    ("tokens_per_s", "tokens/s", ",.0f"),
)


def in_words(row: Mapping[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    """ "word value" for each of `names` in `row`, in the order of SHOWN."""
    # Samples of the policy itself have one of 1, but for rounding.
    hidden = {"ess/sequences"} if (row.get("ess/sequences") or 0) > 0.995 else set()
    shown = [(word, row[name], form) for name, word, form in SHOWN if name in names and name in row.keys() - hidden]
    return tuple(f"{word} {'nan' if value is None else format(value, form)}" for word, value, form in shown)


class Recorder:
    """The only writer of a run's metrics and rollouts: a context manager whose methods do nothing unless `active`.

    After a restore call `truncate` with the checkpoint's `offsets`, then `log` once per step. A closed pipe, a lost terminal or a
    full disk do not stop training.
    """

    def __init__(
        self, run_dir: Path, config: MetricsConfig, total_steps: int, active: bool,
        evaluations: Callable[[int], int] = lambda step: 0, run_config: Mapping[str, Any] = MappingProxyType({}),
    ):  # fmt: skip
        """
        Args:
            run_dir: the run directory.
            config: what is written and shown, and how often.
            total_steps: number of the last step.
            active: write and show; False in all processes of a job but one.
            evaluations: number of evaluations still to come after a step.
            run_config: config of the whole run, as W&B shows it.
        """
        self.run_dir, self.config, self.total_steps, self.active = Path(run_dir), config, total_steps, active
        self._records: JsonRecords | None = None
        self._writers: list[Writer] = []
        self._console, self._pace, self._evaluations = Console(None), Pace(), evaluations
        self._run_config = run_config

    def __enter__(self) -> Self:
        if not self.active:
            return self
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._records = JsonRecords(self.run_dir)
        self._writers = [self._records]
        self._console = Console(sys.stdout)
        config, run_dir = self.config, self.run_dir
        if config.tensorboard:
            self._add(tensorboard.why_unavailable(), partial(tensorboard.TensorBoard, run_dir / "tensorboard"))
        if config.wandb:
            given = run_dir, config.wandb, self._run_config, self.message
            self._add(weights_and_biases.why_unavailable(), partial(weights_and_biases.WeightsAndBiases, *given))
        return self

    def _add(self, missing: str, open_writer: partial[Writer]) -> None:
        if missing:
            self.message(missing)
            return
        try:
            self._writers.append(open_writer())
        except OSError as error:  # a full disk, or no more processes
            self.message(f"{open_writer.func.__name__} is left out: {error}")

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        with self.during("finishing the records"):
            for writer in self._writers:
                writer.close(failed=error_type is not None)
        self._console.close()

    def during(self, words: str, first: str = "") -> AbstractContextManager[None]:
        """Show `words` while the body runs: `Console.during`."""
        return self._console.during(words, first)

    @contextmanager
    def evaluating(self, words: str) -> Iterator[None]:
        """The same for an evaluation, whose seconds do not count as its step's."""
        start = time.monotonic()
        with self.during(words):
            yield
        self._pace.evaluated(time.monotonic() - start)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record one step: `metrics` are scalars (JSON null where non-finite); "phase" may be "warm_start" or "rl"."""
        if not self.active:
            return
        row = {name: jsonable(value) for name, value in metrics.items()}
        phase = str(row.get("phase", ""))
        for writer in self._writers:
            writer.scalars(int(step), phase, row)
        self._pace.stepped(phase, step)
        is_evaluated = any(name.startswith("eval/") for name in row)
        is_due = step % self.config.console_every == 0 or step == self.total_steps or is_evaluated
        if is_due or self._console.is_terminal:
            self._show(int(step), phase, row, is_evaluated)

    def _show(self, step: int, phase: str, row: Mapping[str, Any], is_evaluated: bool) -> None:
        speed, left = self._pace.in_words(phase, self.total_steps, self._evaluations(step))
        name = printable(phase or "train").replace("_", " ")
        head = f"{name} step" if name == "warm start" else "step"
        numbers = in_words(row, [name for name, _, _ in SHOWN])
        printed = [f"{head} {step}/{self.total_steps}", *numbers, *(f" {part}" for part in (speed, left) if part)]
        is_printed = is_evaluated or not self._console.is_terminal
        short = in_words(row, ["reward", "tokens_per_s"] if "reward" in row else ["loss"])
        self._console.step(Progress(name, step, self.total_steps, short, speed, left), printed if is_printed else [])

    def offsets(self) -> dict[str, int]:
        """Sizes {file name: bytes} after an fsync, for the checkpoint; {} if not active. Raises OSError on a full disk."""
        return self._records.offsets() if self._records else {}

    def truncate(self, offsets: Mapping[str, int]) -> None:
        """Cut the files to `offsets`: rows written after that checkpoint will be written again."""
        for missing in self._records.truncate(offsets) if self._records else ():
            self.message(missing)

    def wants(self, step: int, every: int) -> bool:
        """True if this process records at `step` what is due every `every` steps (0: never); check before building rows."""
        return self.active and every > 0 and step % every == 0

    def rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record sampled responses.

        Keys: uid, sample, prompt, completion, tokens (text pieces), logprobs, entropy (nats), reward, advantage, finish.
        """
        for writer in self._writers:
            writer.rollouts(int(step), rows)

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Print a table of responses; rows as in `rollouts`, missing keys allowed."""
        self._console.table(rows)

    def message(self, text: str) -> None:
        """Print `text`, its control characters escaped line by line."""
        self._console.text(printable_lines(text))

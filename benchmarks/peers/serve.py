"""Worker side of the comparison: one generator or trainer per process, with requests and answers as lines
of JSON.

    {"load": {"directory": .., "compute": .., "variant": ..}}   -> {"facts": {..}, "seconds": .., "others": .., "peak_bytes": ..}
    {"generate": {"prompts": .., "samples": .., ..}}            -> {"tokens": [[..]], "seconds": .., "others": .., "peak_bytes": ..}
    {"step": {}}                                                -> {"rollout_s": .., .., "seconds": .., "others": .., ..}

Standard library only: it runs in every peer's environment.
"""

import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Call:
    """One call of a generator. No token ends a row."""

    prompts: list[list[int]]
    """All of the same length."""
    samples: int
    """Rows per prompt."""
    new_tokens: int
    top_p: float
    """1.0: the whole distribution. Temperature 1."""
    greedy: bool
    """Always the most likely token; `top_p` is ignored."""
    seed: int


Generate = Callable[[Call], Any]
"""Returns tokens [rows][new_tokens], prompt-major, on the host."""
Load = Callable[..., tuple[Generate, dict]]
"""(directory, compute, variant) -> (generator, facts about it). `compute` is a dtype."""
Step = Callable[[], dict]
"""Runs one training step; returns `rollout_s`, seconds of sampling; `tokens`, number of sampled tokens;
`updates`, optimizer steps since the start."""
LoadTrainer = Callable[..., tuple[Step, dict]]
"""(directory, words, compute, variant, beta) -> (step, facts about it). `words` is a directory with tokenizer and prompts."""


def peak_bytes() -> int:
    """Return the peak resident memory of this process and its children in bytes. Without VmHWM in /proc: ru_maxrss of this process,
    which may include its parent's size."""
    own = _peak_of("self")
    if own is not None:
        return own + sum(_peak_of(child) or 0 for child in _children())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _peak_of(process: str) -> int | None:
    try:
        found = re.search(r"^VmHWM:\s*(\d+) kB", Path(f"/proc/{process}/status").read_text(), re.M)
    except OSError:
        return None
    return int(found.group(1)) * 1024 if found else None


def _children() -> list[str]:
    try:
        return [
            child for task in Path("/proc/self/task").iterdir() for child in (task / "children").read_text().split()
        ]
    except OSError:
        return []


def machine_seconds() -> float | None:
    """Return the busy CPU seconds of the whole machine, stolen time included; None without /proc/stat."""
    try:
        user, nice, system, _, _, interrupts, soft, stolen = (
            Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        )
    except OSError:
        return None
    return sum(map(int, (user, nice, system, interrupts, soft, stolen))) / os.sysconf("SC_CLK_TCK")


class Clock:
    """Wall-clock seconds of its body, and the share of the machine that other processes used meanwhile."""

    def __enter__(self) -> "Clock":
        self._machine, self._own, self._start = machine_seconds(), time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        own, machine = time.process_time() - self._own, machine_seconds()
        self.others = (
            0.0 if machine is None else max(machine - self._machine - own, 0.0) / (self.seconds * os.cpu_count())
        )
        """Share of all cores' time used by others. /proc/stat counts in hundredths of a second: inaccurate below 0.05."""


def versions(*packages: str) -> dict[str, str]:
    def of(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "none"

    return {"python": ".".join(map(str, sys.version_info[:3]))} | {name: of(name) for name in packages}


def serve(load: Load) -> None:
    """Serve a generator until the input ends."""

    def tokens_of(found: Any) -> dict:
        return {"tokens": [[int(token) for token in row] for row in found]}

    _answer(load, lambda generate, given: generate(Call(**given)), tokens_of)


def serve_steps(load: LoadTrainer) -> None:
    """Serve a trainer until the input ends."""
    _answer(load, lambda step, given: step(**given), lambda found: found)


def _answer(load: Callable, ask: Callable[[Callable, dict], Any], shown: Callable[[Any], dict]) -> None:
    """Answer requests until the input ends. Output of libraries is redirected to stderr: stdout holds only answers."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    loaded = None
    for line in sys.stdin:
        [(verb, given)] = json.loads(line).items()
        with Clock() as clock:
            if verb == "load":
                loaded, facts = load(**given)
            else:
                found = ask(loaded, given)
        answer = {"facts": facts} if verb == "load" else shown(found)
        measured = {"seconds": clock.seconds, "others": clock.others, "peak_bytes": peak_bytes()}
        print(json.dumps(measured | answer), file=answers, flush=True)

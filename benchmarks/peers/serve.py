"""A worker's side of the comparison: one generator or trainer in a process of its own, asked by lines of JSON, answering by lines
of JSON.

    {"load": {"directory": .., "compute": .., "variant": ..}}   -> {"facts": {..}, "seconds": .., "others": .., "peak_bytes": ..}
    {"generate": {"prompts": .., "samples": .., ..}}            -> {"tokens": [[..]], "seconds": .., "others": .., "peak_bytes": ..}
    {"step": {}}                                                -> {"rollout_s": .., .., "seconds": .., "others": .., ..}

Standard library alone: it runs in every peer's environment.
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
    """All of one length."""
    samples: int
    """Rows to sample for each prompt."""
    new_tokens: int
    top_p: float
    """1.0: from the whole distribution, at temperature 1."""
    greedy: bool
    """The likeliest token always; `top_p` is then without meaning."""
    seed: int


Generate = Callable[[Call], Any]
"""To tokens [rows][new_tokens], prompt-major, on the host."""
Load = Callable[..., tuple[Generate, dict]]
"""(directory, compute, variant) to the generator and what is to be known of it. `compute` is a dtype."""
Step = Callable[[], dict]
"""One whole step of training; what it says of itself: `rollout_s`, seconds of its sampling; `tokens`, how many were sampled;
`updates`, steps of the optimizer since the start."""
LoadTrainer = Callable[..., tuple[Step, dict]]
"""(directory, words, compute, variant, beta) to the step and what is to be known of it. `words` holds tokenizer and prompts."""


def peak_bytes() -> int:
    """The most memory this process and those that it started have had resident. Where /proc has no VmHWM, ru_maxrss of this one,
    which a parent's size may hide in."""
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
    """CPU seconds that the whole machine has worked, or that its host took from it. None where there is no /proc/stat."""
    try:
        user, nice, system, _, _, interrupts, soft, stolen = (
            Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        )
    except OSError:
        return None
    return sum(map(int, (user, nice, system, interrupts, soft, stolen))) / os.sysconf("SC_CLK_TCK")


class Clock:
    """Wall-clock seconds of what runs inside it, and who else worked on the machine meanwhile."""

    def __enter__(self) -> "Clock":
        self._machine, self._own, self._start = machine_seconds(), time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        own, machine = time.process_time() - self._own, machine_seconds()
        self.others = (
            0.0 if machine is None else max(machine - self._machine - own, 0.0) / (self.seconds * os.cpu_count())
        )
        """The share of all cores' time that others had. /proc/stat counts in hundredths of a second: below 0.05 it says little."""


def versions(*packages: str) -> dict[str, str]:
    def of(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "none"

    return {"python": ".".join(map(str, sys.version_info[:3]))} | {name: of(name) for name in packages}


def serve(load: Load) -> None:
    """Answer for a generator until the input ends."""

    def tokens_of(found: Any) -> dict:
        return {"tokens": [[int(token) for token in row] for row in found]}

    _answer(load, lambda generate, given: generate(Call(**given)), tokens_of)


def serve_steps(load: LoadTrainer) -> None:
    """Answer for a trainer until the input ends."""
    _answer(load, lambda step, given: step(**given), lambda found: found)


def _answer(load: Callable, ask: Callable[[Callable, dict], Any], shown: Callable[[Any], dict]) -> None:
    """What libraries print goes to stderr: stdout holds the answers alone."""
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
        said = {"seconds": clock.seconds, "others": clock.others, "peak_bytes": peak_bytes()}
        print(json.dumps(said | answer), file=answers, flush=True)

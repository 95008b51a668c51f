"""Timing of programs in turns, so that a disturbance of the machine affects all of them alike."""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from jaxrl_llm.perf.ceilings import timed

MIN_CALLS, MAX_CALLS = 3, 25


@dataclass(frozen=True)
class Timing:
    """Seconds per call, the computation of the result included."""

    first: float
    """The first call, which compiles; not part of the statistics."""
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def as_dict(self) -> dict:
        return {
            "median_s": self.median,
            "low_s": min(self.seconds),
            "high_s": max(self.seconds),
            "repetitions": len(self.seconds),
            "first_call_s": self.first,
        }


def alternate(
    calls: dict[str, Callable[[], object]], seconds: float, deadline: float = float("inf")
) -> dict[str, Timing]:
    """Call each once to compile and once to time it, then all of them in turns, for about `seconds` in total.

    A call repeats `MIN_CALLS` to `MAX_CALLS` times, beyond `MIN_CALLS` only within its equal share of the time. From `deadline`
    (`time.monotonic()`) on no further call starts, and a program that never ran is left out of the result.
    """
    first, taken = {}, {name: [] for name in calls}
    for name, call in calls.items():
        if time.monotonic() < deadline:
            first[name] = timed(call)
            taken[name].append(timed(call))
            print(f"{name}: first call {first[name]:.1f} s, then {taken[name][0]:.3f} s", file=sys.stderr, flush=True)
    share = seconds / max(len(calls), 1)
    while due := [
        n for n in first if len(taken[n]) < MIN_CALLS or (len(taken[n]) < MAX_CALLS and sum(taken[n]) < share)
    ]:
        for name in due:
            if time.monotonic() >= deadline:
                return {n: Timing(first[n], tuple(t)) for n, t in taken.items() if t}
            taken[name].append(timed(calls[name]))
    return {n: Timing(first[n], tuple(t)) for n, t in taken.items() if t}

"""Seconds of programs, taken in turns: what disturbs the machine for a while then disturbs all of them alike."""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from jaxrl_llm.perf.ceilings import timed

LEAST, MOST = 3, 25


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, the results waited for."""

    first: float
    """The first call, which compiles; in no statistic."""
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
    """Call each once to compile and once to have a time at all, then all of them in turns, about `seconds` together.

    A call repeats `LEAST` to `MOST` times, past `LEAST` only while it has spent less than its equal share. From `deadline`
    (`time.monotonic()`) on no further repetition starts, and a call that never started is left out of the answer.
    """
    first, taken = {}, {name: [] for name in calls}
    for name, call in calls.items():
        if time.monotonic() < deadline:
            first[name] = timed(call)
            taken[name].append(timed(call))
            print(f"{name}: first call {first[name]:.1f} s, then {taken[name][0]:.3f} s", file=sys.stderr, flush=True)
    share = seconds / max(len(calls), 1)
    while due := [n for n in first if len(taken[n]) < LEAST or (len(taken[n]) < MOST and sum(taken[n]) < share)]:
        for name in due:
            if time.monotonic() >= deadline:
                return {n: Timing(first[n], tuple(t)) for n, t in taken.items() if t}
            taken[name].append(timed(calls[name]))
    return {n: Timing(first[n], tuple(t)) for n, t in taken.items() if t}

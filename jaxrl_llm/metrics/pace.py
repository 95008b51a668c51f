"""Speed of a run and the time it has left."""

import time
from collections import deque
from datetime import timedelta


class Pace:
    """Seconds per step without evaluations, and the time left."""

    def __init__(self):
        # By phase: step and seconds without evaluations, of the last steps.
        self._past: dict[str, deque[tuple[int, float]]] = {}
        # Seconds of all evaluations, and of the last one.
        self._evaluating, self._last = 0.0, 0.0

    def evaluated(self, seconds: float) -> None:
        self._evaluating, self._last = self._evaluating + seconds, seconds

    def stepped(self, phase: str, step: int) -> None:
        past = self._past.setdefault(phase, deque(maxlen=20))
        past.append((step, time.monotonic() - self._evaluating))

    def in_words(self, phase: str, total: int, evaluations: int) -> tuple[str, str]:
        """("s/step", "left h:mm:ss") with `evaluations` still to come; "" before two steps of the phase are known."""
        (first, start), (last, end) = self._past[phase][0], self._past[phase][-1]
        if last <= first:
            return "", ""
        step_s = (end - start) / (last - first)
        left = timedelta(seconds=round(max(0, total - last) * step_s + evaluations * self._last))
        return f"{step_s:.2f} s/step", f"left {left}"

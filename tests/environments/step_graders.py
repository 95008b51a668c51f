"""Graders with steps. The completion decides what they return."""

import numpy as np


def lengths(sample):
    """Characters of each step."""
    return [len(step) for step in sample.steps]


def named(sample):
    """What the first step names, one number per step without."""
    kind, steps = sample.steps[0].rstrip(";"), len(sample.steps)
    return {
        "short": [1.0] * (steps - 1),
        "long": [1.0] * (steps + 1),
        "one": 1.0,
        "none": None,
        "nan": [1.0] * (steps - 1) + [float("nan")],
        "inf": [float("-inf")] * steps,
        "large": [1e39] * steps,
        "huge": [2e38] * steps,
        "str": "1" * steps,
        "strs": ["1"] * steps,
        "nested": [[1.0]] * steps,
        "set": set(range(steps)),
        "tuple": (True,) * steps,
        "array": np.arange(steps) / np.float32(4),
        "square": np.ones((steps, 1)),
        "scalar": np.float64(1),
    }.get(kind, [float(n) for n in range(steps)])


class InGroups:
    """Steps less the mean number of steps of the group, or too few lists."""

    def grade_group(self, samples):
        mean = sum(len(sample.steps) for sample in samples) / len(samples)
        found = [np.full(len(sample.steps), len(sample.steps) - mean) for sample in samples]
        return found[1:] if samples[0].completion.startswith("few") else found

    def __call__(self, sample):
        raise AssertionError

    def extract(self, sample):
        return sample.steps[-1]

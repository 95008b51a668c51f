"""Custom graders that mostly work; the row decides when they fail."""

import time

from jaxrl_llm.environments.grader import Sample


def counts_letters(sample: Sample) -> float | str:
    """Fraction of letters; raise on one row in ten, sleep forever on one in fifty, return a string on one in a hundred."""
    row = int(sample.columns["id"])
    if row % 10 == 0:
        raise ValueError("cannot read this")
    if row % 50 == 7:
        time.sleep(10_000)
    if row % 100 == 3:
        return "0.5"
    return sum(c.isalpha() for c in sample.completion) / max(len(sample.completion), 1)


def odd(sample: Sample) -> float:
    """Reward that an untrained policy earns on about half of its responses."""
    return float(sum(map(ord, sample.completion)) % 2)


def odd_if_readable(sample: Sample) -> float:
    """Raise if the first digit is below 3, so that some groups are kept by no filter."""
    if int(sample.prompt[1]) < 3:
        raise ValueError("cannot read this")
    return odd(sample)


def even_steps(sample: Sample) -> list[float]:
    """One number per step: 1 if the step has an even number of characters. Raise if the first digit is below 3."""
    if int(sample.prompt[1]) < 3:
        raise ValueError("cannot read this")
    return [float(len(step) % 2 == 0) for step in sample.steps]

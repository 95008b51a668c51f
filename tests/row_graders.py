"""Graders as people write them: right most of the time, and what else they do is decided by the row."""

import time

from jaxrl_llm.environments.grader import Sample


def counts_letters(sample: Sample) -> float | str:
    """The share of letters; raises on one row in ten, sleeps for ever on one in fifty, returns a string on one in a hundred."""
    row = int(sample.columns["id"])
    if row % 10 == 0:
        raise ValueError("cannot read this")
    if row % 50 == 7:
        time.sleep(10_000)
    if row % 100 == 3:
        return "0.5"
    return sum(c.isalpha() for c in sample.completion) / max(len(sample.completion), 1)


def odd(sample: Sample) -> float:
    """What a policy that knows nothing can earn already."""
    return float(sum(map(ord, sample.completion)) % 2)


def odd_if_readable(sample: Sample) -> float:
    """Raises where the first digit is below 3, so that there are groups that no filter keeps."""
    if int(sample.prompt[1]) < 3:
        raise ValueError("cannot read this")
    return odd(sample)

"""Graders that misbehave if the completion names an action, and otherwise return the completion as a number."""

import os
import signal
import subprocess
import sys
import time
from fractions import Fraction

import numpy as np

NOT_A_FUNCTION = 7


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no text")


RETURNS = {
    "nan": float("nan"),
    "inf": -float("inf"),
    "too large for f32": 1e39,
    "huge int": 10**5000,
    "f16 inf": np.float16("inf"),
    "none": None,
    "str": "1.0",
    "complex": 1j,
    "list": [1.0],
    "array": np.array(1.0),
    "long": "a" * 20_000_000,
    "bool": True,
    "int": 3,
    "np.bool": np.bool_(True),
    "np.int8": np.int8(-2),
    "np.float16": np.float16(0.5),
    "fraction": Fraction(1, 4),
}


def _raise(error):
    raise error


def _spin():
    while True:
        pass


def _spin_ignoring_sigterm():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _spin()


def _sleep_with_a_child():
    child = subprocess.Popen(["sleep", "600"])
    with open(os.environ["CHILD_PID_FILE"], "w") as file:
        file.write(str(child.pid))
    time.sleep(600)


ACTIONS = {
    "raise": lambda: _raise(ValueError("no number\nin sight")),
    "unprintable": lambda: _raise(Unprintable()),
    "sys.exit": lambda: sys.exit(3),
    "spin": _spin,
    "spin ignoring SIGTERM": _spin_ignoring_sigterm,
    "sleep": lambda: time.sleep(600),
    "sleep with a child": _sleep_with_a_child,
    "os._exit": lambda: os._exit(0),
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGSEGV": lambda: os.kill(os.getpid(), signal.SIGSEGV),
}


def by_completion(sample):
    if sample.completion in RETURNS:
        return RETURNS[sample.completion]
    if sample.completion in ACTIONS:
        return ACTIONS[sample.completion]()
    return float(sample.completion)


def prints_a_lot(sample):
    for _ in range(100):
        print("x" * 1_000_000)
    return 1


def write_pid(sample):
    with open(sample.prompt, "w") as file:
        file.write(f"{os.getpid()}\n")
    _spin()


def surroundings(sample):
    """1 if the worker is set up as documented, else a sum whose digits show which check failed."""
    return 1 + sum(
        (
            10 * ("jax" in sys.modules or "flax" in sys.modules or "pydantic" in sys.modules),
            100 * (os.environ["OMP_NUM_THREADS"] != "1"),
            1000 * (signal.getsignal(signal.SIGINT) != signal.SIG_IGN),
            10_000 * (signal.getsignal(signal.SIGTERM) != signal.SIG_DFL),
        )
    )


def disturbs(sample):
    import random

    random.seed(0)
    np.random.seed(0)
    os.chdir("/")
    os.environ["HOME"] = "/nowhere"
    return 1


def scaled(sample, *, scale):
    return scale * float(sample.completion.rstrip("#"))


class WithOptions:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, sample):
        return scaled(sample, scale=self.scale)


def flaky(sample):
    """Raise on one row in ten, sleep forever on one in fifty, return a string on one in a hundred."""
    row = sample.columns["row"]
    if row % 10 == 0:
        raise ValueError("a bad day")
    if row % 50 == 1:
        time.sleep(600)
    return "1.0" if row % 100 == 2 else 1.0


class Votes:
    """Extracts the value that the completion names, else the completion in capitals."""

    def __call__(self, sample):
        return 1

    def extract(self, sample):
        return RETURNS.get(sample.completion, sample.completion.upper())


class LoneSurrogates:
    def __call__(self, sample):
        return 1 if sample.completion.startswith("vote") else _raise(ValueError(sample.completion))

    def extract(self, sample):
        return sample.completion


class NeverStarts:
    def start(self):
        raise OSError("no license")

    def __call__(self, sample):
        return 1


class ChecksRows:
    """Checks each row's answer, or raises."""

    def __init__(self, fails: bool = False):
        if fails:
            raise OSError("no license")

    def __call__(self, sample):
        return 1.0

    def problem(self, row):
        if row.answer == "raise":
            raise KeyError("lost")
        return "" if row.answer.isdigit() else f"got {row.answer!r}, want digits"

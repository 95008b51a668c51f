"""Stages as newcomers get them wrong at first."""

import numpy as np


class Filter:
    """Right."""

    def init(self):
        return {"seen": 0, "mean": np.zeros(2, np.float32)}

    def apply(self, state, groups):
        return state | {"seen": state["seen"] + 1}, groups, {"mine/seen": state["seen"]}


class Grows(Filter):
    def apply(self, state, groups):
        return state | {"mean": np.zeros(3, np.float32)}, groups, {}


class Words(Filter):
    def init(self):
        return {"seen": 0, "last": "word"}


class Pair(Filter):
    def apply(self, state, groups):
        return state, groups


class Silent(Filter):
    def apply(self, state, groups):
        return state, groups, None


class WithoutInit:
    def apply(self, state, groups):
        return state, groups, {}


class Curriculum:
    def init(self, num_rows):
        return np.zeros(num_rows)

    def choose(self, state, rng, n):
        return np.arange(n)

    def observe(self, state, groups):
        return state[:-1]


def two_rates(update):
    return [0.1, 0.2]

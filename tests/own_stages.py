"""Custom stages, correct and faulty, named by tests as "own_stages:<name>"."""

import numpy as np


class Mean:
    """Correct: a running mean that starts as a Python number and continues as NumPy's."""

    def init(self):
        return {"seen": 0, "mean": 0.0}

    def apply(self, state, groups, texts):
        assert texts == ["a", "b", "c", "d"]
        mean = np.float32(0.5) * state["mean"] + np.float32(0.5) * groups.reward.mean()
        return {"seen": state["seen"] + 1, "mean": mean}, groups.replace(keep=groups.reward > mean), {"mine/mean": mean}


class Base:
    def init(self):
        return np.zeros(2)

    def apply(self, state, groups):
        return state, groups, {}


class Grows(Base):
    def apply(self, state, groups):
        return np.zeros(3), groups, {}


class Kinds(Base):
    def init(self):
        return 0

    def apply(self, state, groups):
        return state + 0.5, groups, {}


class Words(Base):
    def init(self):
        return {"last": "word"}


class Keys(Base):
    def init(self):
        return {"a": 1, 3: 2}


class Pair(Base):
    def apply(self, state, groups):
        return state, groups


class Silent(Base):
    def apply(self, state, groups):
        return state, groups, None


class Lists(Base):
    def apply(self, state, groups):
        return state, groups, {"mine": np.zeros(2)}


class Floats(Base):
    def apply(self, state, groups):
        return state, groups.replace(keep=groups.reward), {}


class PerGroup(Base):
    def apply(self, state, groups):
        return state, groups.replace(keep=np.ones(2, bool)), {}


class Rows(Base):
    def apply(self, state, groups):
        return state, groups.keep, {}


class Raises(Base):
    """Wrong: tries to keep dropped rows."""

    def apply(self, state, groups):
        return state, groups.replace(keep=np.ones(4, bool)), {}


class WithoutInit:
    def apply(self, state, groups):
        return state, groups, {}


class OnlyInit:
    def init(self):
        return ()


class Greedy(Base):
    def apply(self, state, groups, more):
        return state, groups, {}


class Called:
    def __call__(self, groups):
        return groups.keep


class NotCalled:
    pass


class Curriculum:
    def init(self, num_rows):
        return np.zeros(num_rows)

    def choose(self, state, rng, n):
        return np.arange(n)

    def observe(self, state, groups):
        return state[:-1]


class ShortChoice(Curriculum):
    def choose(self, state, n):
        return state, np.arange(n)


class Shrinks:
    """Wrong: a replay that loses a group."""

    def init(self, blank):
        return ()

    def exchange(self, state, groups, rng):
        return state, groups.replace(reward=groups.reward[:-2]), {}


def two_rates(update):
    return [0.1, 0.2]


def no_rate(update):
    return None


def stepped(update):
    return 0.1 if update < 3 else 0.2


def capped(scores, batch):
    return -scores.logprobs if scores.logprobs.max() < 0 else scores.logprobs


def of_three(groups, scores, more):
    return groups.reward


def half_of_every_second(demonstration):
    return np.where(demonstration.sample % 2, demonstration.length // 2, 0)


def one_hint(demonstration):
    return [3]


def half_a_token(demonstration):
    return [0.5] * len(demonstration.sample)


def less_than_none(demonstration):
    return [-1] * len(demonstration.sample)


def last_step_end(demonstration):
    return np.repeat(demonstration.step_ends[-1], len(demonstration.sample))

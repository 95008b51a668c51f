"""Custom stages in one file, named in a YAML config; the package is not changed."""

import os
import signal

import jax.numpy as jnp
import numpy as np

from jaxrl_llm.types import OwnColumn


def no_echo(groups, texts):
    """A filter by length and text: keeps responses of at least two tokens that do not begin with a 1."""
    no_one = np.array([not text.startswith("1") for text in texts])
    return (groups.rollouts.length >= 2) & no_one


class Hardest:
    """A curriculum with a state: the least-visited rows first, among these the ones with the lowest average reward."""

    def __init__(self, memory=0.5):
        self.memory = memory

    def init(self, num_rows):
        return {"score": np.zeros(num_rows), "seen": np.zeros(num_rows, np.int64)}

    def choose(self, state, rng, n):
        if os.environ.get("KILL_AT") == str(state["seen"].sum()):
            os.kill(os.getpid(), signal.SIGKILL)
        order = np.lexsort((rng.random(len(state["seen"])), state["score"], state["seen"]))
        return state, order[:n]

    def observe(self, state, groups):
        rows, mean = groups.rollouts.prompts.row, groups.reward.reshape(len(groups.failure), -1).mean(axis=1)
        score, seen = state["score"].copy(), state["seen"].copy()
        score[rows] = self.memory * score[rows] + (1 - self.memory) * mean
        seen[rows] += 1
        return {"score": score, "seen": seen}


def above_half(groups, scores, half=0.5):
    """An advantage: one number per row."""
    return groups.reward - half


def place(groups, scores):
    """A column: 1 at a response's first token, 1/2 at its second, ..."""
    return np.broadcast_to(1 / (1 + np.arange(groups.rollouts.tokens.shape[1])), groups.rollouts.tokens.shape)


PLACE = OwnColumn("place", place, np.float32, fill=-1)


def early(scores, batch):
    """A loss with its own column: early tokens get more weight."""
    return -batch.advantage * scores.logprobs * batch.own["place"]


def longest_digit(sample, share=0.1):
    """A grader: `share` times the largest digit of the response."""
    return share * max((int(c) for c in sample.completion if c.isdigit()), default=0)


def wait_then_learn(update, wait=2, lr=0.01):
    """A schedule: a learning rate of 0 for the first `wait` updates."""
    return jnp.where(update <= wait, 0.0, lr)

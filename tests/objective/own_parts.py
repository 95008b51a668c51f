"""Custom parts of an objective, as a user writes them; importing the module imports no jax."""

import numpy as np


def pulled(scores, batch, strength=1.0):
    """-A log p, and a pull toward the reference."""
    return -batch.advantage * scores.logprobs + strength * (scores.logprobs - batch.reference_logprobs) ** 2


class Margin:
    """Half the square of what a token's probability is off a target, with a metric and a ratio of its own."""

    def __init__(self, target):
        self.target = target

    def __call__(self, scores, batch):
        import jax.numpy as jnp

        from jaxrl_llm.distribution.loss_terms import Terms

        off = jnp.exp(scores.logprobs) - self.target
        return Terms(off**2 / 2, {"off": off}, {"ratio/max": 7 + 0 * off})


def averaged(scores, batch):
    return pulled(scores, batch).mean()


def above_mean(groups, scores, scale=1.0):
    """One number per row: the reward less its group's mean."""
    reward = groups.reward.reshape(len(groups.failure), -1)
    return scale * (reward - reward.mean(axis=1, keepdims=True)).reshape(-1)


class Halved:
    """An advantage per token that shrinks with its position."""

    def __init__(self, by=0.5):
        self.by = by

    def __call__(self, groups, scores):
        return groups.reward[:, None] * self.by ** np.arange(groups.rollouts.tokens.shape[1])


def of_no_shape(groups, scores):
    return groups.reward.reshape(len(groups.failure), -1)


def too_large(groups, scores):
    return np.float64(groups.reward) * 1e39


def with_returns(groups, scores):
    from jaxrl_llm.types import Credit

    return Credit(groups.reward, returns=groups.reward)


def first_rows(groups, scores):
    """The first row of each group alone takes part."""
    from jaxrl_llm.types import Credit

    rows = len(groups.reward)
    return Credit(np.ones(rows), keep=np.arange(rows) % (rows // len(groups.failure)) == 0)


def once(groups, scores):
    """A column: 1 at every token."""
    return np.ones(groups.rollouts.tokens.shape)


def per_row(groups, scores):
    return groups.reward


def weighed(scores, batch):
    return -batch.own["once"] * batch.advantage * scores.logprobs

"""Losses as a user writes them; no jax where the module is imported."""


def pulled(scores, batch, strength=1.0):
    """-A log p, and a pull towards the reference."""
    return -batch.advantage * scores.logprobs + strength * (scores.logprobs - batch.reference_logprobs) ** 2


class Margin:
    """Half the square of what a token's probability is off a target, with a metric and a ratio of its own."""

    def __init__(self, target):
        self.target = target

    def __call__(self, scores, batch):
        import jax.numpy as jnp

        from jaxrl_llm.model.loss import Terms

        off = jnp.exp(scores.logprobs) - self.target
        return Terms(off**2 / 2, {"off": off}, {"ratio/max": 7 + 0 * off})


def averaged(scores, batch):
    return pulled(scores, batch).mean()

"""The one distribution: logits and temperature to log-probabilities. Drawing and scoring both come here, and nowhere else."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.transformer import gather_head, hidden, logits_in_loop
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.types import Batch, PyTree

# Slots of a row whose logits exist at a time while scoring.
CHUNK = 128


def process_logits(
    x: Float[Array, "*rows V"], temperature: Float[Array, "*rows"], num_tokens: int
) -> Float[Array, "*rows V"]:
    """log softmax(logits / temperature) in nats, f32; entries from `num_tokens` on (padding of the vocabulary) are -inf.

    At temperature 0 it is the limit: uniform over the tokens of the largest logit, -inf elsewhere. No gradient flows there.
    """
    x = x.astype(jnp.float32)
    if num_tokens < x.shape[-1]:
        x = jnp.where(jnp.arange(x.shape[-1]) < num_tokens, x, -jnp.inf)
    # The largest is subtracted before the division: one pass finds it for the softmax and for the limit.
    x = x - jax.lax.stop_gradient(jnp.max(x, axis=-1, keepdims=True))
    greedy = (temperature == 0)[..., None]
    limit = jnp.where(x == 0, 0.0, -jnp.inf)
    x = jnp.where(greedy, limit, x / jnp.where(greedy, 1.0, temperature[..., None]))
    return x - jnp.log(jnp.sum(jnp.exp(x), axis=-1, keepdims=True))


def entropy(logp: Float[Array, "*rows V"]) -> Float[Array, "*rows"]:
    """-sum p log p, nats."""
    # A value of its own where p is 0: the gradient of 0 * -inf would be NaN there, masked or not.
    seen = logp > -jnp.inf
    safe = jnp.where(seen, logp, 0.0)
    return -jnp.sum(jnp.where(seen, jnp.exp(safe) * safe, 0.0), axis=-1)


class TokenScores(NamedTuple):
    logprobs: Float[Array, "R T"]
    """log p(tokens[r, t] | before it) at the batch's temperature; 0.0 in a row's first slot."""
    entropy: Float[Array, "R T"]
    """Of the distribution that tokens[r, t] was drawn from."""


def score_tokens(params: PyTree, batch: Batch, cfg: ModelConfig, num_tokens: int, layout: Layout) -> TokenScores:
    """Score every token of a batch under `params` (layers stacked). The only place where logits and tokens shift.

    Logits exist for `CHUNK` slots at a time and are made again in the backward pass, so no [R, T, V] array ever does.
    """
    h = hidden(params, batch.tokens, batch.segment, batch.position, cfg, layout)
    rows, slots = batch.tokens.shape
    # Slot t is scored from the activation before it; the last activation predicts nothing.
    h, tokens, temperature = h[:, :-1], batch.tokens[:, 1:], batch.temperature[:, 1:]

    head = gather_head(params, cfg, layout)

    @jax.checkpoint
    def score(chunk: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        h, tokens, temperature = chunk
        logp = process_logits(logits_in_loop(head, h, cfg), temperature, num_tokens)
        return jnp.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0], entropy(logp)

    pad = -(slots - 1) % CHUNK if slots - 1 > CHUNK else 0
    size = min(CHUNK, slots - 1)

    def split(x: Array, fill: float) -> Array:
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
        return jnp.moveaxis(x.reshape(rows, -1, size, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1).reshape(rows, -1)[:, : slots - 1]
        return jnp.pad(x, ((0, 0), (1, 0)))

    scores = jax.lax.map(score, (split(h, 0), split(tokens, 0), split(temperature, 1)))
    return TokenScores(*(join(x) for x in scores))

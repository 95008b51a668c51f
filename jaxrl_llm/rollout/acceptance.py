"""Known responses under another policy: kept up to the first token that it does not accept (SPEC-RL, arXiv 2509.23232).

    accepted with probability a = min(1, exp(leniency) new / old)

The rows are not distributed as fresh samples of the policy: the token in the place of a rejected one would have to come from the
residual distribution, and leniency keeps tokens that the policy would rather not draw. What a kept token was drawn from, and that
it was accepted, is known: the probability of both is old * a = min(old, exp(leniency) new), and its log is the token's
`behavior_logprobs`. So the ratio to it is at least exp(-leniency), and over accepted tokens it weighs as the policy does.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrl_llm.distribution.control_tables import ControlTables, allowed_tokens
from jaxrl_llm.model.cache import Caching
from jaxrl_llm.model.transformer import logits, prefill
from jaxrl_llm.rollout.output import cut_rows
from jaxrl_llm.rollout.redraw import KnownRows
from jaxrl_llm.rollout.sample import Decoding, distribution, logprob_of
from jaxrl_llm.types import PyTree, Rollouts

# Last number of the seeds of the numbers that accept tokens: the others are those of the row's key.
ACCEPT = 2**32 - 1


def make_rescore(decoding: Decoding, caching: Caching, slots: int) -> Callable[..., Float[Array, "C R"]]:
    """Return `rescore(params, rows, codes, tables) -> f32[C R]`: log-probs of known tokens under the distributions from which the
    policy would draw in their slots; undefined behind them. `codes`: `control_state`, i32[R C].

    Args:
        decoding: static settings.
        caching: of the pass; its keys and values are not kept.
        slots: C, completion slots.
    """
    model, layout = decoding.model, decoding.layout

    def rescore(
        params: PyTree, rows: KnownRows, codes: Int[Array, "R C"], tables: ControlTables | None
    ) -> Float[Array, "C R"]:
        x, _ = prefill(params, rows.tokens, rows.prompt + rows.length, caching, model, layout)
        last = rows.tokens.shape[1] - 1
        classes = None if tables is None else layout.constrain(tables.classes, None, "vocab")

        def of_slot(slot: Int[Array, ""]) -> Float[Array, " R"]:
            place = jnp.minimum(rows.prompt + slot, last)[:, None]
            h = jnp.take_along_axis(x, place[..., None] - 1, axis=1)[:, 0]
            allowed = None if tables is None else allowed_tokens(tables, codes[:, slot]).replace(classes=classes)
            of = distribution(logits(params, h, model), rows.controls, jnp.array(True), decoding, allowed)
            return logprob_of(of, jnp.take_along_axis(rows.tokens, place, axis=1)[:, 0])

        return jax.lax.map(of_slot, jnp.arange(slots))

    return rescore


def accepted(
    known: Rollouts, rows: KnownRows, logprobs: Float[np.ndarray, "B C"], leniency: float, seed: tuple[int, ...], pad: int
) -> Rollouts:  # fmt: skip
    """Return the tokens of each row before the first one that is rejected. Tokens that nobody drew are accepted.

    Args:
        known: the rollouts.
        rows: made of them.
        logprobs: of the known tokens, under the new policy.
        leniency: nats.
        seed: of the random numbers, with uid and sample number of each row.
        pad: padding token.
    """
    slots, drawn = np.arange(known.tokens.shape[1]), known.sampled
    share = np.where(drawn, np.minimum(leniency + logprobs - known.behavior_logprobs, 0), 0)
    names = zip(rows.uid.tolist(), rows.sample.tolist(), strict=True)
    u = np.array([np.random.default_rng((*seed, uid, sample, ACCEPT)).random(len(slots)) for uid, sample in names])
    whole = (np.log(u) <= share) & (slots < rows.length[:, None])
    kept = np.cumprod(whole, axis=1).sum(axis=1)
    found = cut_rows(known, kept, pad)
    logprobs = np.where(slots < kept[:, None], known.behavior_logprobs + share, 0).astype(np.float32)
    return found.replace(behavior_logprobs=logprobs, temperature=rows.controls.temperature)

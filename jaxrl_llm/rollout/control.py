"""Controls in the decode loop: what a row's state allows before a token is drawn, and where the token leads."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxrl_llm.distribution.control_tables import ControlTables, encode
from jaxrl_llm.rollout.sample import Controls


class ControlledToken(NamedTuple):
    """A token per row after its control has seen it."""

    token: Int[Array, " B"]
    sampled: Bool[Array, " B"] | None
    """False where the control forced the token, or put it in the place of the one that was drawn."""
    code: Int[Array, " B"] | None
    """Entry of `control_state`. Both None: no row has a control."""
    state: Int[Array, " B"]
    """State behind the token."""
    ended: Bool[Array, " B"]
    """True where the state ends the row."""


def before_token(
    tables: ControlTables, state: Int[Array, " B"], slot: Int[Array, " B"], limit: Int[Array, " B"], controls: Controls
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """Return the state in which completion slot `slot[b]` is filled, and its entry of `control_state`.

    Args:
        tables: of the session.
        state: behind the tokens so far.
        slot: the completion slot that each row fills.
        limit: maximum completion tokens.
        controls: sampling parameters per row.
    """
    state = jnp.where(slot >= controls.budget, tables.expires[state], state)
    return state, encode(state, limit - slot, slot < controls.min_new_tokens)


def after_token(
    tables: ControlTables, state: Int[Array, " B"], code: Int[Array, " B"], drawn: Int[Array, " B"]
) -> ControlledToken:
    """Return the token of each row, and the state behind it.

    Args:
        tables: of the session.
        state, code: of `before_token`.
        drawn: the sampled token.
    """
    forced = tables.forced[state]
    token = jnp.where(forced >= 0, forced, drawn)
    # Finished rows draw what their state does not allow.
    following = jnp.maximum(tables.after(state, token), 0)
    replaced = (forced < 0) & tables.replaces[following]
    here = jnp.where(replaced, following, state)
    token = jnp.where(replaced, tables.forced[following], token)
    following = jnp.where(replaced, jnp.maximum(tables.after(following, token), 0), following)
    return ControlledToken(token, (forced < 0) & ~replaced, code - state + here, following, tables.ends[following])

"""Known responses under another policy: kept as far as the noise that drew them draws the same tokens again.

A token is an argmax over the logits and Gumbel noise, and the noise is named by the session's key, the prompt's uid, the sample
number and the slot. So one pass over the known tokens says what another policy would have drawn in each slot: as long as that is
the known token, a fresh call with this noise would have produced it, and from the first difference on the row is decoded as usual.
The result is that of the fresh call, token for token, but for rounding; no log-prob of the old policy is read.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key, UInt32

from jaxrl_llm.distribution.control_tables import ControlTables, state_of
from jaxrl_llm.model.cache import Caching
from jaxrl_llm.model.transformer import logits, prefill
from jaxrl_llm.rollout.decode import DecodedChunk, Drawing, draw, empty_chunk
from jaxrl_llm.rollout.output import cut_rows, where_slots
from jaxrl_llm.rollout.sample import Controls, Decoding, row_keys
from jaxrl_llm.types import ArrayLike, PyTree, Rollouts


class KnownRows(NamedTuple):
    """Rows with known tokens, R of them."""

    tokens: Int[ArrayLike, "R T"]
    """Prompt and known tokens, right-padded."""
    prompt: Int[ArrayLike, " R"]
    """Prompt tokens."""
    length: Int[ArrayLike, " R"]
    """Known tokens."""
    given: Bool[ArrayLike, "R C"]
    """Known tokens that nobody drew: they are kept whatever the noise says."""
    uid: Int[ArrayLike, " R"]
    sample: Int[ArrayLike, " R"]
    limit: Int[ArrayLike, " R"]
    """Maximum completion tokens."""
    controls: Controls


class Redrawn(NamedTuple):
    """What the noise draws in the slots of known tokens."""

    kept: Int[Array, " R"]
    """Known tokens up to the first one that is drawn otherwise."""
    chunk: DecodedChunk
    """Columns of the slots, [C R]; undefined behind the kept ones."""


class _Redrawing(NamedTuple):
    """Carry of the loop over slots."""

    slot: Int[Array, ""]
    control: Int[Array, " R"]
    kept: Int[Array, " R"]
    chunk: DecodedChunk


def make_redraw(decoding: Decoding, caching: Caching, slots: int) -> Callable[..., Redrawn]:
    """Return `redraw(params, rows, key, tables) -> Redrawn`.

    The tokens are read in one pass; a loop over the slots then draws, so that no more logits exist at once than in a decode step.

    Args:
        decoding: static settings.
        caching: of the pass; its keys and values are not kept.
        slots: C, completion slots.
    """
    model, layout, lines = decoding.model, decoding.layout, dataclasses.replace(decoding, steps=slots, interval=1)

    def redraw(params: PyTree, rows: KnownRows, key: UInt32[Array, " k"], tables: ControlTables | None) -> Redrawn:
        x, _ = prefill(params, rows.tokens, rows.prompt + rows.length, caching, model, layout)
        drawing = Drawing.of(rows.limit, rows.controls, _keys(key, rows), tables, layout)
        last = rows.tokens.shape[1] - 1

        def one_slot(at: _Redrawing) -> _Redrawing:
            place = jnp.minimum(rows.prompt + at.slot, last)[:, None]
            h = jnp.take_along_axis(x, place[..., None] - 1, axis=1)[:, 0]
            known = jnp.take_along_axis(rows.tokens, place, axis=1)[:, 0]
            given = rows.given[:, at.slot]
            active = (at.kept == at.slot) & (at.slot < rows.length)
            age = jnp.full_like(rows.length, at.slot)
            line, control, _ = draw(
                drawing, age, logits(params, h, model), at.control, ~active, jnp.array(True), decoding
            )
            if tables is not None:
                behind = drawing.tables.after(state_of(line.control_state), known)
                control = jnp.where(given, jnp.maximum(behind, 0), control)
            return _Redrawing(
                at.slot + 1,
                jnp.where(active, control, at.control),
                at.kept + (active & (given | (line.tokens == known))),
                jax.tree.map(lambda all, new: all.at[at.slot].set(new), at.chunk, line),
            )

        count, most = len(rows.length), jnp.max(rows.length)
        start = _Redrawing(
            jnp.zeros((), jnp.int32), rows.controls.control, jnp.zeros(count, jnp.int32),
            empty_chunk(lines, count, tables is not None),
        )  # fmt: skip
        end = jax.lax.while_loop(lambda at: (at.slot < most) & jnp.any(at.kept == at.slot), one_slot, start)
        return Redrawn(end.kept, end.chunk)

    return redraw


def _keys(key: UInt32[Array, " k"], rows: KnownRows) -> Key[Array, " R"]:
    return row_keys(jax.random.wrap_key_data(key), rows.uid, rows.sample[:, None])


def known_rows(
    known: Rollouts, tables: ControlTables | None, controls: Controls, limit: Int[np.ndarray, " B"]
) -> KnownRows:
    """Return the rows of known rollouts. What was neither drawn nor the control's own is given.

    Args:
        known: the rollouts, NumPy.
        tables: of the engine that sampled them, NumPy.
        controls: sampling parameters per row.
        limit: maximum completion tokens per row.
    """
    prompts, slots = known.prompts, known.tokens.shape[1]
    length, begin = np.minimum(known.length, limit), prompts.length[known.prompt]
    tokens = np.zeros((len(length), prompts.tokens.shape[1] + slots), np.int32)
    for row, prompt, n, own, m in zip(tokens, known.prompt, begin, known.tokens, length, strict=True):
        row[:n], row[n : n + m] = prompts.tokens[prompt, :n], own[:m]
    given = ~known.sampled
    if known.control_state is not None and tables is not None:
        given &= tables.forced[state_of(known.control_state)] < 0
    uid = prompts.uid[known.prompt]
    return KnownRows(tokens, begin, length.astype(np.int32), given, uid, known.sample, limit.astype(np.int32), controls)


def beginnings(known: Rollouts, rows: KnownRows, drawn: Redrawn, version: int, pad: int) -> Rollouts:
    """Return the kept tokens as rollouts of the policy that drew them again.

    Args:
        known: the rollouts.
        rows: made of them.
        drawn: what the noise draws, NumPy.
        version: of the policy.
        pad: padding token.
    """
    inside = np.arange(known.tokens.shape[1]) < drawn.kept[:, None]
    own = inside & ~rows.given
    chunk = jax.tree.map(lambda x: np.moveaxis(x, 0, 1), drawn.chunk)
    sampled = own if chunk.sampled is None else own & chunk.sampled

    def filled(name: str, where: np.ndarray, other: np.ndarray | float) -> np.ndarray | None:
        new = getattr(chunk, name)
        return None if new is None else where_slots(where, new, other)

    states = 0 if known.control_state is None else np.where(inside, known.control_state, 0)
    return cut_rows(known, drawn.kept, pad).replace(
        sampled=sampled,
        version=np.where(own, np.int32(version), np.int32(0)),
        temperature=rows.controls.temperature,
        behavior_logprobs=filled("behavior_logprobs", sampled, 0),
        entropy=filled("entropy", sampled, 0),
        raw_logprobs=filled("raw_logprobs", sampled, 0),
        kept_tokens=filled("kept_tokens", sampled, -1),
        control_state=filled("control_state", own, states),
    )

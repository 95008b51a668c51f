"""Reuse of earlier rollouts: continued under another policy from where its draws begin to differ."""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from jaxrl_llm.distribution.control_tables import state_of
from jaxrl_llm.errors import UserError
from jaxrl_llm.parallel import hosts
from jaxrl_llm.rollout.batch_sizes import smallest
from jaxrl_llm.rollout.output import first_own_slot
from jaxrl_llm.rollout.redraw import KnownRows, Redrawn, beginnings, known_rows
from jaxrl_llm.rollout.request_checks import check_controls, check_ids, check_prompts, limits_of
from jaxrl_llm.rollout.requests import controls_of_samples
from jaxrl_llm.rollout.sample import Controls
from jaxrl_llm.rollout.session import Session
from jaxrl_llm.types import Rollouts, check, number_rows


class Reused(NamedTuple):
    """Rollouts of a policy that begin with tokens of earlier ones."""

    rollouts: Rollouts
    kept: Int[np.ndarray, " B"]
    """Tokens of each row that were kept, and not decoded."""


def reuse(session: Session, known: Rollouts, controls: Controls | None, limit: Int[np.ndarray, " P"] | None) -> Reused:
    """Return the rollouts that the session's policy samples with the noise of earlier ones; see `Engine.reuse`.

    Args:
        session: of the new policy, with the key of the earlier call, and no requests.
        known: the earlier rollouts.
        controls: sampling parameters, per prompt or per row; the configured ones by default.
        limit: maximum completion tokens per prompt; `max_new_tokens` by default.
    """
    cfg, size = session.cfg, _check_known(known, session)
    first = known.sample[np.cumsum(size) - size]
    most = np.full(len(size), cfg.max_new_tokens) if limit is None else limit
    limits = limits_of("limit", most, size, cfg.max_new_tokens)
    if controls is None:
        controls = controls_of_samples(cfg, known.sample, session.control_set.start(cfg.control))
    check_controls(controls, size, session.decoding.max_kept_tokens > 0)
    of_rows = jax.tree.map(lambda x: np.repeat(x, size) if len(x) == len(size) else np.asarray(x), controls)
    if (others := np.flatnonzero((of_rows.control > 0) & (first_own_slot(known) > 0))).size:
        raise ValueError(f"known[{others[0]}]: got tokens of another's turn, want rows of one turn under a control")
    session.control_set.start_states(of_rows, limits, None)
    tables = session.control_set.tables
    if (
        known.control_state is not None
        and tables is not None
        and state_of(known.control_state).max() >= len(tables.next)
    ):
        raise ValueError(
            "known.control_state: got states that this engine's controls have not, want those of this engine"
        )
    rows = known_rows(known, tables, of_rows, limits)
    drawn = _redraw(session, rows)
    begun = beginnings(known, rows, drawn, session.version, session.decoding.vocab.pad)
    ids = session.add(known.prompts, size, controls, limit, begun, first_sample=first)
    while session.pending:
        session.advance()
    return Reused(session.take(ids), drawn.kept)


def _check_known(known: Rollouts, session: Session) -> Int[np.ndarray, " P"]:
    """Return the rows of each prompt.

    Raises:
        UserError: not rollouts.
        ValueError: they could not be those of a call.
    """
    if not isinstance(known, Rollouts):
        raise UserError(f"known: got {type(known).__name__}, want Rollouts, as engine.generate returns them")
    try:
        check(known)
    except ValueError as error:
        raise ValueError(str(error).replace("Rollouts.", "known.", 1)) from None
    if known.trunk is not None and (known.trunk != known.sample).any():
        raise ValueError(
            "known.trunk: got rows that leave others, want independent ones: what they share has another row's noise"
        )
    vocab, slots = session.decoding.vocab, session.cfg.max_new_tokens
    check_prompts(known.prompts, session.prompt_slots, vocab)
    if known.tokens.shape[1] != slots:
        raise ValueError(f"known.tokens: got {known.tokens.shape[1]} completion slots, want the engine's {slots}")
    check_ids("known.tokens", known.tokens[np.arange(slots) < known.length[:, None]], vocab)
    size = np.bincount(known.prompt[known.prompt >= 0], minlength=len(known.prompts.length))
    prompt, sample = number_rows(size)
    if (known.prompt < 0).any() or not size.all() or not np.array_equal(known.prompt, prompt):
        raise ValueError(
            "known.prompt: got rows without a prompt, or prompts without a row, want rows of each prompt in order"
        )
    first = np.repeat(known.sample[np.cumsum(size) - size], size)
    if not np.array_equal(known.sample, first + sample):
        raise ValueError(
            "known.sample: got numbers with gaps, want consecutive ones for each prompt: they name the noise"
        )
    return size


def _redraw(session: Session, rows: KnownRows) -> Redrawn:
    """Draw the known tokens again, as many rows at once as a prefill reads. Returns NumPy."""
    sizes, tables, parts = session.batch.sizes, session.control_set.on_device(session.decoding.layout), []
    at_once, table_sizes = sizes.prompts[0], () if tables is None else tables.sizes
    for start in range(0, len(rows.length), at_once):
        part = jax.tree.map(lambda x, start=start: x[start : start + at_once], rows)
        num = smallest(sizes.prompts, len(part.length))
        slots = smallest(sizes.row_slots, int((part.prompt + part.length).max()))
        tokens = np.pad(part.tokens, ((0, 0), (0, max(slots - part.tokens.shape[1], 0))))[:, :slots]
        # Further rows are copies that nothing reads.
        padded = jax.tree.map(lambda x, n=num: x[np.arange(n) % len(x)], part._replace(tokens=tokens))
        put = hosts.put(padded, session.decoding.layout.sharding(("rows",)))
        program = session.programs(session.params, "redraw", num, slots, *table_sizes)
        drawn = jax.tree.map(np.array, program(session.params, put, session.key, tables))
        n = len(part.length)
        parts.append(Redrawn(drawn.kept[:n], jax.tree.map(lambda x, n=n: x[:, :n], drawn.chunk)))
    return Redrawn(
        np.concatenate([part.kept for part in parts]),
        jax.tree.map(lambda *x: np.concatenate(x, axis=1), *(part.chunk for part in parts)),
    )

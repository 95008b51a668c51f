"""Reuse of earlier rollouts: continued under another policy from where its draws begin to differ, or where it rejects a token."""

import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxrl_llm.distribution.control_tables import state_of
from jaxrl_llm.errors import UserError
from jaxrl_llm.parallel import hosts
from jaxrl_llm.rollout.acceptance import accepted
from jaxrl_llm.rollout.batch_sizes import smallest
from jaxrl_llm.rollout.output import cut_rows, first_end, first_own_slot
from jaxrl_llm.rollout.redraw import KnownRows, Redrawn, beginnings, known_rows
from jaxrl_llm.rollout.request_checks import check_controls, check_ids, check_prompts, limits_of
from jaxrl_llm.rollout.requests import controls_of_samples
from jaxrl_llm.rollout.sample import Controls
from jaxrl_llm.rollout.session import Session
from jaxrl_llm.types import Finish, Rollouts, check, number_rows


class Reused(NamedTuple):
    """Rollouts of a policy that begin with tokens of earlier ones."""

    rollouts: Rollouts
    kept: Int[np.ndarray, " B"]
    """Tokens of each row that were kept, and not decoded."""


def reuse(
    session: Session, known: Rollouts, controls: Controls | None, limit: Int[np.ndarray, " P"] | None,
    leniency: float | None,
) -> Reused:  # fmt: skip
    """Return the rollouts that the session's policy samples from earlier ones; see `Engine.reuse`.

    Args:
        session: of the new policy, without requests.
        known, controls, limit, leniency: as in `begin`.
    """
    begun = begin(session, known, controls, limit, leniency)
    size = known.size
    ids = session.add(
        known.prompts, size, controls, limit, begun.rollouts, first_sample=known.sample[np.cumsum(size) - size]
    )
    while session.pending:
        session.advance()
    return Reused(session.take(ids), begun.kept)


def begin(
    session: Session, known: Rollouts, controls: Controls | None, limit: Int[np.ndarray, " P"] | None,
    leniency: float | None,
) -> Reused:  # fmt: skip
    """Return what the session's policy keeps of earlier rollouts, as rows from which a request of the session continues.

    Args:
        session: of the new policy. Its key, with uids and sample numbers of the rollouts, names the noise: that of the earlier call
            if `leniency` is None, else other noise.
        known: the earlier rollouts.
        controls: sampling parameters, per prompt or per row; the configured ones by default.
        limit: maximum completion tokens per prompt; `max_new_tokens` by default.
        leniency: with which tokens are accepted, nats; None: those are kept that the noise draws again.
    """
    begun, cfg, size = time.perf_counter(), session.cfg, _check_known(known, session)
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
    rows, pad = known_rows(known, tables, of_rows, limits), session.decoding.vocab.pad
    if leniency is None:
        found = beginnings(known, rows, _redraw(session, rows), session.version, pad)
    else:
        seed = tuple(np.asarray(session.key).tolist())
        found = accepted(known, rows, _rescore(session, rows, known.control_state), leniency, seed, pad)
    found = _at_stop_strings(session, found)
    session.stats = session.stats._replace(seconds=session.stats.seconds + time.perf_counter() - begun)
    return Reused(found, found.length)


def _at_stop_strings(session: Session, found: Rollouts) -> Rollouts:
    """Return the rows as the session's stop strings end them, which need not be those of the earlier call. Rows with tokens that
    nobody drew are left as they are: a text of an earlier turn ended there."""
    stop, free = session.cfg.stop, np.ones(len(found.length), bool)
    if found.control_state is not None:
        # What its control ended has the same finish.
        free &= (state_of(found.control_state) == 0).all(axis=1)
    own = (found.sampled | (np.arange(found.tokens.shape[1]) >= found.length[:, None])).all(axis=1)
    length, finish = found.length.copy(), found.finish.copy()
    finish[own & free & (finish == Finish.STOP)] = Finish.UNFINISHED
    for row in np.flatnonzero(own & (length > 0)).tolist() if stop else ():
        end = first_end(found.tokens[row, : length[row]].tolist(), 0, stop, session.tokenizer.spellings)
        if end is not None:
            length[row], finish[row] = end, Finish.STOP
    return cut_rows(found, length, session.decoding.vocab.pad).replace(finish=finish)


def _check_known(known: Rollouts, session: Session) -> Int[np.ndarray, " P"]:
    """Return the rows of each prompt.

    Raises:
        UserError: not rollouts.
        ValueError: they could not be those of a call.
    """
    if isinstance(known, Reused):
        raise UserError("known: got what engine.reuse returned, want its .rollouts")
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
    """Draw the known tokens again. Returns NumPy."""
    parts = [
        jax.tree.map(np.array, program(session.params, part, session.key, tables))
        for part, _, program, tables in _parts(session, "redraw", rows, None)
    ]
    kept = np.concatenate([part.kept for part in parts])[: len(rows.length)]
    chunk = jax.tree.map(lambda *x: np.concatenate(x, axis=1)[:, : len(kept)], *(part.chunk for part in parts))
    return Redrawn(kept, chunk)


def _rescore(session: Session, rows: KnownRows, codes: Int[np.ndarray, "B C"] | None) -> Float[np.ndarray, "B C"]:
    """Return log-probs of the known tokens. `codes`: `control_state`."""
    codes = np.zeros(rows.given.shape, np.int32) if codes is None else codes
    parts = [
        np.asarray(program(session.params, part, more, tables))
        for part, more, program, tables in _parts(session, "rescore", rows, codes)
    ]
    return np.concatenate(parts, axis=1)[:, : len(rows.length)].T


def _parts(session: Session, name: str, rows: KnownRows, more: np.ndarray | None) -> Iterator[tuple]:
    """Yield as many rows at once as one pass reads, on the devices, with the program of this name for them and its tables. The last
    part is filled up with rows that nothing reads. `more`: another array of the rows."""
    sizes, layout = session.batch.sizes, session.decoding.layout
    tables = session.control_set.on_device(layout)
    slots = smallest(sizes.row_slots, int((rows.prompt + rows.length).max()))
    num, table_sizes = sizes.known_rows(slots), () if tables is None else tables.sizes
    rows = rows._replace(tokens=np.pad(rows.tokens, ((0, 0), (0, max(slots - rows.tokens.shape[1], 0))))[:, :slots])
    for start in range(0, len(rows.length), num):
        of = np.arange(start, start + num) % len(rows.length)
        put = hosts.put(jax.tree.map(lambda x, of=of: x[of], (rows, more)), layout.sharding(("rows",)))
        yield *put, session.programs(session.params, name, num, slots, *table_sizes), tables

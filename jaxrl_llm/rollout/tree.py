"""Trees of rollouts: rows that leave another row of their prompt behind some of its tokens, and continue by themselves.

Every row is a whole path from the prompt to a leaf. The row that it left is its trunk; what they have in common, the first `fork`
tokens, is `sampled` in the trunk alone, where its log-probs are. So what counts or trains sampled tokens counts each once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int

from jaxrl_llm.errors import UserError
from jaxrl_llm.rollout.config import NoTree, RolloutConfig
from jaxrl_llm.rollout.output import COMPLETE, recorded, where_slots
from jaxrl_llm.rollout.request_checks import limits_of
from jaxrl_llm.rollout.requests import controls_of_samples
from jaxrl_llm.rollout.sample import Controls
from jaxrl_llm.rollout.session import Session
from jaxrl_llm.types import Finish, Prompts, Rollouts, check

# Columns that a row has of the tokens of its trunk too.
OF_PATH = ("tokens", "control_state")
Run = Callable[[Session, Int[np.ndarray, " n"]], Rollouts]
"""run(session, ids): the rollouts of these requests, once they have finished."""


class Branches(NamedTuple):
    """Places where n new rows leave rows of rollouts."""

    row: Int[np.ndarray, " n"]
    """Index of the row that the new one leaves."""
    fork: Int[np.ndarray, " n"]
    """Its tokens that the new row begins with. The token behind them is drawn by the new row itself."""
    continues: Bool[np.ndarray, " n"] | None = None
    """True: no new row, but the row itself continues from its end, which is `fork`. None: all rows are new."""


def check_branches(rollouts: Rollouts, branches: Branches, slots: int) -> Branches:
    """Return the branches as arrays. Raises UserError if these are no rollouts, or ValueError unless they have so many completion
    slots and their rows can be left there."""
    if not isinstance(rollouts, Rollouts):
        raise UserError(f"rollouts: got {type(rollouts).__name__}, want Rollouts, as engine.generate returns them")
    if not isinstance(branches, Branches):
        raise UserError(f"branches: got {type(branches).__name__}, want rl.Branches(row=[...], fork=[...])")
    if not np.size(branches.row):
        raise ValueError("branches: got none, want one or more")
    check(rollouts)
    if rollouts.tokens.shape[1] != slots:
        raise ValueError(f"rollouts.tokens: got {rollouts.tokens.shape[1]} completion slots, want the engine's {slots}")
    row, fork, continues = (np.asarray(x) for x in (*branches[:2], np.zeros(np.shape(branches.row), bool)))
    if branches.continues is not None:
        continues = np.asarray(branches.continues)
    for name, x in (("row", row), ("fork", fork), ("continues", continues)):
        kinds, want = ("b", "True or False") if name == "continues" else ("iu", "one whole number")
        if x.ndim != 1 or x.dtype.kind not in kinds or len(x) != len(row):
            raise ValueError(f"branches.{name}: got {x.dtype}{list(x.shape)}, want {want} for each branch")
    rows = np.count_nonzero(rollouts.prompt >= 0)
    if (wrong := row[(row < 0) | (row >= rows)]).size:
        raise ValueError(f"branches.row: got {wrong[0]}, want rows from 0 to {rows - 1}")
    # Behind an end nothing follows; a row that has not ended can be left where it stands.
    most = rollouts.length[row] - np.isin(rollouts.finish[row], COMPLETE)
    if (wrong := np.flatnonzero((fork < 0) | (fork > most))).size:
        b = wrong[0]
        raise ValueError(
            f"branches.fork[{b}]: got {fork[b]}, want 0 to {most[b]}: row {row[b]} has {rollouts.length[row[b]]} tokens"
        )
    if (wrong := np.flatnonzero(continues & (fork != rollouts.length[row]))).size:
        b = wrong[0]
        raise ValueError(
            f"branches.continues[{b}]: got True behind {fork[b]} tokens, want all {rollouts.length[row[b]]} of an open row"
        )
    if len(set(row[continues].tolist())) < np.count_nonzero(continues):
        raise ValueError("branches.continues: got a row twice, want each at most once")
    return Branches(row, fork, continues)


def lanes_for(branches: Branches, cfg: RolloutConfig) -> int:
    """Return the rows per trunk to decode together: with a tree in the config always as many, so that nothing compiles again."""
    if not isinstance(cfg.tree, NoTree):
        return cfg.rows_per_trunk
    count = int(np.unique(branches.row, return_counts=True)[1].max())
    return min(1 << (count - 1).bit_length(), cfg.samples)


def whole_paths(rollouts: Rollouts) -> Rollouts:
    """Return the rollouts with all columns of each row's whole path: those of shared tokens as in the trunk."""
    if rollouts.trunk is None:
        return rollouts
    columns = {name: x.copy() for name, _, x in recorded(rollouts)}
    trunk = rollouts.trunk_rows
    # A trunk was sampled before its branches, and has the smaller number.
    for row in np.argsort(rollouts.sample, kind="stable").tolist():
        n = rollouts.fork[row]
        for column in columns.values() if n else ():
            column[row, :n] = column[trunk[row], :n]
    return rollouts.replace(**columns)


def branch(
    session: Session, run: Run, rollouts: Rollouts, branches: Branches, controls: Controls | None, limit: Any = None
) -> Rollouts:
    """Return the rollouts with further rows; see `Engine.branch`.

    Args:
        session: of the policy, with the key of the rollouts, and room for trunks.
        run: decodes its requests.
        rollouts: to which rows are added.
        branches: as `check_branches` wants them.
        controls: sampling parameters of each row of the rollouts; None: the configured ones.
        limit: maximum completion tokens of all rows that are sampled, or of each; None: `max_new_tokens`.
    """
    rollouts = with_trunks(rollouts)
    limit = session.cfg.max_new_tokens if limit is None else np.asarray(limit)
    if np.shape(limit) not in ((), (len(branches.row),)):
        raise ValueError(
            f"limit: got {np.shape(limit)[0]}, want one number, or one for each of {len(branches.row)} branches"
        )
    at = _Places.of(rollouts, branches, ~branches.continues, limit)
    limits_of("limit", at.limit, np.ones(len(at.row), int), session.cfg.max_new_tokens)
    for b in np.flatnonzero(at.limit <= at.fork)[:1]:
        raise ValueError(
            f"limit: got {at.limit[b]} for a row that begins with {at.fork[b]} tokens of its trunk, want more"
        )
    if controls is None:
        start = session.control_set.start(session.cfg.control)
        controls = controls_of_samples(session.cfg, rollouts.sample[root_rows(rollouts)], start)
    first, size = np.unique(at.row, return_index=True, return_counts=True)[1:]
    prompts: Prompts = jax.tree.map(lambda x: x[rollouts.prompt[at.row[first]]], rollouts.prompts)
    known = _beginnings(whole_paths(rollouts), at, session.decoding.vocab.pad)
    ids = session.add(prompts, size, jax.tree.map(lambda x: np.asarray(x)[at.row], controls), at.limit, known)
    return _joined(rollouts, at.own_part(run(session, ids), rollouts))


class _Places(NamedTuple):
    """The rows to sample, by trunk."""

    row: Int[np.ndarray, " n"]
    """Their trunks; the row itself if it continues."""
    fork: Int[np.ndarray, " n"]
    limit: Int[np.ndarray, " n"]
    number: Int[np.ndarray, " n"]
    """Sample numbers."""
    new: Bool[np.ndarray, " n"]

    @staticmethod
    def of(rollouts: Rollouts, branches: Branches, new: Any, limit: Any) -> "_Places":
        row, fork = (np.asarray(x, np.int32) for x in branches[:2])
        new, limit = (np.broadcast_to(x, len(row)) for x in (new, limit))
        row = np.where(new, _own_trunk(rollouts, row, fork), row)
        order = np.lexsort((fork, row))
        row, fork, limit, new = (x[order] for x in (row, fork, limit, new))
        number = rollouts.sample[row]
        number[new] = _new_numbers(rollouts, rollouts.prompt[row[new]])
        return _Places(row, fork, limit, number, new)

    def own_part(self, paths: Rollouts, rollouts: Rollouts) -> Rollouts:
        """Return the sampled rows without what their trunks sampled."""
        fork = np.where(self.new, self.fork, rollouts.fork[self.row])
        # What shares no token is a further root.
        trunk = np.where(self.fork > 0, rollouts.sample[self.row], self.number)
        trunk = np.where(self.new, trunk, rollouts.trunk[self.row])
        own = np.arange(paths.tokens.shape[1]) >= fork[:, None]
        columns = {name: where_slots(own, x, fill) for name, fill, x in recorded(paths) if name not in OF_PATH}
        return paths.replace(
            prompts=rollouts.prompts, prompt=rollouts.prompt[self.row], trunk=trunk, fork=fork, **columns
        )


def with_trunks(rollouts: Rollouts) -> Rollouts:
    """Return the rollouts with `trunk` and `fork`."""
    if rollouts.trunk is not None:
        return rollouts
    return rollouts.replace(trunk=rollouts.sample, fork=np.zeros_like(rollouts.length))


def _own_trunk(rollouts: Rollouts, row: Int[np.ndarray, " n"], fork: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Return the rows in which the token before the fork was sampled, or the root if there is none before it."""
    trunk = rollouts.trunk_rows
    row = row.copy()
    while (shared := (fork <= rollouts.fork[row]) & (trunk[row] != row)).any():
        row[shared] = trunk[row[shared]]
    return row


def root_rows(rollouts: Rollouts) -> Int[np.ndarray, " B"]:
    """Return the index of the row at the root of each row's tree."""
    trunk = rollouts.trunk_rows
    root = trunk
    while (trunk[root] != root).any():
        root = trunk[root]
    return root


def _new_numbers(rollouts: Rollouts, prompt: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Return sample numbers of new rows of these prompts, which no row has."""
    most = np.full(len(rollouts.prompts.length), -1)
    np.maximum.at(most, rollouts.prompt, rollouts.sample)
    rank = np.zeros(len(prompt), np.int32)
    for p in np.unique(prompt):
        rank[prompt == p] = np.arange(np.count_nonzero(prompt == p))
    return (most[prompt] + 1 + rank).astype(np.int32)


def _beginnings(paths: Rollouts, at: _Places, pad: int) -> Rollouts:
    """Return the tokens with which the rows begin; `paths`: the rollouts with whole paths."""
    inside = np.arange(paths.tokens.shape[1]) < at.fork[:, None]
    columns = {
        name: where_slots(inside, x[at.row], pad if name == "tokens" else fill) for name, fill, x in recorded(paths)
    }
    return Rollouts(
        prompts=paths.prompts,
        prompt=paths.prompt[at.row],
        sample=at.number,
        length=at.fork,
        temperature=paths.temperature[at.row],
        finish=np.full(len(at.fork), int(Finish.UNFINISHED), np.int32),
        **columns,
    )


def _joined(rollouts: Rollouts, sampled: Rollouts) -> Rollouts:
    """Return the rows of both by prompt and sample number, sampled ones in place of their earlier state; filler rows stay last."""
    old = {name: getattr(rollouts, name) for name in Rollouts.__dataclass_fields__ if name != "prompts"}
    names = set(zip(sampled.prompt.tolist(), sampled.sample.tolist(), strict=True))
    each = zip(rollouts.prompt.tolist(), rollouts.sample.tolist(), strict=True)
    stays = np.array([one not in names for one in each])
    both = {name: np.concatenate([x[stays], getattr(sampled, name)]) for name, x in old.items() if x is not None}
    order = np.lexsort((both["sample"], np.where(both["prompt"] < 0, len(stays), both["prompt"])))
    return rollouts.replace(**{name: x[order] for name, x in both.items()})

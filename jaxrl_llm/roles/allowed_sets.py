"""What the control allowed at each token of recorded responses, for people."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxrl_llm.distribution.control_tables import ControlTables, allowed_classes, state_of
from jaxrl_llm.types import Rollouts

SHOWN = 8
"""Allowed tokens that are named; the others are counted."""


class AllowedSet(NamedTuple):
    """Tokens that were allowed in one slot, where not all were."""

    size: int
    first: tuple[int, ...]
    """The first of them by token id."""


def allowed_sets(tables: ControlTables, codes: Int[np.ndarray, " n"], num_tokens: int) -> list[AllowedSet | None]:
    """Return what was allowed under entries of `control_state`; None: every token.

    Args:
        tables: in which the entries are read, NumPy.
        codes: the entries.
        num_tokens: tokens of the tokenizer.
    """
    seen: dict[tuple[int, bytes], AllowedSet | None] = {}
    found = []
    states = state_of(codes)
    each = zip(states, tables.automaton[states].tolist(), allowed_classes(tables, codes, np), strict=True)
    for state, automaton, classes in each:
        if (forced := int(tables.forced[state])) >= 0:
            found.append(AllowedSet(1, (forced,)))
            continue
        name = automaton, classes.tobytes()
        if name not in seen:
            ids = np.flatnonzero(classes[tables.classes[automaton, :num_tokens]])
            seen[name] = None if len(ids) == num_tokens else AllowedSet(len(ids), tuple(ids[:SHOWN].tolist()))
        found.append(seen[name])
    return found


def allowed_in_row(
    tables: ControlTables | None, rollouts: Rollouts, b: int, num_tokens: int
) -> list[AllowedSet | None]:
    """Return what was allowed at each token of row b; None: every token.

    Args:
        tables: of the engine that sampled it, NumPy; None: nothing was controlled.
        rollouts: with the row, NumPy.
        b: the row.
        num_tokens: tokens of the tokenizer.
    """
    length = int(rollouts.length[b])
    if tables is None or rollouts.control_state is None:
        return [None] * length
    return allowed_sets(tables, rollouts.control_state[b, :length], num_tokens)

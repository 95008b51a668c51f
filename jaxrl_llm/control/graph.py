"""Tables of transitions as graphs. A negative entry is no transition."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

# Distance of a state from which no end can be reached.
ENDLESS = np.iinfo(np.int32).max


def distances(table: Int[np.ndarray, "S K"], sinks: Bool[np.ndarray, " S"]) -> Int[np.ndarray, " S"]:
    """Fewest transitions from each state to one of `sinks`, int32; ENDLESS: there is no way."""
    source, target = edges(table)
    return _fewest(target, source, len(table), np.flatnonzero(sinks))


def steps_from(table: Int[np.ndarray, "S K"], roots: Sequence[int]) -> Int[np.ndarray, " S"]:
    """Fewest transitions from one of `roots` to each state, int32; ENDLESS: there is no way."""
    return _fewest(*edges(table), len(table), np.asarray(roots))


def edges(table: Int[np.ndarray, "S K"]) -> tuple[Int[np.ndarray, " E"], Int[np.ndarray, " E"]]:
    """Return the distinct pairs of a state and one behind it."""
    source, column = np.nonzero(table >= 0)
    pair = np.unique(source * len(table) + table[source, column])
    return pair // len(table), pair % len(table)


def distinct(rows: Int[np.ndarray, "N M"]) -> tuple[Int[np.ndarray, " D"], Int[np.ndarray, " N"]]:
    """Return the first row of each kind, and the kind of each row, both in order of appearance. On long rows many times faster than
    `np.unique`."""
    kinds: dict[bytes, int] = {}
    kind = np.array([kinds.setdefault(row.tobytes(), len(kinds)) for row in rows], np.int64)
    return np.unique(kind, return_index=True)[1], kind


def _fewest(
    source: Int[np.ndarray, " E"], target: Int[np.ndarray, " E"], states: int, roots: Int[np.ndarray, " R"]
) -> Int[np.ndarray, " S"]:
    # Only runs with a control pay for these.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import dijkstra

    if not len(roots):
        return np.full(states, ENDLESS, np.int32)
    graph = coo_array((np.ones(len(source), np.int32), (source, target)), (states, states)).tocsr()
    steps = dijkstra(graph, indices=roots, unweighted=True, min_only=True)
    return np.where(np.isfinite(steps), steps, ENDLESS).astype(np.int32)

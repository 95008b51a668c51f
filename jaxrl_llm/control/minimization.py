"""Fewer states for an automaton over bytes."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from jaxrl_llm.control.byte_automaton import DEAD, ByteAutomaton
from jaxrl_llm.control.graph import distances, distinct, edges


def merge_equivalent(automaton: ByteAutomaton, kept: Sequence[int] = ()) -> tuple[ByteAutomaton, Int[np.ndarray, " S"]]:
    """Return the automaton with one state for all states that the same texts follow, and the number of each state there. States in
    `kept` are merged with none.

    Moore's refinement of partitions. A round looks only at states whose successors changed their block in the round before:
    a counted repeat takes as many rounds as it counts, each of which splits off one state.
    """
    by_class = automaton.next[:, distinct(automaton.next.T)[0]]
    source, target = edges(automaton.next)
    apart = np.zeros(len(by_class), np.int32)
    apart[list(kept)] = np.arange(1, len(kept) + 1)
    # States at different distances from acceptance differ, and finding that first saves most rounds.
    known = [distances(by_class, automaton.accepts | automaton.free), automaton.accepts, automaton.free, apart]
    block = distinct(np.stack(known, axis=1).astype(np.int32))[1]
    count, seen = block.max() + 1, np.arange(len(block))
    while len(seen):
        others = np.ones(len(block), bool)
        others[seen] = False
        # All other states of a block still have equal successors, so one of them stands for all, and keeps the number.
        others = np.flatnonzero(others & np.isin(block, block[seen]))
        rows = np.concatenate([others[np.unique(block[others], return_index=True)[1]], seen])
        # The last entry is that of DEAD.
        behind = np.append(block, DEAD).astype(np.int32)[by_class[rows]]
        first, kind = distinct(np.concatenate([block[rows][:, None], behind], axis=1))
        number = block[rows[first]]
        again = np.setdiff1d(np.arange(len(first)), np.unique(number, return_index=True)[1])
        number[again] = count + np.arange(len(again))
        count += len(again)
        changed = rows[block[rows] != number[kind]]
        block[rows] = number[kind]
        moved = np.zeros(len(block), bool)
        moved[changed] = True
        seen = np.unique(source[moved[target]])
    first, merged = np.unique(block, return_index=True, return_inverse=True)[1:]
    next = np.append(merged, DEAD).astype(np.int32)[automaton.next[first]]
    return ByteAutomaton(next, automaton.accepts[first], automaton.free[first], int(merged[automaton.start])), merged

"""Lists of texts as automata over bytes."""

from collections.abc import Sequence

import numpy as np

from jaxrl_llm.control.byte_automaton import DEAD, ByteAutomaton
from jaxrl_llm.control.regex import surrogate_in
from jaxrl_llm.errors import UserError


def from_texts(texts: Sequence[str], where: str) -> ByteAutomaton:
    """Return the automaton of texts that are one of these: their trie. One may be the beginning of another.

    Raises:
        UserError: One has half a surrogate pair.
    """
    next: list[dict[int, int]] = [{}]
    accepting = set()
    for text in texts:
        if wrong := surrogate_in(text):
            raise UserError(f"{where}: got {text!r}, {wrong}")
        state = 0
        for byte in text.encode():
            if byte not in next[state]:
                next[state][byte] = len(next)
                next.append({})
            state = next[state][byte]
        accepting.add(state)
    table = np.full((len(next), 256), DEAD, np.int32)
    for state, row in enumerate(next):
        table[state, list(row)] = list(row.values())
    return ByteAutomaton(table, np.isin(np.arange(len(next)), list(accepting)), np.zeros(len(next), bool))

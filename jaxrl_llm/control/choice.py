"""Lists of texts as automata over bytes."""

from collections.abc import Sequence

import numpy as np

from jaxrl_llm.control.automaton import TokenTexts
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


def check_spelled(texts: Sequence[str], vocabulary: TokenTexts, where: str) -> None:
    """Check that each text is one that a response can be: a text that cannot is never sampled, and nothing would say so.

    Raises:
        UserError: No tokens spell one, or it does not end with an end token that is text itself.
    """
    ends = {vocabulary.texts[id] for id in vocabulary.ends}
    inside = {text for id, text in enumerate(vocabulary.texts) if text and id not in vocabulary.ends}
    spaces = ("", " ") if vocabulary.drops_space else ("",)
    for text in texts:
        if any(_is_spelled((space + text).encode(), inside, ends) for space in spaces):
            continue
        also = [repr(end.decode(errors="replace")) for end in ends if end]
        want = f"texts that end with {' or '.join(also)}, and else have" if also else "texts of"
        raise UserError(f"{where}: got {text!r}, which this tokenizer cannot spell, want {want} characters that it has")


def _is_spelled(text: bytes, inside: set[bytes], ends: set[bytes | None]) -> bool:
    """Return whether tokens spell a text, and an end token follows or is the last of them."""
    longest = max(map(len, inside), default=0)
    reached = [begin == 0 for begin in range(len(text) + 1)]
    for begin in range(len(text)):
        for end in range(begin + 1, min(begin + longest, len(text)) + 1):
            reached[end] |= reached[begin] and text[begin:end] in inside
    ended = any(end and text.endswith(end) and reached[len(text) - len(end)] for end in ends)
    return ended or (reached[-1] and None in ends)

"""Search for the first occurrence of one of some texts, as transitions over bytes."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


def searching(texts: Sequence[bytes]) -> Int[np.ndarray, "S 256"]:
    """Transitions of the search for texts, none of them empty (Aho and Corasick 1975). State 0: no text has begun. The number of
    states, S, stands for the state behind the first occurrence."""
    prefixes = sorted({b"", *(text[: n + 1] for text in texts for n in range(len(text)))}, key=len)
    number = {prefix: i for i, prefix in enumerate(prefixes)}
    next, found = np.zeros((len(prefixes), 256), np.int32), np.zeros(len(prefixes), bool)
    # The longest other prefix that each prefix ends with.
    shorter = np.zeros(len(prefixes), np.int32)
    for i, prefix in enumerate(prefixes):
        if len(prefix) > 1:
            shorter[i] = next[shorter[number[prefix[:-1]]], prefix[-1]]
        next[i] = next[shorter[i]]
        found[i] = prefix in texts or found[shorter[i]]
        for byte in range(256):
            next[i, byte] = number.get(prefix + bytes([byte]), next[i, byte])
    behind = np.where(found, (~found).sum(), np.cumsum(~found) - 1)
    return behind[next[~found]].astype(np.int32)

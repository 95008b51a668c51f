"""Program: a pattern in standard input becomes a deterministic automaton over bytes in standard output, as .npz.

It is a process of its own because the compiler of regular expressions takes memory and time without a limit, and ends its process
when memory runs out. Exit code 2: the pattern is wrong, and standard error says why.
"""

import io
import sys

import numpy as np
import outlines_core

MEMORY = 4 << 30  # bytes
PATTERN_IS_WRONG = 2
# The compiler also prepares for matches that begin anywhere in a text, which multiplies the states, and it stops at the first
# alternative that matches (`a|ab` is never ab). The empty alternative is a match at once, so nothing begins later; \z is a match at
# the end of a text alone. The states of the pattern are those behind the bytes 0 and 1.
AROUND = r"\x00(?:\z|\x01(?:{})\z)|"


def transitions(pattern: str) -> dict[str, np.ndarray]:
    """Return the fields of a ByteAutomaton: next i32[S 256], accepts bool[S], start i32. Raises ValueError."""
    # Token b is byte b.
    alphabet = outlines_core.Vocabulary(256, {bytes([byte]): [byte] for byte in range(256)})
    index = outlines_core.Index(AROUND.format(pattern), alphabet)
    found, final = index.get_transitions(), index.get_final_states()
    states = sorted({*found, *(state for row in found.values() for state in row.values())})
    number = {state: i for i, state in enumerate(states)}
    next = np.full((len(states), 257), -1, np.int32)
    for state, row in found.items():
        next[number[state], list(row)] = [number[behind] for behind in row.values()]
    start = next[next[number[index.get_initial_state()], 0], 1]
    return {"next": next[:, :256], "accepts": np.isin(states, list(final)), "start": start}


def main() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):
        pass  # a system without limits, or one with a lower limit
    try:
        found = transitions(sys.stdin.buffer.read().decode())
    except ValueError as error:
        sys.stderr.write(str(error))
        sys.exit(PATTERN_IS_WRONG)
    buffer = io.BytesIO()
    np.savez(buffer, **found)
    sys.stdout.buffer.write(buffer.getvalue())


if __name__ == "__main__":
    main()

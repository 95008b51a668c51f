"""Regular expressions as automata over bytes. A text matches as a whole, whatever alternative comes first in the pattern."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from jaxrl_llm.control.byte_automaton import DEAD, ByteAutomaton
from jaxrl_llm.control.compile_pattern import PATTERN_IS_WRONG
from jaxrl_llm.control.graph import ENDLESS, steps_from
from jaxrl_llm.errors import UserError, describe_os_error

COMPILER = Path(__file__).with_name("compile_pattern.py")
SECONDS = 30.0
# Escapes and classes are skipped: what is in them is neither a group nor an anchor.
PIECES = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|[()^]", re.DOTALL)
# The texts are matched from their beginning, so an anchor there says nothing.
LEADING_ANCHOR = re.compile(r"\A((?:\(\?[a-zA-Z-]+\))?)(?:\^|\\A)")


def from_regex(pattern: str, where: str) -> ByteAutomaton:
    """Return the automaton of the texts that match a pattern as a whole, in the syntax of Rust's regex crate.

    Raises:
        UserError: The syntax is wrong, or the automaton has too many states to be worked out.
    """
    pattern = LEADING_ANCHOR.sub(r"\1", pattern)
    named = f"{where}: got {_short(pattern)}"
    if wrong := surrogate_in(pattern) or _anchor_or_parenthesis(pattern):
        raise UserError(f"{named}, {wrong}")
    found = _transitions(pattern, named)
    # What is around the pattern has states too.
    own = np.flatnonzero(steps_from(found["next"], [found["start"]]) < ENDLESS)
    number = np.full(len(found["next"]) + 1, DEAD, np.int32)
    number[own] = np.arange(len(own))
    return ByteAutomaton(
        number[found["next"][own]], found["accepts"][own], np.zeros(len(own), bool), int(number[found["start"]])
    )


def _transitions(pattern: str, named: str) -> dict[str, np.ndarray]:
    """Fields of the automaton, from the compiler. `named`: the setting and what was got, for errors."""
    too_large = f"{named}, want a smaller pattern: shorter counted repeats, and fewer of them inside another"
    try:
        # -P: the modules beside the compiler are none of the names that it imports.
        done = subprocess.run(
            [sys.executable, "-P", COMPILER],
            input=pattern.encode(),
            capture_output=True,
            timeout=SECONDS,
            # Else NumPy reserves memory for each processor of the machine, and little is left below the limit.
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{too_large}; its automaton took more than {SECONDS:.0f} seconds") from None
    except OSError as error:
        raise UserError(f"{named}, whose automaton could not be worked out: {describe_os_error(error)}") from None
    if done.returncode == PATTERN_IS_WRONG:
        raise UserError(
            f"{named}, want a regular expression of Rust's regex crate: {_reason(pattern, done.stderr.decode())}"
        )
    if done.returncode:
        last = " ".join(done.stderr.decode(errors="replace").split())[-200:]
        raise UserError(f"{too_large}; its automaton could not be worked out ({last})")
    with np.load(io.BytesIO(done.stdout)) as found:
        return dict(found)


def surrogate_in(text: str) -> str:
    """What is wrong, if a text has half a surrogate pair, which no bytes spell; else ""."""
    return "want whole characters: it has half a surrogate pair" if re.search("[\ud800-\udfff]", text) else ""


def _anchor_or_parenthesis(pattern: str) -> str | None:
    """What is wrong, if there is an anchor behind the beginning, or if a parenthesis closes what none opened."""
    depth = 0
    for piece in PIECES.findall(pattern):
        if piece in ("^", r"\A"):
            return rf"want it without {piece}: a response matches as a whole (the character ^ is \^)"
        depth += {"(": 1, ")": -1}.get(piece, 0)
        if depth < 0:
            return r"want balanced parentheses (the character ) is \))"
    return None


def _short(text: str) -> str:
    return repr(text) if len(text) <= 200 else f"{text[:200]!r}..."


def _reason(pattern: str, message: str) -> str:
    """The compiler's message. It does not say what is wrong with the syntax, so Python's reason is shown, if it has one."""
    if "error building NFA" not in message:
        return " ".join(message.split())
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error)
    return "it has no look-around ((?=, (?!, (?<=, (?<!) and no back-references (\\1), and matches whole characters"

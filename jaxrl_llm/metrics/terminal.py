"""Text that is safe for a terminal: control characters of models, data and files are shown, not executed."""

import logging
import sys
from typing import TextIO
from unicodedata import category

HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # Unicode categories that move the cursor, reorder text or cannot be encoded


def printable(text: str, width: int | None = None) -> str:
    r"""`text` on one line, safe for a terminal: control, bidi and other invisible characters become \n, \x1b, \u202e.

    If it is longer than `width` terminal cells (wide characters take two), "…" replaces its middle, since answers come last.
    """
    safe = "".join(c.encode("unicode_escape").decode("ascii") if category(c) in HIDDEN else c for c in text)
    if width is None:
        return safe
    from rich.cells import cell_len, set_cell_size

    if cell_len(safe) <= width:
        return safe
    tail = (width - 1) // 2
    return set_cell_size(safe, width - 1 - tail) + "…" + set_cell_size(safe[::-1], tail)[::-1]


def printable_lines(text: str) -> str:
    """Apply `printable` line by line."""
    return "\n".join(map(printable, text.split("\n")))


def say(text: str, to: TextIO | None = None) -> None:
    """Print printable text, to standard output by default."""
    out = sys.stdout if to is None else to
    safe = printable_lines(text)
    print(safe.encode(out.encoding or "utf-8", "backslashreplace").decode(out.encoding or "utf-8"), file=out)


class PrintableFormatter(logging.Formatter):
    """Formatter of log messages, which may contain names and contents of files."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))

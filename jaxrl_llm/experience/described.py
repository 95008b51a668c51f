"""Metrics of a curriculum's choice: the shares of strata among the rows that it chose."""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

MAX_STRATA, LONGEST, OTHER = 12, 40, "other"


def shares_of(names: Sequence[str], stratum: Int[np.ndarray, " rows"], rows: Int[np.ndarray, " n"]) -> dict[str, float]:
    """Return `share/NAME`, the share of each stratum among the chosen rows. Beyond 12 strata, those with the fewest rows in the
    task are together as `share/other`; so are those whose names become the same as metrics.

    Args:
        names: of the strata.
        stratum: of each row of the task.
        rows: indices of the chosen ones.
    """
    num = len(names)
    size, count = np.bincount(stratum[stratum >= 0], minlength=num), np.bincount(stratum[rows], minlength=num)
    shown = np.ones(num, bool)
    if num > MAX_STRATA:
        shown[np.lexsort((np.arange(num), -size))[MAX_STRATA - 1 :]] = False
    found: dict[str, float] = {}
    for i, name in enumerate(names):
        key = f"share/{metric_name(name) if shown[i] else OTHER}"
        found[key] = found.get(key, 0.0) + count[i] / len(rows)
    return found


def metric_name(text: str) -> str:
    """Return the text as a part of a metric's name: letters, digits and . _ -, at most 40 of them; "none" for an empty one."""
    return re.sub(r"[^\w.-]+", "_", text, flags=re.ASCII)[:LONGEST] or "none"

"""Responses of a prompt as a tree: which left which, where, and what the rewards behind a token say of it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]


class Branch(NamedTuple):
    """A response in its tree."""

    row: Row
    depth: int
    """Branches between the prompt and it."""
    left: Mapping[int, str]
    """Tokens before which others left it, and what is to be said of each."""


def depth_first(rows: Sequence[Row]) -> list[Branch]:
    """Return the responses of one prompt, each behind the one that it left; without trees in their order."""
    names = {row.get("sample"): row for row in rows}
    below: dict[Any, list[Row]] = {}
    for row in rows:
        if _has_trunk(row, names):
            below.setdefault(row["trunk"], []).append(row)
    found: list[Branch] = []
    waiting, seen = [(row, 0) for row in reversed(rows) if not _has_trunk(row, names)], set()
    while waiting:
        row, depth = waiting.pop()
        # Two responses of one number in a file that somebody edited: branches are shown once.
        if id(row) in seen:
            continue
        seen.add(id(row))
        left = below.get(row.get("sample"), [])
        found.append(Branch(row, depth, {fork: _said(fork, row, below) for fork in sorted({b["fork"] for b in left})}))
        waiting += [(branch, depth + 1) for branch in sorted(left, key=lambda b: (b["fork"], -_number(b)))]
    return found


def _has_trunk(row: Row, names: Mapping[Any, Row]) -> bool:
    """True if the response left one of the others, before a token that it has."""
    trunk, fork = row.get("trunk"), row.get("fork")
    is_known = isinstance(trunk, int) and isinstance(fork, int) and trunk in names and fork >= 0
    # In what the package wrote a trunk has the smaller number; anything else could be a circle.
    return is_known and _number(names[trunk]) < _number(row)


def _number(row: Row) -> int:
    return row["sample"] if isinstance(row.get("sample"), int) else -1


def _said(fork: int, row: Row, below: Mapping[Any, list[Row]]) -> str:
    """What is to be said of a token of a response before which others left it."""
    others = [b for b in below[row["sample"]] if b["fork"] == fork]
    own = [row, *(leaf for b in below[row["sample"]] if b["fork"] > fork for leaf in _leaves(b, below))]
    named = "; ".join(f"{b['sample']}: {_mean(list(_leaves(b, below)))}" for b in others)
    return f"left before it, with the mean reward behind: {named}; here: {_mean(own)}"


def _leaves(row: Row, below: Mapping[Any, list[Row]]) -> Iterator[Row]:
    waiting, seen = [row], set()
    while waiting:
        one = waiting.pop()
        if id(one) not in seen:
            seen.add(id(one))
            yield one
            waiting += below.get(one["sample"], [])


def _mean(rows: Sequence[Row]) -> str:
    known = [row["reward"] for row in rows if row.get("reward") is not None]
    return f"{sum(known) / len(known):.3f}" if known else "-"

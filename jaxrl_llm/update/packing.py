"""Where sequences lie in the rows of a batch. A unit stays together: a prompt and one completion, or several that share it."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

Each = Int[np.ndarray, " B"]


class Shape(NamedTuple):
    """Of the batches of a run: fixed, so that nothing compiles twice."""

    kind: str
    """`update.packing.kind`."""
    rows: int
    slots: int
    parts: int
    """Micro-batches: part i holds rows i, i + parts, ..."""


class Places(NamedTuple):
    """Of B sequences in `shape.rows` rows of `shape.slots` slots."""

    shape: Shape
    row: Each
    """-1: left out."""
    prompt: Each
    """Its prompt's first slot."""
    start: Each
    """Its completion's first slot."""
    end: Each
    """The slot behind its unit: all of it sees the prompt."""
    first: Bool[np.ndarray, " B"]
    """The first of its unit."""
    segment: Each
    group: Each


def shape_of(
    kind: str, prompts: int, samples: int, sizes: tuple[int, int], slots: int, parts: int, shards: int
) -> Shape:
    """Room for `prompts` groups of `samples` at their longest, `sizes` = (prompt, completion) slots.

    `slots`: T, 0 for the least that does. Rows are a multiple of parts * shards. ValueError where one sequence does not fit.
    """
    s, c = sizes
    least = s + c
    slots = least if kind == "none" else slots or (s + samples * c if kind == "shared_prefix" else least)
    if slots < least:
        raise ValueError(f"got {slots} slots, want at least the {least} of one sequence")
    if kind == "shared_prefix":
        together = min(samples, (slots - s) // c)
        units, size = prompts * -(-samples // together), s + together * c
    else:
        units, size = prompts * samples, least
    # First fit leaves no row but the last with fewer units than fit at their longest.
    rows = -(-units // (slots // size)) if kind != "none" else units
    return Shape(kind, -(-rows // (parts * shards)) * parts * shards, slots, parts)


def place(prompt_length: Each, length: Each, group: Each, learn: Bool[np.ndarray, " B"], shape: Shape) -> Places:
    """Sequences that `learn`, into as few rows as first fit of the longest first finds; the first parts are filled first.

    `group` is ascending: a group's sequences stand together.
    """
    of, sizes = _units(prompt_length, length, group, learn, shape)
    if sizes.max(initial=0) > shape.slots:
        raise ValueError(
            f"packing: got a sequence of {sizes.max()} tokens, want at most the {shape.slots} slots of a row"
        )
    turn, row_of = _rows(sizes, shape)
    if row_of.max(initial=-1) >= shape.rows:
        raise ValueError(f"packing: got {row_of.max() + 1} rows, want at most {shape.rows}")
    # All that is placed, in the order in which it lies: rows, their units by turn, a unit's sequences as they came.
    taken = np.flatnonzero(of >= 0)
    b = taken[np.lexsort((turn[of[taken]], row_of[of[taken]]))]
    unit, row = of[b], row_of[of[b]]
    begins_unit, begins_row = np.diff(unit, prepend=-1) != 0, np.diff(row, prepend=-1) != 0
    taken_by = length[b] + np.where(begins_unit, prompt_length[b], 0)
    stop = _within(begins_row, np.cumsum(taken_by), taken_by)
    start = stop - length[b]
    prompt = (start - prompt_length[b])[begins_unit][np.cumsum(begins_unit) - 1]
    each = shape.rows // shape.parts
    found = {
        "row": row % each * shape.parts + row // each,
        "prompt": prompt,
        "start": start,
        "end": prompt + sizes[unit],
        "segment": _within(begins_row, np.arange(1, len(b) + 1), 1),
        "group": _within(begins_row, np.cumsum(begins_unit), begins_unit),
    }
    fields = {name: np.full(len(length), -1, np.int32) for name in found}
    for name, values in found.items():
        fields[name][b] = values
    first = np.zeros(len(length), bool)
    first[b[begins_unit]] = True
    return Places(shape=shape, first=first, **fields)


def _within(begins: Bool[np.ndarray, " n"], total: Int[np.ndarray, " n"], own: np.ndarray | int) -> np.ndarray:
    """Running totals, each row's from its own beginning on."""
    return total - (total - own)[begins][np.cumsum(begins) - 1]


def _rows(sizes: Int[np.ndarray, " units"], shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Of each unit when it is placed, and the row: one after another, or the largest first, in the first with room."""
    if shape.kind == "none":
        return np.arange(len(sizes)), np.arange(len(sizes))
    turn, row_of, room = np.zeros(len(sizes), int), np.zeros(len(sizes), int), np.full(len(sizes), shape.slots)
    for n, u in enumerate(np.argsort(-sizes, kind="stable")):
        turn[u], row_of[u] = n, np.argmax(room >= sizes[u])
        room[row_of[u]] -= sizes[u]
    return turn, row_of


def _units(
    prompt_length: Each, length: Each, group: Each, learn: np.ndarray, shape: Shape
) -> tuple[Each, Int[np.ndarray, " units"]]:
    """Each sequence's unit, -1 for what is left out, and the tokens of each unit."""
    of, sizes, last = np.full(len(length), -1), [], None
    for b in np.flatnonzero(learn).tolist():
        more = int(length[b])
        if shape.kind == "shared_prefix" and group[b] == last and sizes[-1] + more <= shape.slots:
            sizes[-1] += more
        else:
            sizes.append(int(prompt_length[b]) + more)
            last = group[b]
        of[b] = len(sizes) - 1
    return of, np.array(sizes, int)

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
    fields = {
        name: np.full(len(length), -1, np.int32) for name in ("row", "prompt", "start", "end", "segment", "group")
    }
    first = np.zeros(len(length), bool)
    units = _units(prompt_length, length, group, learn, shape)
    sizes = [int(prompt_length[unit[0]] + sum(length[b] for b in unit)) for unit in units]
    order = sorted(range(len(units)), key=lambda u: -sizes[u]) if shape.kind != "none" else range(len(units))
    used, segments, groups = [], [], []
    for u in order:
        row = next((r for r, n in enumerate(used) if shape.kind != "none" and n + sizes[u] <= shape.slots), len(used))
        if row == len(used):
            used, segments, groups = [*used, 0], [*segments, 0], [*groups, 0]
        prompt, slot = used[row], used[row] + int(prompt_length[units[u][0]])
        groups[row] += 1
        for b in units[u]:
            segments[row] += 1
            fields["row"][b], fields["prompt"][b], fields["start"][b] = row, prompt, slot
            fields["end"][b], fields["segment"][b], fields["group"][b] = prompt + sizes[u], segments[row], groups[row]
            slot += int(length[b])
        first[units[u][0]] = True
        used[row] += sizes[u]
    if len(used) > shape.rows:
        raise ValueError(f"packing: got {len(used)} rows, want at most {shape.rows}")
    each = shape.rows // shape.parts
    spread = (fields["row"] % each) * shape.parts + fields["row"] // each
    fields["row"] = np.where(fields["row"] >= 0, spread, -1).astype(np.int32)
    return Places(shape=shape, first=first, **fields)


def _units(prompt_length: Each, length: Each, group: Each, learn: np.ndarray, shape: Shape) -> list[list[int]]:
    units: list[list[int]] = []
    size, last = 0, None
    for b in np.flatnonzero(learn):
        shares = shape.kind == "shared_prefix" and group[b] == last and size + length[b] <= shape.slots
        if shares:
            units[-1].append(int(b))
            size += int(length[b])
        else:
            units.append([int(b)])
            size, last = int(prompt_length[b] + length[b]), group[b]
    return units

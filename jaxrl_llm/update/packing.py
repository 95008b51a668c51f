"""Packing: placement of sequences in the rows of a batch. A sequence group, one prompt and the completions that share it, stays in
one row; without shared prefixes it has one completion. Completions that share their first tokens, those of a tree, are placed depth
first: each but the first places only what it does not share with the one before it."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

Each = Int[np.ndarray, " B"]


class BatchShape(NamedTuple):
    """Shape of a run's batches: fixed, so that each program compiles once."""

    kind: str
    """`update.packing.kind`."""
    rows: int
    slots: int
    num_micro_batches: int
    """Micro-batch i has the rows i, i + num_micro_batches, ..."""


class GroupSizes(NamedTuple):
    """What is known about the sizes of groups before they exist."""

    prompts: int
    rows: int
    """B, of all groups together, at most."""
    most: int
    """Rows of the largest group, at most."""
    equal: bool = False
    """True if every group has exactly that many."""


def equal_groups(prompts: int, samples: int) -> GroupSizes:
    return GroupSizes(prompts, prompts * samples, samples, equal=True)


def share(groups: GroupSizes, minibatches: int) -> GroupSizes:
    """Return the sizes of one of several minibatches: equally many rows, and up to a group more if groups differ in size."""
    prompts, rows, most, equal = groups
    if equal:
        return equal_groups(prompts // minibatches, most)
    rows = min(-(-rows // minibatches) + (most - 1) * (minibatches > 1), rows)
    return GroupSizes(min(prompts, rows), rows, min(most, rows))


class Placement(NamedTuple):
    """Placement of B sequences in `shape.rows` rows of `shape.slots` slots."""

    shape: BatchShape
    row: Each
    """-1: not in the batch."""
    prompt: Each
    """First slot of its prompt."""
    start: Each
    """First slot of its own tokens."""
    shared: Each
    """Completion tokens that it does not place, since sequences before it have them."""
    end: Each
    """Slot after its sequence group, all of which attends to the prompt."""
    first: Bool[np.ndarray, " B"]
    """First sequence of its sequence group."""
    segment: Each
    group: Each


def batch_shape(
    kind: str, groups: GroupSizes, longest: tuple[int, int], slots: int, num_micro_batches: int, shards: int
) -> BatchShape:
    """Return the shape that fits all sequences of such groups at their longest.

    Args:
        kind: `update.packing.kind`.
        groups: of how many sequences.
        longest: (prompt, completion) in tokens.
        slots: tokens per row T; 0: the least that fits, with shared_prefix a group of average size.
        num_micro_batches: micro-batches; rows are a multiple of num_micro_batches * shards.
        shards: row shards of the mesh.

    Raises:
        ValueError: one sequence does not fit into a row.
    """
    s, c = longest
    # With no more rows than this, groups that are smaller leave room for no more sequence groups than equal ones.
    least, equal = s + c, groups.rows == groups.prompts * groups.most
    samples = groups.most if equal else -(-groups.rows // groups.prompts)
    slots = least if kind == "none" else slots or (s + samples * c if kind == "shared_prefix" else least)
    if slots < least:
        raise ValueError(f"got {slots} slots, want at least the {least} of one sequence")
    if kind == "none":
        rows = groups.rows
    elif kind == "plain":
        rows = _rows_of_equal(groups.rows, least, slots)
    elif equal:
        together = min(groups.most, (slots - s) // c)
        rows = _rows_of_equal(groups.prompts * -(-groups.most // together), s + together * c, slots)
    else:
        rows = _rows_of_unequal(groups, longest, slots)
    return BatchShape(
        kind, -(-rows // (num_micro_batches * shards)) * num_micro_batches * shards, slots, num_micro_batches
    )


def _rows_of_equal(num: int, size: int, slots: int) -> int:
    """Return rows for `num` sequence groups of at most `size` tokens."""
    # With first fit, every row but the last has at least as many as fit at their longest.
    return -(-num // (slots // size))


def _rows_of_unequal(groups: GroupSizes, longest: tuple[int, int], slots: int) -> int:
    """Return rows for the sequence groups of prompts with different numbers of sequences.

    First fit takes the largest first. When a sequence group of at most k sequences, s + k c tokens, opens the last row, every
    other row holds one or more that are as large, so of k sequences or more, and leaves less room than that. Their number and
    their tokens bound the rows; the bound is the largest over k.
    """
    (s, c), (prompts, total, most, _) = longest, groups
    together, bounds = min(most, (slots - s) // c), []
    for k in range(1, together + 1):
        of_k = min(prompts, total // k)
        # A prompt's sequences fill sequence groups of `together` or more, and one of the rest.
        num = of_k + (total - k * of_k) // together
        room = slots - s - k * c
        bounds.append(min(num - 1, (num * s + total * c) // room if room else num - 1))
    return 1 + max(bounds)


class Branching(NamedTuple):
    """What sequences share beside their prompt."""

    order: Each
    """Sequences by group and depth first: behind each come those that share its tokens, those that share most first."""
    shared: Each
    """First tokens that each sequence has in common with the one before it in this order."""


def branching(group: Each, trunk: Each, fork: Each) -> Branching:
    """Return the order of sequences that leave others.

    Args:
        group: ascending.
        trunk: sequence that each one left, itself if it left none.
        fork: tokens that it has in common with its trunk.
    """
    left, order = [[] for _ in trunk], []
    waiting = [b for b in range(len(trunk) - 1, -1, -1) if trunk[b] == b]
    for b in np.lexsort((np.arange(len(trunk)), -fork)).tolist():
        if trunk[b] != b:
            left[trunk[b]].append(b)
    while waiting:
        b = waiting.pop()
        order.append(b)
        waiting += reversed(left[b])
    return Branching(np.array(order, int), np.where(trunk == np.arange(len(trunk)), 0, fork))


def place_sequences(
    prompt_length: Each, length: Each, group: Each, used: Bool[np.ndarray, " B"], shape: BatchShape,
    tree: Branching | None = None,
) -> Placement:  # fmt: skip
    """Place the used sequences by first fit, longest first; the first micro-batches are filled first.

    Args:
        prompt_length: tokens per prompt.
        length: tokens per completion.
        group: ascending, so the sequences of a group are adjacent.
        used: sequences to place.
        shape: of the batch.
        tree: what they share beside their prompt; None: nothing.

    Raises:
        ValueError: a sequence is longer than a row, or there are too few rows.
    """
    tree = tree or Branching(np.arange(len(length)), np.zeros(len(length), int))
    group_of, shared, sizes = _sequence_groups(prompt_length, length, group, used, shape, tree)
    if sizes.max(initial=0) > shape.slots:
        raise ValueError(
            f"packing: got a sequence of {sizes.max()} tokens, want at most the {shape.slots} slots of a row"
        )
    turn, row_of = _rows(sizes, shape)
    if row_of.max(initial=-1) >= shape.rows:
        raise ValueError(f"packing: got {row_of.max() + 1} rows, want at most {shape.rows}")
    # Placed sequences in row order; within a row by time of placement, within a sequence group depth first.
    taken = tree.order[group_of[tree.order] >= 0]
    b = taken[np.lexsort((turn[group_of[taken]], row_of[group_of[taken]]))]
    index, row = group_of[b], row_of[group_of[b]]
    begins_group, begins_row = np.diff(index, prepend=-1) != 0, np.diff(row, prepend=-1) != 0
    own = length[b] - shared[b]
    taken_by = own + np.where(begins_group, prompt_length[b], 0)
    stop = _within(begins_row, np.cumsum(taken_by), taken_by)
    start = stop - own
    prompt = (start - prompt_length[b])[begins_group][np.cumsum(begins_group) - 1]
    per_micro_batch = shape.rows // shape.num_micro_batches
    found = {
        "row": row % per_micro_batch * shape.num_micro_batches + row // per_micro_batch,
        "prompt": prompt,
        "start": start,
        "shared": shared[b],
        "end": prompt + sizes[index],
        "segment": _within(begins_row, np.arange(1, len(b) + 1), 1),
        "group": _within(begins_row, np.cumsum(begins_group), begins_group),
    }
    fields = {name: np.full(len(length), -1, np.int32) for name in found}
    for name, values in found.items():
        fields[name][b] = values
    first = np.zeros(len(length), bool)
    first[b[begins_group]] = True
    return Placement(shape=shape, first=first, **fields)


def _within(begins: Bool[np.ndarray, " n"], total: Int[np.ndarray, " n"], own: np.ndarray | int) -> np.ndarray:
    """Return running totals that restart at each beginning."""
    return total - (total - own)[begins][np.cumsum(begins) - 1]


def _rows(sizes: Int[np.ndarray, " S"], shape: BatchShape) -> tuple[np.ndarray, np.ndarray]:
    """Return the turn and the row of each sequence group: one per row, or largest first into the first row with enough slots."""
    if shape.kind == "none":
        return np.arange(len(sizes)), np.arange(len(sizes))
    turn, row_of, free = np.zeros(len(sizes), int), np.zeros(len(sizes), int), np.full(len(sizes), shape.slots)
    for n, u in enumerate(np.argsort(-sizes, kind="stable")):
        turn[u], row_of[u] = n, np.argmax(free >= sizes[u])
        free[row_of[u]] -= sizes[u]
    return turn, row_of


def _sequence_groups(
    prompt_length: Each, length: Each, group: Each, used: np.ndarray, shape: BatchShape, tree: Branching
) -> tuple[Each, Each, Int[np.ndarray, " S"]]:
    """Return each sequence's sequence group, -1 if unused, the tokens that it shares there, and the tokens per sequence group."""
    group_of, shared, sizes, last = np.full(len(length), -1), np.zeros(len(length), int), [], None
    common = 0
    for b in tree.order.tolist():
        # With the last one that was placed: no more than with any sequence between the two.
        common = min(common, int(tree.shared[b]))
        if not used[b]:
            continue
        more = int(length[b]) - common
        if shape.kind == "shared_prefix" and group[b] == last and sizes[-1] + more <= shape.slots:
            sizes[-1] += more
            shared[b] = common
        else:
            sizes.append(int(prompt_length[b] + length[b]))
            last = group[b]
        group_of[b], common = len(sizes) - 1, int(length[b])
    return group_of, shared, np.array(sizes, int)

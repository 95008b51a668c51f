"""Batches: graded groups to the fixed-shape batches that updates consume, and a batch's scores back to the rollouts."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.types import (
    COLUMNS,
    Batch,
    Credit,
    Experience,
    Groups,
    OwnColumn,
    Prompts,
    Rollouts,
    Scores,
    number_rows,
    select_groups,
)
from jaxrl_llm.update.packing import BatchShape, Placement, branching, place_sequences

Completion = Float[np.ndarray, "B C"]


def supervised(
    prompts: Prompts, tokens: Int[np.ndarray, "B C"], length: Int[np.ndarray, " B"], temperature: float = 1.0
) -> Experience:
    """Return completions for supervised training: every token is in the loss, none was sampled.

    Args:
        prompts: each with equally many of the rows, usually one.
        tokens: of the completions.
        length: tokens per completion.
        temperature: for scoring.
    """
    prompt, sample = number_rows(np.full(len(prompts.length), len(length) // len(prompts.length)))
    rows, zeros = len(length), np.zeros(tokens.shape, np.float32)
    rollouts = Rollouts(
        prompts=prompts,
        prompt=prompt,
        sample=sample,
        tokens=tokens,
        length=length,
        sampled=np.arange(tokens.shape[1]) < length[:, None],
        behavior_logprobs=zeros,
        entropy=zeros,
        temperature=np.full(rows, temperature, np.float32),
        version=np.zeros(tokens.shape, np.int32),
        finish=np.zeros(rows, np.int32),
    )
    return unscored(ungraded(rollouts))


def ungraded(rollouts: Rollouts) -> Groups:
    """Return ungraded groups, all of them kept."""
    rows, none = len(rollouts.length), np.zeros(len(rollouts.prompts.length), np.int32)
    return Groups(
        rollouts=rollouts,
        reward=np.zeros(rows, np.float32),
        components=np.zeros((rows, 1), np.float32),
        failure=none,
        failed_by=none - 1,
        vote=np.zeros(rows, np.int32),
        keep=np.ones(rows, bool),
    )


def unscored(groups: Groups) -> Experience:
    """Return experience with advantages of 0, for batches that are only scored."""
    return Experience(groups, Scores(), Credit(np.zeros(groups.rollouts.tokens.shape, np.float32)))


def token_weights(
    loss_mask: Bool[np.ndarray, "B C"], group: Int[np.ndarray, " B"], aggregation: str, length: int
) -> Completion:
    """Return the weights that turn sums over tokens into means over the whole minibatch.

    Only tokens in the mask count, and only sequences and groups that have one. For an empty mask all weights are 0.

    Args:
        loss_mask: tokens in the loss.
        group: of each row.
        aggregation: token: 1 / N tokens. sequence: 1 / (tokens of its sequence * sequences). constant: 1 / (length * sequences).
            sequence_sum: 1 / sequences. token_sum: 1. prompt: 1 / (tokens of its group * groups).
        length: for the aggregation `constant`.
    """
    each = np.count_nonzero(loss_mask, axis=1)
    sequences = max(np.count_nonzero(each), 1)
    # A filler row's group is -1, and it has no token in the mask.
    group = np.maximum(group, 0)
    of_group = np.bincount(group, weights=each)
    divisor = {
        "token": max(each.sum(), 1),
        "sequence": np.maximum(each, 1) * sequences,
        "constant": length * sequences,
        "sequence_sum": sequences,
        "token_sum": 1,
        "prompt": np.maximum(of_group[group], 1) * max(np.count_nonzero(of_group), 1),
    }[aggregation]
    of_row = np.broadcast_to(1 / divisor, each.shape).astype(np.float32)
    return np.where(loss_mask, of_row[:, None], np.float32(0))


def fill_batch(
    experience: Experience,
    shape: BatchShape,
    pad: int,
    aggregation: str = "token",
    length: int = 1,
    own: Sequence[OwnColumn] = (),
) -> tuple[Batch, Placement]:
    """Return the batch of these groups, and the placement of their rows. Rows without a token in the loss are left out.

    Args:
        experience: graded groups, scores and credit.
        shape: of the batch.
        pad: the pad token.
        aggregation: average of the loss, as in `token_weights`.
        length: for the aggregation `constant`.
        own: columns that the loss defines.
    """
    rollouts, prompts, mask = experience.groups.rollouts, experience.groups.rollouts.prompts, experience.loss_mask
    prompt, tree = rollouts.prompt, None
    if rollouts.trunk is not None:
        tree = branching(prompt, rollouts.trunk_rows, rollouts.fork)
    where = place_sequences(prompts.length[prompt], rollouts.length, prompt, mask.any(axis=1), shape, tree)
    runs = [(b, row, slice(start, start + n), shared) for b, row, start, n, shared in _runs(where, rollouts.length)]

    def lay(values: np.ndarray, dtype: type, fill: float) -> np.ndarray:
        full = (shape.rows, shape.slots, *values.shape[2:])
        # Zeros cost nothing until they are written to.
        out = np.full(full, fill, dtype) if fill else np.zeros(full, dtype)
        for b, row, at, shared in runs:
            out[row, at] = values[b, shared : shared + at.stop - at.start]
        return out

    given = {
        **vars(experience.scores),
        **vars(experience.credit),
        "behavior_logprobs": rollouts.behavior_logprobs,
        "kept_tokens": rollouts.kept_tokens,
        "control_state": rollouts.control_state,
        "loss_mask": mask,
        "weight": token_weights(mask, prompt, aggregation, length) * _of_rows(experience.groups.loss_weight),
        "temperature": np.broadcast_to(rollouts.temperature[:, None], mask.shape),
    }
    there = [c for c in COLUMNS if c.batch and given.get(c.name) is not None]
    batch = Batch(
        **_laid_out(rollouts, where, runs, pad),
        **{c.name: lay(given[c.name], c.dtype, c.fill) for c in there},
        own={c.name: lay(experience.scores.own[c.name], c.dtype, c.fill) for c in own},
    )  # fmt: skip
    return batch, where


def _of_rows(weight: Float[np.ndarray, " B"] | None) -> np.ndarray:
    """Return the factor of each row's tokens [B 1]; 1 of all if there are none."""
    return np.ones((1, 1), np.float32) if weight is None else weight[:, None]


def _laid_out(
    rollouts: Rollouts, where: Placement, runs: list[tuple[int, int, slice, int]], pad: int
) -> dict[str, Int[np.ndarray, "R T"]]:
    """Return the columns of a batch that say where tokens lie, by name; and the tokens.

    Args:
        rollouts: NumPy.
        where: the placement of their rows.
        runs: rollout row, batch row, slots and number of shared tokens of each completion.
        pad: the pad token.
    """
    shape, prompts, prompt = where.shape, rollouts.prompts, rollouts.prompt
    prompt_length = prompts.length[prompt]
    full, slot = (shape.rows, shape.slots), np.arange(shape.slots, dtype=np.int32)
    tokens, position = np.full(full, pad, np.int32), np.zeros(full, np.int32)
    until, before = np.tile(slot, (shape.rows, 1)), np.tile(slot, (shape.rows, 1))
    segment, group = np.zeros(full, np.int32), np.zeros(full, np.int32)
    for b in np.flatnonzero(where.first):
        row, s, n = where.row[b], where.prompt[b], prompt_length[b]
        at = slice(s, s + n)
        tokens[row, at], position[row, at], until[row, at] = prompts.tokens[prompt[b], :n], np.arange(n), where.end[b]
        before[row, at], group[row, at] = np.maximum(slot[at] - 1, s), where.group[b]
    path = slot[:0]
    for b, row, at, shared in runs:
        begin, n = prompt_length[b] + shared, at.stop - at.start
        tokens[row, at], position[row, at] = rollouts.tokens[b, shared : shared + n], slot[begin : begin + n]
        until[row, at], segment[row, at], group[row, at] = at.stop, where.segment[b], where.group[b]
        # Slots of the completion's tokens, of which the shared ones lie behind those before it.
        path = path[:shared]
        until[row, path] = at.stop
        before[row, at.start] = path[-1] if shared else where.prompt[b] + prompt_length[b] - 1
        before[row, at.start + 1 : at.stop] = slot[at.start : at.stop - 1]
        path = np.concatenate([path, slot[at]])
    return {
        "tokens": tokens,
        "position": position,
        "until": until,
        "before": before,
        "segment": segment,
        "group": group,
    }


def abstract_batch(
    shape: BatchShape, uses: Sequence[str], max_kept_tokens: int, own: Sequence[OwnColumn], layout: Layout
) -> Batch:
    """Return shapes, dtypes and shardings of the batches of `fill_batch`.

    Args:
        shape: of the batch.
        uses: features of the run that add columns, as in `COLUMNS`.
        max_kept_tokens: K of the column `kept_tokens`.
        own: columns that the loss defines.
        layout: the mesh.
    """

    def array(dtype: type, *more: int) -> jax.ShapeDtypeStruct:
        sharding = layout.sharding(("rows", *(None for _ in (shape.slots, *more))))
        return jax.ShapeDtypeStruct((shape.rows, shape.slots, *more), jnp.dtype(dtype), sharding=sharding)

    there = [c for c in COLUMNS if c.batch and (not c.when or c.when in uses)]
    columns = {c.name: array(c.dtype, *(max_kept_tokens for _ in c.dims)) for c in there}
    return Batch(**columns, own={c.name: array(c.dtype) for c in own})


def spread_rows(batch: Batch, num_micro_batches: int, shards: int) -> Batch:
    """Return a batch of one micro-batch as one of several: empty rows are added, and rows are ordered as `BatchShape` says, so
    that the first micro-batches are full.

    Args:
        batch: NumPy.
        num_micro_batches: M.
        shards: row shards of the mesh; the rows become a multiple of M * shards.
    """
    rows, slots = batch.tokens.shape
    more = -rows % (num_micro_batches * shards)
    empty = {c.name: c.fill for c in COLUMNS} | dict.fromkeys(("until", "before"), np.arange(slots))

    def spread(x: np.ndarray, fill: float | np.ndarray) -> np.ndarray:
        added = np.broadcast_to(np.asarray(fill, x.dtype), (more, *x.shape[1:]))
        whole = np.concatenate([x, added])
        return whole.reshape(num_micro_batches, -1, *x.shape[1:]).swapaxes(0, 1).reshape(whole.shape)

    columns = {name: spread(x, empty[name]) for name, x in vars(batch).items() if name != "own" and x is not None}
    return batch.replace(**columns, own={name: spread(x, 0) for name, x in batch.own.items()})


def to_completions(scores: Float[np.ndarray, "R T"], where: Placement, rollouts: Rollouts) -> Completion:
    """Return a batch's scores in the layout of the completions [B C], 0 for tokens that are not in the batch."""
    out = np.zeros(rollouts.tokens.shape, np.float32)
    for b, row, start, n, shared in _runs(where, rollouts.length):
        out[b, shared : shared + n] = scores[row, start : start + n]
    return out


def _runs(where: Placement, length: np.ndarray) -> list[list[int]]:
    """Return (rollout row, batch row, first slot, own tokens, shared tokens) of every completion in the batch, by slot."""
    # Copying runs of tokens takes a quarter of the time of indexing each (benchmarks/host.py).
    b = np.flatnonzero(where.row >= 0)
    b = b[np.lexsort((where.start[b], where.row[b]))]
    return np.stack([b, where.row[b], where.start[b], length[b] - where.shared[b], where.shared[b]], axis=1).tolist()


def minibatches(experience: Experience, num: int, rng: np.random.Generator) -> Iterator[Experience]:
    """Yield one epoch: whole groups, shuffled, in `num` minibatches of equally many rows; if groups differ in size, of up to one
    group more. A single minibatch keeps its order."""
    size = experience.groups.rollouts.size
    order = rng.permutation(len(size)) if num > 1 else np.arange(len(size))
    ends = np.cumsum(size[order])
    # A minibatch takes groups until it has its share of all rows.
    cuts = 1 + np.searchsorted(ends * num, ends[-1] * np.arange(1, num))
    for index in np.split(order, cuts):
        yield select_groups(experience, index)

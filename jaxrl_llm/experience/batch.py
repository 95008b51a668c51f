"""From sequences to the fixed-shape batches that updates consume, and from a batch's scores back to the sequences."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxrl_llm.experience.packing import Places, Shape, place
from jaxrl_llm.types import Batch, Rollouts

Completion = Float[np.ndarray, "B C"]


class Sequences(NamedTuple):
    """Prompts and what follows them, with all that the loss reads of the completions' tokens. Prompts are right-padded."""

    prompt: Int[np.ndarray, "B S"]
    prompt_length: Int[np.ndarray, " B"]
    tokens: Int[np.ndarray, "B C"]
    length: Int[np.ndarray, " B"]
    group: Int[np.ndarray, " B"]
    """Ascending."""
    learn: Bool[np.ndarray, "B C"]
    """What the loss reads."""
    temperature: Float[np.ndarray, " B"]
    behavior_logprobs: Completion
    advantage: Completion
    reference_logprobs: Completion | None = None
    proximal_logprobs: Completion | None = None
    values: Completion | None = None
    returns: Completion | None = None
    support: Int[np.ndarray, "B C K"] | None = None
    barred: Bool[np.ndarray, "B C"] | None = None


PER_TOKEN = (
    "behavior_logprobs", "advantage", "reference_logprobs", "proximal_logprobs", "values", "returns", "support", "barred",
)  # fmt: skip
# What a slot holds where no completion lies; 0 otherwise.
EMPTY = {"support": -1}


def sequences_of(rollouts: Rollouts, counts: Bool[np.ndarray, " P"]) -> Sequences:
    """Of groups that count only tokens that the policy drew are learnt from: the prompt never, the end token always.
    Advantages are still 0."""
    prompts, samples = rollouts.prompts, len(rollouts.length) // len(counts)
    return Sequences(
        prompt=np.repeat(prompts.tokens, samples, axis=0),
        prompt_length=np.repeat(prompts.length, samples),
        tokens=rollouts.tokens,
        length=rollouts.length,
        group=np.repeat(np.arange(len(counts), dtype=np.int32), samples),
        learn=rollouts.sampled & np.repeat(counts, samples)[:, None],
        temperature=rollouts.temperature,
        behavior_logprobs=rollouts.behavior_logprobs,
        advantage=np.zeros(rollouts.tokens.shape, np.float32),
        support=rollouts.support,
        barred=rollouts.barred,
    )


def supervised(
    prompt: Int[np.ndarray, "B S"],
    prompt_length: Int[np.ndarray, " B"],
    tokens: Int[np.ndarray, "B C"],
    length: Int[np.ndarray, " B"],
    temperature: float = 1.0,
) -> Sequences:
    """Every completion token is learnt from; nothing was sampled."""
    zeros = np.zeros(tokens.shape, np.float32)
    each = np.full(len(length), temperature, np.float32)
    learn = np.arange(tokens.shape[1]) < length[:, None]
    group = np.arange(len(length), dtype=np.int32)
    return Sequences(prompt, prompt_length, tokens, length, group, learn, each, zeros, zeros)


def token_weights(
    learn: Bool[np.ndarray, "B C"], group: Int[np.ndarray, " B"], aggregation: str, length: int
) -> Completion:
    """Weights by which sums over tokens become means, counted over all that is given.

    token: 1 / N tokens. sequence: 1 / (tokens of its sequence * sequences). constant: 1 / (length * sequences).
    sequence_sum: 1 / sequences. token_sum: 1. prompt: 1 / (tokens of its group * groups).
    Only tokens in `learn` count, and only sequences and groups that have one. With none at all every weight is 0.
    """
    mask = learn.astype(np.float64)
    each = mask.sum(axis=1, keepdims=True)
    sequences = max(np.count_nonzero(each), 1)
    of_group = np.bincount(group, weights=each[:, 0])
    divisor = {
        "token": max(mask.sum(), 1),
        "sequence": np.maximum(each, 1) * sequences,
        "constant": length * sequences,
        "sequence_sum": sequences,
        "token_sum": 1,
        "prompt": np.maximum(of_group[group], 1)[:, None] * max(np.count_nonzero(of_group), 1),
    }[aggregation]
    return (mask / divisor).astype(np.float32)


def make_batch(
    sequences: Sequences, shape: Shape, pad: int, aggregation: str = "token", length: int = 1
) -> tuple[Batch, Places]:
    """The batch of these sequences and where each of them lies. What is not learnt from may be left out."""
    q = sequences
    where = place(q.prompt_length, q.length, q.group, q.learn.any(axis=1), shape)
    full = (shape.rows, shape.slots)
    slot = np.arange(shape.slots, dtype=np.int32)
    tokens, position = np.full(full, pad, np.int32), np.zeros(full, np.int32)
    until, before = np.tile(slot, (shape.rows, 1)), np.tile(slot, (shape.rows, 1))
    segment, group = np.zeros(full, np.int32), np.zeros(full, np.int32)
    for b in np.flatnonzero(where.first):
        row, s, n = where.row[b], where.prompt[b], q.prompt_length[b]
        at = slice(s, s + n)
        tokens[row, at], position[row, at], until[row, at] = q.prompt[b, :n], np.arange(n), where.end[b]
        before[row, at], group[row, at] = np.maximum(slot[at] - 1, s), where.group[b]
    b, c, row, at = _slots(where, q.length, q.tokens.shape[1])
    tokens[row, at], position[row, at], until[row, at] = (
        q.tokens[b, c],
        q.prompt_length[b] + c,
        where.start[b] + q.length[b],
    )
    before[row, at] = np.where(c > 0, at - 1, where.prompt[b] + q.prompt_length[b] - 1)
    segment[row, at], group[row, at] = where.segment[b], where.group[b]

    def lay(values: np.ndarray, fill: int = 0) -> np.ndarray:
        out = np.full((*full, *values.shape[2:]), fill, values.dtype)
        out[row, at] = values[b, c]
        return out

    given = {name: value for name in PER_TOKEN if (value := getattr(q, name)) is not None}
    temperature = np.ones(full, np.float32)
    temperature[row, at] = q.temperature[b]
    batch = Batch(
        tokens=tokens,
        position=position,
        until=until,
        before=before,
        segment=segment,
        group=group,
        loss_mask=lay(q.learn),
        weight=lay(token_weights(q.learn, q.group, aggregation, length)),
        temperature=temperature,
        **{name: lay(value, EMPTY.get(name, 0)) for name, value in given.items()},
    )
    return batch, where


def of_sequences(scores: Float[np.ndarray, "R T"], where: Places, sequences: Sequences) -> Completion:
    """A batch's scores of the completions' tokens; 0 where none lies."""
    out = np.zeros(sequences.tokens.shape, np.float32)
    b, c, row, at = _slots(where, sequences.length, out.shape[1])
    out[b, c] = scores[row, at]
    return out


def _slots(where: Places, length: np.ndarray, completion_slots: int) -> tuple[np.ndarray, ...]:
    """(sequence, place in its completion, row, slot) of every completion token that lies somewhere."""
    b, c = np.nonzero((np.arange(completion_slots) < length[:, None]) & (where.row >= 0)[:, None])
    return b, c, where.row[b], where.start[b] + c


def minibatches(sequences: Sequences, num: int, rng: np.random.Generator) -> Iterator[Sequences]:
    """One epoch: whole groups in a new order, in `num` equal parts. A single part keeps its order."""
    groups = int(sequences.group[-1]) + 1
    order = rng.permutation(groups) if num > 1 else np.arange(groups)
    for part in np.split(order, num):
        yield of_groups(sequences, part)


def of_groups(sequences: Sequences, index: Int[np.ndarray, " n"]) -> Sequences:
    """Those of the groups at `index`, in its order; a group's number is its new place."""
    samples = len(sequences.group) // (int(sequences.group[-1]) + 1)
    rows = (index[:, None] * samples + np.arange(samples)).reshape(-1)
    return jax.tree.map(lambda x: x[rows], sequences)._replace(
        group=np.repeat(np.arange(len(index), dtype=np.int32), samples)
    )

"""From graded groups to the fixed-shape batches that updates consume, and from a batch's scores back to the rollouts."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.types import COLUMNS, Batch, Credit, Experience, Groups, OwnColumn, Prompts, Rollouts, Scores
from jaxrl_llm.update.packing import Places, Shape, place

Completion = Float[np.ndarray, "B C"]


def supervised(
    prompts: Prompts, tokens: Int[np.ndarray, "B C"], length: Int[np.ndarray, " B"], temperature: float = 1.0
) -> Experience:
    """Completions of which every token is learned from; nothing was sampled."""
    rows, zeros = len(length), np.zeros(tokens.shape, np.float32)
    rollouts = Rollouts(
        prompts=prompts,
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
    """Groups that nobody graded, all of them kept."""
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
    """Groups with advantages of 0: what a batch that is only scored is made from."""
    return Experience(groups, Scores(), Credit(np.zeros(groups.rollouts.tokens.shape, np.float32)))


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
    experience: Experience,
    shape: Shape,
    pad: int,
    aggregation: str = "token",
    length: int = 1,
    own: Sequence[OwnColumn] = (),
) -> tuple[Batch, Places]:
    """The batch of these groups, and where each of their rows lies. Rows without a token to learn from are left out.

    Args:
        pad: the pad token.
        aggregation, length: what the loss is a mean over: `token_weights`.
        own: the loss's own columns.
    """
    rollouts, prompts, mask = experience.groups.rollouts, experience.groups.rollouts.prompts, experience.loss_mask
    prompt = group_of_rows(rollouts)
    prompt_length = prompts.length[prompt]
    where = place(prompt_length, rollouts.length, prompt, mask.any(axis=1), shape)
    full = (shape.rows, shape.slots)
    slot = np.arange(shape.slots, dtype=np.int32)
    tokens, position = np.full(full, pad, np.int32), np.zeros(full, np.int32)
    until, before = np.tile(slot, (shape.rows, 1)), np.tile(slot, (shape.rows, 1))
    segment, group = np.zeros(full, np.int32), np.zeros(full, np.int32)
    for b in np.flatnonzero(where.first):
        row, s, n = where.row[b], where.prompt[b], prompt_length[b]
        at = slice(s, s + n)
        tokens[row, at], position[row, at], until[row, at] = prompts.tokens[prompt[b], :n], np.arange(n), where.end[b]
        before[row, at], group[row, at] = np.maximum(slot[at] - 1, s), where.group[b]
    b, c, row, at = _slots(where, rollouts.length, rollouts.tokens.shape[1])
    tokens[row, at], position[row, at] = rollouts.tokens[b, c], prompt_length[b] + c
    until[row, at] = where.start[b] + rollouts.length[b]
    before[row, at] = np.where(c > 0, at - 1, where.prompt[b] + prompt_length[b] - 1)
    segment[row, at], group[row, at] = where.segment[b], where.group[b]

    def lay(values: np.ndarray, dtype: type, fill: float) -> np.ndarray:
        out = np.full((*full, *values.shape[2:]), fill, dtype)
        out[row, at] = values[b, c]
        return out

    given = {
        **vars(experience.scores),
        **vars(experience.credit),
        "behavior_logprobs": rollouts.behavior_logprobs,
        "kept_tokens": rollouts.kept_tokens,
        "eos_masked": rollouts.eos_masked,
        "loss_mask": mask,
        "weight": token_weights(mask, prompt, aggregation, length),
        "temperature": np.broadcast_to(rollouts.temperature[:, None], mask.shape),
    }
    there = [c for c in COLUMNS if c.batch and given.get(c.name) is not None]
    batch = Batch(
        tokens=tokens, position=position, until=until, before=before, segment=segment, group=group,
        **{c.name: lay(given[c.name], c.dtype, c.fill) for c in there},
        own={c.name: lay(experience.scores.own[c.name], c.dtype, c.fill) for c in own},
    )  # fmt: skip
    return batch, where


def abstract_batch(
    shape: Shape, uses: Sequence[str], max_kept_tokens: int, own: Sequence[OwnColumn], layout: Layout
) -> Batch:
    """Shapes, dtypes and shardings of the batches that `make_batch` gives; `uses`: of the run, as in `COLUMNS`."""

    def array(dtype: type, *more: int) -> jax.ShapeDtypeStruct:
        sharding = layout.sharding(("rows", *(None for _ in (shape.slots, *more))))
        return jax.ShapeDtypeStruct((shape.rows, shape.slots, *more), jnp.dtype(dtype), sharding=sharding)

    there = [c for c in COLUMNS if c.batch and (not c.when or c.when in uses)]
    columns = {c.name: array(c.dtype, *(max_kept_tokens for _ in c.dims)) for c in there}
    return Batch(**columns, own={c.name: array(c.dtype) for c in own})


def to_rows(scores: Float[np.ndarray, "R T"], where: Places, rollouts: Rollouts) -> Completion:
    """A batch's scores of the completions' tokens; 0 where none lies."""
    out = np.zeros(rollouts.tokens.shape, np.float32)
    b, c, row, at = _slots(where, rollouts.length, out.shape[1])
    out[b, c] = scores[row, at]
    return out


def _slots(where: Places, length: np.ndarray, completion_slots: int) -> tuple[np.ndarray, ...]:
    """(row of the rollouts, place in its completion, row, slot) of every completion token that lies somewhere."""
    b, c = np.nonzero((np.arange(completion_slots) < length[:, None]) & (where.row >= 0)[:, None])
    return b, c, where.row[b], where.start[b] + c


def minibatches(experience: Experience, num: int, rng: np.random.Generator) -> Iterator[Experience]:
    """One epoch: whole groups in a new order, in `num` equal parts. A single part keeps its order."""
    groups = len(experience.groups.failure)
    order = rng.permutation(groups) if num > 1 else np.arange(groups)
    for part in np.split(order, num):
        yield of_groups(experience, part)


def of_groups(experience: Experience, index: Int[np.ndarray, " n"]) -> Experience:
    """That of the groups at `index`, in its order."""
    groups = len(experience.groups.failure)

    def take(x: np.ndarray) -> np.ndarray:
        return x.reshape(groups, -1, *x.shape[1:])[index].reshape(-1, *x.shape[1:])

    return jax.tree.map(take, experience)


def group_of_rows(rollouts: Rollouts) -> Int[np.ndarray, " B"]:
    """The prompt that each row belongs to."""
    prompts = len(rollouts.prompts.length)
    return np.repeat(np.arange(prompts, dtype=np.int32), len(rollouts.length) // prompts)

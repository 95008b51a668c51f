"""From experience to the fixed-shape batches that updates consume: one sequence a row, the prompt first, padded at the end."""

from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxrl_llm.types import Batch, Experience


def rows_of(
    prompt: Int[np.ndarray, "R S"],
    prompt_length: Int[np.ndarray, " R"],
    completion: Int[np.ndarray, "R C"],
    length: Int[np.ndarray, " R"],
    pad: int,
    temperature: Float[np.ndarray, " R"] | float = 1.0,
) -> tuple[Batch, Int[np.ndarray, "R C"]]:
    """Tokens joined without a gap, T = S + C slots, and the slot where each completion token went.

    The loss mask holds the completion, behaviour log-probs and advantages are 0: what a supervised batch needs.
    """
    rows, c = completion.shape
    slots = prompt.shape[1] + c
    into = prompt_length[:, None] + np.arange(c)
    tokens = np.full((rows, slots), pad, np.int32)
    tokens[:, : prompt.shape[1]] = prompt
    row = np.arange(rows)[:, None]
    tokens[row, into] = completion
    end = (prompt_length + length)[:, None]
    slot = np.arange(slots)
    tokens = np.where(slot < end, tokens, pad).astype(np.int32)
    zeros = np.zeros((rows, slots), np.float32)
    batch = Batch(
        tokens=tokens,
        segment=(slot < end).astype(np.int32),
        position=np.where(slot < end, slot, 0).astype(np.int32),
        loss_mask=(slot >= prompt_length[:, None]) & (slot < end),
        behavior_logprobs=zeros,
        advantage=zeros,
        temperature=np.broadcast_to(np.asarray(temperature, np.float32).reshape(-1, 1), (rows, slots)).copy(),
    )
    return batch, into


def make_batch(experience: Experience, counts: Bool[np.ndarray, " P"], pad: int) -> Batch:
    """R = B rows. Only tokens that the policy drew, in groups that count, are in the loss mask: the prompt never, the end
    token always."""
    rollouts = experience.rollouts
    samples = len(rollouts.length) // len(counts)
    prompts = rollouts.prompts
    batch, into = rows_of(
        np.repeat(prompts.tokens, samples, axis=0),
        np.repeat(prompts.length, samples),
        rollouts.tokens,
        rollouts.length,
        pad,
        rollouts.temperature,
    )
    row = np.arange(len(into))[:, None]

    def lay(values: np.ndarray, fill: int = 0) -> np.ndarray:
        out = np.full((*batch.tokens.shape, *values.shape[2:]), fill, values.dtype)
        out[row, into] = values
        return out

    learn = lay(rollouts.sampled & np.repeat(counts, samples)[:, None])
    return batch.replace(
        loss_mask=learn,
        behavior_logprobs=lay(rollouts.behavior_logprobs),
        advantage=np.where(learn, experience.advantage[:, None], 0).astype(np.float32),
        support=None if rollouts.support is None else lay(rollouts.support, -1),
        barred=None if rollouts.barred is None else lay(rollouts.barred),
    )


def minibatches(batch: Batch, samples: int, num: int, rng: np.random.Generator) -> Iterator[Batch]:
    """One epoch: whole groups in a new order, in `num` equal parts. A single part keeps its order."""
    groups = len(batch.tokens) // samples
    order = rng.permutation(groups) if num > 1 else np.arange(groups)
    for part in np.split(order, num):
        rows = (part[:, None] * samples + np.arange(samples)).reshape(-1)
        yield jax.tree.map(lambda x, rows=rows: x[rows], batch)

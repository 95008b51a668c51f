"""The compiled decode loop: one token per row and step, on the device, against statically shaped KV caches.

Dimensions: U sequence groups in the active batch, each one prompt with F rows that share its prompt KV cache; B = U * F rows,
ordered by sequence group; n steps. Sampled tokens, their log-probs under the sampling distribution, and its entropy are recorded
per step."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxrl_llm.model.cache import PromptCache, SuffixCache
from jaxrl_llm.model.transformer import DecodePosition, decode
from jaxrl_llm.rollout.sample import Controls, Decoding, row_keys, sample_tokens
from jaxrl_llm.types import COLUMNS, ArrayLike, Column, PyTree


class SequenceGroups(flax.struct.PyTreeNode):
    """The active batch without its KV caches: small arrays that the host knows between chunks."""

    uid: Int[ArrayLike, " U"]
    first: Int[ArrayLike, " U"]
    """Sample number of the group's first row."""
    length: Int[ArrayLike, " U"]
    """Prompt tokens excluding the last one, which the first step reads."""
    age: Int[ArrayLike, " U"]
    """Decode steps completed: the completion slot that the next token fills."""
    limit: Int[ArrayLike, " U"]
    """Maximum completion tokens per row."""
    controls: Controls
    """Sampling parameters per row, [U F]."""
    last: Int[ArrayLike, "U F"]
    """The token that the next step reads."""
    done: Bool[ArrayLike, "U F"]


class DecodedChunk(flax.struct.PyTreeNode):
    """Columns of `Rollouts` recorded in one chunk, one line per step. Lines beyond the steps that ran are undefined."""

    tokens: Int[ArrayLike, "n B"]
    sampled: Bool[ArrayLike, "n B"]
    """True where the row was still active."""
    behavior_logprobs: Float[ArrayLike, "n B"]
    entropy: Float[ArrayLike, "n B"]
    raw_logprobs: Float[ArrayLike, "n B"] | None = None
    kept_tokens: Int[ArrayLike, "n B K"] | None = None
    overflow: Bool[ArrayLike, "n B"] | None = None
    """True where more than K tokens qualified."""


class ChunkResult(flax.struct.PyTreeNode):
    """State of the rows after a chunk, and what it recorded. Replicated on every device."""

    steps: Int[ArrayLike, ""]
    last: Int[ArrayLike, "U F"]
    done: Bool[ArrayLike, "U F"]
    chunk: DecodedChunk


class DecodeState(flax.struct.PyTreeNode):
    """Carry of the decode loop."""

    steps: Int[Array, ""]
    any_active: Bool[Array, ""]
    """True if some row was unfinished at the last check."""
    last: Int[Array, " B"]
    done: Bool[Array, " B"]
    suffix: SuffixCache
    chunk: DecodedChunk


DecodeChunk = Callable[
    [PyTree, SuffixCache, PromptCache, SequenceGroups, Array, Array, Array], tuple[SuffixCache, ChunkResult]
]


def step(
    params: PyTree,
    keys: Key[Array, " B"],
    groups: SequenceGroups,
    prompt: PromptCache,
    count: Int[Array, ""],
    state: DecodeState,
    decoding: Decoding,
) -> DecodeState:
    """Decode one token for every row. Finished rows are computed as well, and their results ignored.

    Args:
        params: parameters of the policy, one entry per layer.
        keys: one per row (`row_keys`).
        groups: the active batch at the start of the chunk.
        prompt: KV cache of each sequence group's prompt.
        count: keys written to the rows' ring buffers before the chunk.
        state: carry of the loop.
        decoding: static settings.

    Returns:
        The carry after the step.
    """
    rows_per_group = state.last.shape[0] // groups.age.shape[0]
    age = groups.age + state.steps
    position = DecodePosition(count=count + state.steps, length=groups.length, age=age)
    raw, suffix = decode(params, state.last, position, prompt, state.suffix, decoding.model, decoding.layout)
    of_rows = lambda x: jnp.repeat(x, rows_per_group)  # noqa: E731
    with jax.named_scope("draw"):
        controls = jax.tree.map(lambda x: x.reshape(-1), groups.controls)
        sampled = sample_tokens(keys, of_rows(age), raw, controls, state.any_active, decoding)
    active = ~state.done
    line = DecodedChunk(
        sampled.token, active, sampled.logprob, sampled.entropy, sampled.raw_logprob, sampled.kept_tokens, sampled.overflow
    )  # fmt: skip
    return DecodeState(
        steps=state.steps + 1,
        any_active=state.any_active,
        last=jnp.where(active, sampled.token, decoding.vocab.pad),
        done=state.done | decoding.vocab.ends(sampled.token) | of_rows(age + 1 >= groups.limit),
        suffix=suffix,
        chunk=jax.tree.map(lambda x, new: x.at[state.steps].set(new), state.chunk, line),
    )


def make_decode_chunk(decoding: Decoding) -> DecodeChunk:
    """Return `decode_chunk(params, suffix, prompt, groups, key, count, steps) -> (suffix, ChunkResult)`; `suffix` is donated.

    It runs at most `steps` <= n steps, a multiple of `decoding.interval`, and stops early once all rows have finished. `count` as
    in `model.cache`. A row's tokens depend only on the weights, its prompt, `key` (key data), its uid and its sample number.
    """

    def decode_chunk(params, suffix, prompt, groups, key, count, steps):
        keys = row_keys(jax.random.wrap_key_data(key), groups.uid, groups.first, groups.last.shape[1])

        def one_step(state: DecodeState) -> DecodeState:
            return step(params, keys, groups, prompt, count, state, decoding)

        def one_interval(state: DecodeState) -> DecodeState:
            state = jax.lax.fori_loop(0, decoding.interval, lambda _, state: one_step(state), state)
            return state.replace(any_active=~jnp.all(state.done))

        done = groups.done.reshape(-1)
        start = DecodeState(
            steps=jnp.zeros((), jnp.int32), any_active=~jnp.all(done), last=groups.last.reshape(-1), done=done,
            suffix=suffix, chunk=empty_chunk(decoding, len(done)),
        )  # fmt: skip
        end = jax.lax.while_loop(lambda state: (state.steps < steps) & state.any_active, one_interval, start)
        last, done = (x.reshape(groups.last.shape) for x in (end.last, end.done))
        return end.suffix, ChunkResult(end.steps, last, done, end.chunk)

    return decode_chunk


def empty_chunk(decoding: Decoding, rows: int) -> DecodedChunk:
    """Return a zero-filled chunk of `decoding.steps` steps for `rows` rows."""

    def zeros(dtype: type, *more: int) -> Array:
        x = jnp.zeros((decoding.steps, rows, *more), dtype)
        return decoding.layout.constrain(x, None, "rows", *(None for _ in more))

    columns = {
        column.name: zeros(column.dtype, *(decoding.max_kept_tokens for _ in column.dims))
        for column in recorded_columns(decoding)
    }
    return DecodedChunk(**columns, overflow=zeros(bool) if decoding.max_kept_tokens else None)


def recorded_columns(decoding: Decoding) -> list[Column]:
    """Return the columns of `Rollouts` that the decode loop records."""
    uses = {"truncation": decoding.max_kept_tokens > 0, "raw_logprobs": decoding.raw_logprobs, "": True}
    fields = DecodedChunk.__dataclass_fields__
    return [column for column in COLUMNS if column.rollouts and column.name in fields and uses[column.when]]

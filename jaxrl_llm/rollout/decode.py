"""The decode loop: a compiled chunk of decode steps, one token per row and step, against static KV caches.

Dimensions: U sequence groups in the active batch, each one prompt with F rows that share its keys and values; B = U * F rows,
group by group; n steps. The sampled token, its log-probability under the distribution it was sampled from, and the entropy of that
distribution are recorded when they are computed, one line per step.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxrl_llm.model.cache import PromptCache, SuffixCache
from jaxrl_llm.model.transformer import DecodePosition, decode
from jaxrl_llm.rollout.sample import Controls, Decoding, row_keys, sample_token
from jaxrl_llm.types import COLUMNS, ArrayLike, Column, PyTree


class SequenceGroups(flax.struct.PyTreeNode):
    """The active batch without its caches: small arrays that the host sees between chunks."""

    uid: Int[ArrayLike, " U"]
    first: Int[ArrayLike, " U"]
    """Sample number of the group's first row."""
    length: Int[ArrayLike, " U"]
    """Prompt tokens without the last one, which the first step reads."""
    age: Int[ArrayLike, " U"]
    """Decode steps done: the completion slot that the next token fills."""
    limit: Int[ArrayLike, " U"]
    """Maximum number of completion tokens per row."""
    controls: Controls
    """One entry per group."""
    last: Int[ArrayLike, "U F"]
    """Token that the next step reads."""
    done: Bool[ArrayLike, "U F"]


class ChunkRecord(flax.struct.PyTreeNode):
    """Record of a chunk: columns of `Rollouts`, one line per step. Lines after the last step that ran are undefined."""

    tokens: Int[ArrayLike, "n B"]
    sampled: Bool[ArrayLike, "n B"]
    """The row was active."""
    behavior_logprobs: Float[ArrayLike, "n B"]
    entropy: Float[ArrayLike, "n B"]
    raw_logprobs: Float[ArrayLike, "n B"] | None = None
    kept_tokens: Int[ArrayLike, "n B K"] | None = None
    overflow: Bool[ArrayLike, "n B"] | None = None
    """More than K tokens would have been kept."""


class ChunkResult(flax.struct.PyTreeNode):
    """Result of a chunk: state of the rows, and the record. Replicated on every device."""

    steps: Int[ArrayLike, ""]
    last: Int[ArrayLike, "U F"]
    done: Bool[ArrayLike, "U F"]
    record: ChunkRecord


class DecodeState(flax.struct.PyTreeNode):
    """Carry of the loop."""

    steps: Int[Array, ""]
    live: Bool[Array, ""]
    """Some row was active at the last check."""
    last: Int[Array, " B"]
    done: Bool[Array, " B"]
    suffix: SuffixCache
    record: ChunkRecord


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
    """Decode one token per row. A finished row is computed as well, and its results are not recorded.

    Args:
        params: the policy's, one entry per layer.
        keys: one per row (`row_keys`).
        groups: the active batch at the beginning of the chunk.
        prompt: keys and values of each group's prompt.
        count: keys written to the rows' ring caches before the chunk.
        state: carry of the loop.
        decoding: what was fixed at compile time.

    Returns:
        The carry after one step.
    """
    rows = state.last.shape[0] // groups.age.shape[0]
    age = groups.age + state.steps
    place = DecodePosition(count=count + state.steps, length=groups.length, age=age)
    raw, suffix = decode(params, state.last, place, prompt, state.suffix, decoding.model, decoding.layout)
    per_row = lambda x: jnp.repeat(x, rows)  # noqa: E731
    with jax.named_scope("sample"):
        controls = jax.tree.map(per_row, groups.controls)
        sampled = sample_token(keys, per_row(age), raw, controls, state.live, decoding)
    active = ~state.done
    line = ChunkRecord(
        sampled.token, active, sampled.logprob, sampled.entropy, sampled.raw_logprob, sampled.kept_tokens, sampled.overflow
    )  # fmt: skip
    return DecodeState(
        steps=state.steps + 1,
        live=state.live,
        last=jnp.where(active, sampled.token, decoding.vocab.pad),
        done=state.done | decoding.vocab.ends(sampled.token) | per_row(age + 1 >= groups.limit),
        suffix=suffix,
        record=jax.tree.map(lambda x, new: x.at[state.steps].set(new), state.record, line),
    )


def make_decode_chunk(decoding: Decoding) -> DecodeChunk:
    """The program `decode_chunk(params, suffix, prompt, groups, key, count, steps) -> (suffix, ChunkResult)`; `suffix` is donated.

    It makes at most `steps` <= n steps, a multiple of `decoding.interval`; fewer if every row has finished. `count` as in
    `model.cache`. A row's tokens depend on the weights, its prompt, `key` (key data), its uid and its sample number alone.
    """

    def decode_chunk(params, suffix, prompt, groups, key, count, steps):
        rows = groups.last.shape[1]
        keys = row_keys(jax.random.wrap_key_data(key), groups.uid, groups.first, rows)

        def advance(state: DecodeState) -> DecodeState:
            return step(params, keys, groups, prompt, count, state, decoding)

        def interval(state: DecodeState) -> DecodeState:
            state = jax.lax.fori_loop(0, decoding.interval, lambda _, state: advance(state), state)
            return state.replace(live=~jnp.all(state.done))

        done = groups.done.reshape(-1)
        start = DecodeState(
            steps=jnp.zeros((), jnp.int32), live=~jnp.all(done), last=groups.last.reshape(-1), done=done, suffix=suffix,
            record=empty_record(decoding, len(done)),
        )  # fmt: skip
        end = jax.lax.while_loop(lambda state: (state.steps < steps) & state.live, interval, start)
        last, done = (x.reshape(groups.last.shape) for x in (end.last, end.done))
        return end.suffix, ChunkResult(end.steps, last, done, end.record)

    return decode_chunk


def empty_record(decoding: Decoding, rows: int) -> ChunkRecord:
    def lines(dtype: type, *more: int) -> Array:
        zeros = jnp.zeros((decoding.steps, rows, *more), dtype)
        return decoding.layout.constrain(zeros, None, "rows", *(None for _ in more))

    columns = {
        column.name: lines(column.dtype, *(decoding.max_kept_tokens for _ in column.dims))
        for column in recorded(decoding)
    }
    return ChunkRecord(**columns, overflow=lines(bool) if decoding.max_kept_tokens else None)


def recorded(decoding: Decoding) -> list[Column]:
    """Columns of `Rollouts` that the loop records."""
    uses = {"truncation": decoding.max_kept_tokens > 0, "raw_logprobs": decoding.raw_logprobs, "": True}
    fields = ChunkRecord.__dataclass_fields__
    return [column for column in COLUMNS if column.rollouts and column.name in fields and uses[column.when]]

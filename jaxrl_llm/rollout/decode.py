"""The compiled decode loop: one token per row and step, on the device, against statically shaped KV caches.

Dimensions: U sequence groups in the active batch, each one prompt with F rows that share its prompt KV cache; B = U * F rows,
ordered by sequence group; n steps. Sampled tokens, their log-probs under the sampling distribution, and its entropy are recorded
per step."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from jaxrl_llm.distribution.control_tables import ControlTables, allowed_tokens
from jaxrl_llm.model.cache import PromptCache, SuffixCache
from jaxrl_llm.model.transformer import DecodePosition, decode
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.rollout.control import ControlledToken, after_token, before_token
from jaxrl_llm.rollout.sample import Controls, Decoding, row_keys, sample_tokens
from jaxrl_llm.types import COLUMNS, ArrayLike, Column, PyTree


class SequenceGroups(flax.struct.PyTreeNode):
    """The active batch without its KV caches: small arrays that the host knows between chunks."""

    uid: Int[ArrayLike, " U"]
    age: Int[ArrayLike, "U F"]
    """Completion tokens of the row beside those of the prefix: decode steps, and known tokens that were read again."""
    sample: Int[ArrayLike, "U F"]
    """Sample number."""
    length: Int[ArrayLike, "U F"]
    """Tokens of the prefix that the row attends to, excluding the last one, which the first step reads."""
    begin: Int[ArrayLike, "U F"]
    """Completion tokens of the prefix: the row's next step fills completion slot `begin + age`."""
    limit: Int[ArrayLike, "U F"]
    """Maximum completion tokens."""
    state: Int[ArrayLike, "U F"]
    """State of each row in the control tables."""
    controls: Controls
    """Sampling parameters per row, [U F]."""
    last: Int[ArrayLike, "U F"]
    """The token that the next step reads."""
    done: Bool[ArrayLike, "U F"]


class DecodedChunk(flax.struct.PyTreeNode):
    """Columns of `Rollouts` recorded in one chunk, one line per step. Lines beyond the steps that ran are undefined."""

    tokens: Int[ArrayLike, "n B"]
    active: Bool[ArrayLike, "n B"]
    """True where the row was not finished."""
    behavior_logprobs: Float[ArrayLike, "n B"]
    entropy: Float[ArrayLike, "n B"]
    sampled: Bool[ArrayLike, "n B"] | None = None
    """True where the policy sampled the token; None: wherever the row was active."""
    control_state: Int[ArrayLike, "n B"] | None = None
    raw_logprobs: Float[ArrayLike, "n B"] | None = None
    kept_tokens: Int[ArrayLike, "n B K"] | None = None
    overflow: Bool[ArrayLike, "n B"] | None = None
    """True where more than K tokens qualified."""


class ChunkResult(flax.struct.PyTreeNode):
    """State of the rows after a chunk, and what it recorded. Replicated on every device."""

    steps: Int[ArrayLike, ""]
    last: Int[ArrayLike, "U F"]
    done: Bool[ArrayLike, "U F"]
    state: Int[ArrayLike, "U F"]
    chunk: DecodedChunk


class DecodeState(flax.struct.PyTreeNode):
    """Carry of the decode loop."""

    steps: Int[Array, ""]
    any_active: Bool[Array, ""]
    """True if some row was unfinished at the last check."""
    last: Int[Array, " B"]
    done: Bool[Array, " B"]
    control: Int[Array, " B"]
    """State of each row in the control tables."""
    suffix: SuffixCache
    chunk: DecodedChunk


# Columns that the loop computes only with control tables; without, every token of an active row is sampled.
OF_CONTROL = ("sampled", "control_state")
DecodeChunk = Callable[..., tuple[SuffixCache, ChunkResult]]


class Drawing(NamedTuple):
    """What drawing a token reads of its row."""

    limit: Int[Array, " B"]
    """Maximum completion tokens."""
    controls: Controls
    keys: Key[Array, " B"]
    """One per row (`row_keys`)."""
    tables: ControlTables | None
    """None: no row has a control, and no minimum length."""
    classes: Int[Array, "A V"] | None
    """Those of the tables, split over the vocabulary: each shard masks its own logits. States are looked up in whole tables."""

    @staticmethod
    def of(
        limit: Int[Array, " B"], controls: Controls, keys: Key[Array, " B"], tables: ControlTables | None,
        layout: Layout,
    ) -> "Drawing":  # fmt: skip
        """Return the same with the tables laid out. `layout`: of decoding."""
        classes = None if tables is None else layout.constrain(tables.classes, None, "vocab")
        tables = jax.tree.map(lambda x: layout.constrain(x, *(None for _ in x.shape)), tables)
        return Drawing(limit, controls, keys, tables, classes)


class ActiveRows(NamedTuple):
    """What all steps of a chunk read of the active batch."""

    groups: SequenceGroups
    """At the start of the chunk."""
    slot: Int[Array, " B"]
    """Completion slot that the first step fills."""
    drawing: Drawing
    prompt: PromptCache
    """KV cache of each sequence group's prompt."""
    count: Int[Array, ""]
    """Keys written to the rows' ring buffers before the chunk."""


def step(params: PyTree, rows: ActiveRows, state: DecodeState, decoding: Decoding) -> DecodeState:
    """Decode one token for every row. Finished rows are computed as well, and their results ignored.

    Args:
        params: parameters of the policy, one entry per layer.
        rows: the active batch.
        state: carry of the loop.
        decoding: static settings.

    Returns:
        The carry after the step.
    """
    groups, slot, active = rows.groups, rows.slot + state.steps, ~state.done
    position = DecodePosition(count=rows.count + state.steps, length=groups.length, age=groups.age + state.steps)
    raw, suffix = decode(params, state.last, position, rows.prompt, state.suffix, decoding.model, decoding.layout)
    with jax.named_scope("draw"):
        line, control, ended = draw(rows.drawing, slot, raw, state.control, state.done, state.any_active, decoding)
    done = decoding.vocab.ends(line.tokens) | ended | (slot + 1 >= rows.drawing.limit)
    return DecodeState(
        steps=state.steps + 1,
        any_active=state.any_active,
        last=jnp.where(active, line.tokens, decoding.vocab.pad),
        done=state.done | done,
        control=jnp.where(active, control, state.control),
        suffix=suffix,
        chunk=jax.tree.map(lambda x, new: x.at[state.steps].set(new), state.chunk, line),
    )


def draw(
    rows: Drawing, slot: Int[Array, " B"], raw: Float[Array, "B V"], control: Int[Array, " B"], done: Bool[Array, " B"],
    any_active: Bool[Array, ""], decoding: Decoding,
) -> tuple[DecodedChunk, Int[Array, " B"], Bool[Array, " B"]]:  # fmt: skip
    """Return one line of a chunk, the state of each row's control behind its token, and which rows the control ends.

    Args:
        rows: whose token is drawn.
        slot: the completion slot that each row fills.
        raw: logits of the model.
        control: state of each row in the control tables.
        done: rows that have finished, whose results are unused.
        any_active: False if all have.
        decoding: static settings.
    """
    sample = partial(sample_tokens, rows.keys, slot, raw, rows.controls, any_active, decoding)
    if rows.tables is None:
        drawn = sample()
        of = ControlledToken(drawn.token, None, None, control, jnp.zeros_like(done))
    else:
        # In a finished row everything is allowed: without a token its log-probs would be NaN.
        before, code = before_token(rows.tables, jnp.where(done, 0, control), slot, rows.limit, rows.controls)
        allowed = allowed_tokens(rows.tables, jnp.where(done, 0, code))
        drawn = sample(allowed.replace(classes=rows.classes))
        of = after_token(rows.tables, before, code, drawn.token)
        drawn = drawn.only_where(of.sampled)
    line = DecodedChunk(
        of.token, ~done, drawn.logprob, drawn.entropy, of.sampled, of.code,
        drawn.raw_logprob, drawn.kept_tokens, drawn.overflow,
    )  # fmt: skip
    return line, of.state, of.ended


class ChunkInputs(NamedTuple):
    """What a chunk reads beside parameters, caches and active batch."""

    key: UInt32[Array, " k"]
    """Key data of the session."""
    count: Int[Array, ""]
    """Keys written to the rows' ring buffers before the chunk, as in `model.cache`."""
    steps: Int[Array, ""]
    """Maximum steps to run, at most n: a multiple of `Decoding.interval`."""
    tables: ControlTables | None
    """None: no row has a control, and no minimum length."""


def make_decode_chunk(decoding: Decoding) -> DecodeChunk:
    """Return `decode_chunk(params, suffix, prompt, groups, inputs) -> (suffix, ChunkResult)`; `suffix` is donated.

    It stops early once all rows have finished. A row's tokens depend only on the weights, its prompt, the key, its uid, its sample
    number, its controls and its limit.
    """

    def decode_chunk(params, suffix, prompt, groups, inputs):
        shape, (key, count, steps, tables) = groups.last.shape, inputs
        flat = lambda x: x.reshape(-1)  # noqa: E731
        keys = row_keys(jax.random.wrap_key_data(key), groups.uid, groups.sample)
        controls = jax.tree.map(flat, groups.controls)
        drawing = Drawing.of(flat(groups.limit), controls, keys, tables, decoding.layout)
        rows = ActiveRows(groups, flat(groups.begin + groups.age), drawing, prompt, count)

        def one_interval(state: DecodeState) -> DecodeState:
            one_step = lambda _, state: step(params, rows, state, decoding)  # noqa: E731
            state = jax.lax.fori_loop(0, decoding.interval, one_step, state)
            return state.replace(any_active=~jnp.all(state.done))

        done = flat(groups.done)
        start = DecodeState(
            steps=jnp.zeros((), jnp.int32), any_active=~jnp.all(done), last=flat(groups.last), done=done,
            control=flat(groups.state), suffix=suffix, chunk=empty_chunk(decoding, len(done), tables is not None),
        )  # fmt: skip
        end = jax.lax.while_loop(lambda state: (state.steps < steps) & state.any_active, one_interval, start)
        last, done, control = (x.reshape(shape) for x in (end.last, end.done, end.control))
        return end.suffix, ChunkResult(end.steps, last, done, control, end.chunk)

    return decode_chunk


def empty_chunk(decoding: Decoding, rows: int, controlled: bool) -> DecodedChunk:
    """Return a zero-filled chunk of `decoding.steps` steps for `rows` rows; `controlled`: with control tables."""

    def zeros(dtype: type, *more: int) -> Array:
        x = jnp.zeros((decoding.steps, rows, *more), dtype)
        return decoding.layout.constrain(x, None, "rows", *(None for _ in more))

    columns = {
        column.name: zeros(column.dtype, *(decoding.max_kept_tokens for _ in column.dims))
        for column in recorded_columns(decoding)
        if controlled or column.name not in OF_CONTROL
    }
    return DecodedChunk(**columns, active=zeros(bool), overflow=zeros(bool) if decoding.max_kept_tokens else None)


def recorded_columns(decoding: Decoding) -> list[Column]:
    """Return the columns of `Rollouts` that the decode loop records; those `OF_CONTROL` with control tables only."""
    uses = {
        "truncation": decoding.max_kept_tokens > 0,
        "raw_logprobs": decoding.raw_logprobs,
        "control": True,
        "": True,
    }
    fields = DecodedChunk.__dataclass_fields__
    return [column for column in COLUMNS if column.rollouts and column.name in fields and uses[column.when]]

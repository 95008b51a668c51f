"""The compiled programs of the engine: `segment`, a loop on the device that decodes one token a row and step against static caches.

Letters: U units in flight, each one prompt with F rows that share its keys and values; B = U * F rows, unit by unit; n steps.
What was drawn, its log-probability under the distribution it was drawn from, and that distribution's entropy are written down
as they happen, one line a step.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxrl_llm.model.cache import PromptCache, SuffixCache
from jaxrl_llm.model.transformer import Place, decode
from jaxrl_llm.rollout.sample import Controls, Decoding, draw, row_keys
from jaxrl_llm.types import COLUMNS, ArrayLike, Column, PyTree


class Units(flax.struct.PyTreeNode):
    """What is in flight, less its caches: small, and known to the host between segments."""

    uid: Int[ArrayLike, " U"]
    first: Int[ArrayLike, " U"]
    """Sample number of the unit's first row."""
    length: Int[ArrayLike, " U"]
    """Prompt tokens less the last one, which the first step reads."""
    age: Int[ArrayLike, " U"]
    """Steps made: the completion slot that the next draw fills."""
    limit: Int[ArrayLike, " U"]
    """Completion tokens a row draws at most."""
    controls: Controls
    """A unit each."""
    last: Int[ArrayLike, "U F"]
    """The token that the next step reads."""
    done: Bool[ArrayLike, "U F"]


class Record(flax.struct.PyTreeNode):
    """What a segment drew: columns of `Rollouts`, a line per step. Lines behind the steps that ran mean nothing."""

    tokens: Int[ArrayLike, "n B"]
    sampled: Bool[ArrayLike, "n B"]
    """The row still lived."""
    behavior_logprobs: Float[ArrayLike, "n B"]
    entropy: Float[ArrayLike, "n B"]
    raw_logprobs: Float[ArrayLike, "n B"] | None = None
    kept_tokens: Int[ArrayLike, "n B K"] | None = None
    overflow: Bool[ArrayLike, "n B"] | None = None
    """More tokens than K would have been kept."""


class Segment(flax.struct.PyTreeNode):
    """What comes back: where the rows stand, and the record. Whole on every device."""

    steps: Int[ArrayLike, ""]
    last: Int[ArrayLike, "U F"]
    done: Bool[ArrayLike, "U F"]
    record: Record


class Turn(flax.struct.PyTreeNode):
    """What the loop carries."""

    steps: Int[Array, ""]
    live: Bool[Array, ""]
    """Some row had not ended when last looked at."""
    last: Int[Array, " B"]
    done: Bool[Array, " B"]
    suffix: SuffixCache
    record: Record


DecodeSegment = Callable[[PyTree, SuffixCache, PromptCache, Units, Array, Array, Array], tuple[SuffixCache, Segment]]


def step(
    params: PyTree,
    keys: Key[Array, " B"],
    units: Units,
    prompt: PromptCache,
    count: Int[Array, ""],
    turn: Turn,
    decoding: Decoding,
) -> Turn:
    """One token for every row. A row that has ended goes on computing, and nothing of it counts.

    Args:
        params: the policy's, one entry per layer.
        keys: one per row (`row_keys`).
        units: what is in flight, as it was when the segment began.
        prompt: keys and values of each unit's prompt.
        count: keys written to the rows' rings before the segment.
        turn: where the loop stands.
        decoding: what was fixed when the loop was compiled.

    Returns:
        Where the loop stands one step later.
    """
    each = turn.last.shape[0] // units.age.shape[0]
    age = units.age + turn.steps
    place = Place(count=count + turn.steps, length=units.length, age=age)
    raw, suffix = decode(params, turn.last, place, prompt, turn.suffix, decoding.model, decoding.layout)
    of_rows = lambda x: jnp.repeat(x, each)  # noqa: E731
    with jax.named_scope("draw"):
        controls = jax.tree.map(of_rows, units.controls)
        drawn = draw(keys, of_rows(age), raw, controls, turn.live, decoding)
    live = ~turn.done
    line = Record(
        drawn.token, live, drawn.logprob, drawn.entropy, drawn.raw_logprob, drawn.kept_tokens, drawn.overflow
    )  # fmt: skip
    return Turn(
        steps=turn.steps + 1,
        live=turn.live,
        last=jnp.where(live, drawn.token, decoding.vocab.pad),
        done=turn.done | decoding.vocab.ends(drawn.token) | of_rows(age + 1 >= units.limit),
        suffix=suffix,
        record=jax.tree.map(lambda x, new: x.at[turn.steps].set(new), turn.record, line),
    )


def make_segment(decoding: Decoding) -> DecodeSegment:
    """The program `segment(params, suffix, prompt, units, key, count, steps) -> (suffix, Segment)`; `suffix` is donated.

    At most `steps` <= n steps, a multiple of `decoding.interval`; fewer when every row has ended. `count` as in `model.cache`.
    A row's tokens depend on the weights, its prompt, `key` (key data), its uid and its sample number, and on nothing else.
    """

    def segment(params, suffix, prompt, units, key, count, steps):
        each = units.last.shape[1]
        keys = row_keys(jax.random.wrap_key_data(key), units.uid, units.first, each)

        def advance(turn: Turn) -> Turn:
            return step(params, keys, units, prompt, count, turn, decoding)

        def stretch(turn: Turn) -> Turn:
            turn = jax.lax.fori_loop(0, decoding.interval, lambda _, turn: advance(turn), turn)
            return turn.replace(live=~jnp.all(turn.done))

        done = units.done.reshape(-1)
        start = Turn(
            steps=jnp.zeros((), jnp.int32), live=~jnp.all(done), last=units.last.reshape(-1), done=done, suffix=suffix,
            record=blank_record(decoding, len(done)),
        )  # fmt: skip
        end = jax.lax.while_loop(lambda turn: (turn.steps < steps) & turn.live, stretch, start)
        last, done = (x.reshape(units.last.shape) for x in (end.last, end.done))
        return end.suffix, Segment(end.steps, last, done, end.record)

    return segment


def blank_record(decoding: Decoding, rows: int) -> Record:
    def lines(dtype: type, *more: int) -> Array:
        blank = jnp.zeros((decoding.steps, rows, *more), dtype)
        return decoding.layout.constrain(blank, None, "rows", *(None for _ in more))

    columns = {
        column.name: lines(column.dtype, *(decoding.max_kept_tokens for _ in column.dims))
        for column in recorded(decoding)
    }
    return Record(**columns, overflow=lines(bool) if decoding.max_kept_tokens else None)


def recorded(decoding: Decoding) -> list[Column]:
    """The columns of rollouts that the loop writes down."""
    uses = {"truncation": decoding.max_kept_tokens > 0, "raw_logprobs": decoding.raw_logprobs, "": True}
    fields = Record.__dataclass_fields__
    return [column for column in COLUMNS if column.rollouts and column.name in fields and uses[column.when]]

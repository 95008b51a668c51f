"""The decoder-only transformer: one block, three ways through it.

`hidden` runs whole sequences, layers scanned (training, scoring). `prefill` runs prompts and keeps only keys and values.
`decode` runs one token a row against the caches, layers unrolled. All three share the block's arithmetic line by line,
so that what was sampled is what is scored.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrl_llm.model.attention.plain import Rows, attend, attend_part, merge
from jaxrl_llm.model.attention.selection import choose, mixer
from jaxrl_llm.model.cache import (
    Caching,
    Past,
    PromptCache,
    SuffixCache,
    nothing_read,
    num_slots,
    reaches,
    seen,
    seen_of_prompt,
    write,
)
from jaxrl_llm.model.config import ForwardOptions, ModelConfig
from jaxrl_llm.model.experts import mixture
from jaxrl_llm.model.linear import contract
from jaxrl_llm.model.mlp import dense
from jaxrl_llm.model.quantized import look_up
from jaxrl_llm.model.remat import checkpointed, keeping, named_input
from jaxrl_llm.model.rope import Angles, Rotation, angles, rope, rotation, shared_angles
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.types import PyTree

Layer = dict[str, jax.Array]
KV = tuple[jax.Array, jax.Array]


class Kind(NamedTuple):
    """What tells one layer's attention from another's."""

    frequency: np.ndarray | Array
    scale: float | Array
    reach: int | Array
    """Keys that a query sees, its own the last of them."""

    @property
    def turn(self) -> Rotation:
        return Rotation(self.frequency, self.scale)


def kinds(cfg: ModelConfig) -> tuple[Kind, ...]:
    """One a layer."""
    turns = {slides: rotation(cfg, slides) for slides in (False, True)}
    return tuple(Kind(*turns[cfg.slides(i)], reach) for i, reach in enumerate(reaches(cfg)))


def scanned_kinds(cfg: ModelConfig) -> tuple[Kind, dict[str, np.ndarray]]:
    """The first layer's kind, and one entry a layer of each number in which the layers differ: nothing where all are alike."""
    columns = {name: [getattr(kind, name) for kind in kinds(cfg)] for name in Kind._fields}
    differ = {name: column for name, column in columns.items() if any(np.any(x != column[0]) for x in column)}
    dtypes = {"frequency": np.float32, "scale": np.float32, "reach": np.int32}
    return kinds(cfg)[0], {name: np.asarray(column, dtypes[name]) for name, column in differ.items()}


def rms_norm(x: Array, weight: Array, cfg: ModelConfig) -> Array:
    """x / rms(x) * weight over the last dim, in f32 (Zhang & Sennrich 2019); * (1 + weight) in Gemma."""
    wide, weight = x.astype(jnp.float32), weight.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + cfg.norm_eps)
    return (wide * (1 + weight if cfg.norm_plus_one else weight)).astype(x.dtype)


def _qkv(layer: Layer, x: Array, by: Angles, cfg: ModelConfig) -> tuple[Array, Array, Array]:
    """Queries [B T K G H], keys and values [B T K H], rotated."""
    packed = contract(rms_norm(x, layer["attn_norm"], cfg), layer["qkv"])
    if cfg.qkv_bias:
        packed = packed + layer["qkv_bias"].astype(jnp.float32)
    packed = packed.astype(x.dtype)
    q, k, v = packed[..., : cfg.group, :], packed[..., cfg.group, :], packed[..., cfg.group + 1, :]
    if cfg.qk_norm:
        q, k = rms_norm(q, layer["q_norm"], cfg), rms_norm(k, layer["k_norm"], cfg)
    return rope(q, by), rope(k, by), v


def _attention_out(layer: Layer, x: Array, mixed: Array, cfg: ModelConfig) -> Array:
    out = contract(mixed.astype(x.dtype), layer["out"], 3).astype(x.dtype)
    return x + (rms_norm(out, layer["attn_out_norm"], cfg) if cfg.sandwich_norms else out)


def _mlp(layer: Layer, x: Array, cfg: ModelConfig, layout: Layout) -> Array:
    h = rms_norm(x, layer["mlp_norm"], cfg)
    out = mixture(layer, h, cfg, layout) if cfg.experts else dense(layer, h, cfg, layout)
    return x + (rms_norm(out, layer["mlp_out_norm"], cfg) if cfg.sandwich_norms else out)


def _embed(params: PyTree, tokens: Array, cfg: ModelConfig, layout: Layout) -> Array:
    x = look_up(params["embed"], tokens, cfg.compute, layout)
    if cfg.scale_embedding:
        x = x * jnp.asarray(cfg.d_model**0.5, cfg.compute)
    # First as the table lies, then as rows: in training one all-to-all in the compute dtype, and one back for the gradient.
    return layout.constrain(layout.constrain(x, "rows_beside_embed", None, "embed"), "rows", None, None)


def _block(
    layer: Layer,
    x: Array,
    by: Angles,
    cfg: ModelConfig,
    layout: Layout,
    mix: Callable[[Array, Array, Array], Array],
) -> tuple[Array, KV]:
    """One layer; `mix(q, k, v)` is the attention. Returns the residual stream and this layer's keys and values."""
    with jax.named_scope("attention"):
        q, k, v = _qkv(layer, x, by, cfg)
        x = layout.constrain(_attention_out(layer, x, mix(q, k, v), cfg), "rows", None, None)
    with jax.named_scope("mlp"):
        x = layout.constrain(_mlp(layer, x, cfg, layout), "rows", None, None)
    return x, (k, v)


def hidden(
    params: PyTree,
    tokens: Int[Array, "R T"],
    position: Int[Array, "R T"],
    until: Int[Array, "R T"],
    cfg: ModelConfig,
    layout: Layout,
    forward: ForwardOptions = ForwardOptions(),  # noqa: B008
) -> Float[Array, "R T D"]:
    """Normed activations after the last layer, for whole rows; slot t is seen by slots t to until[t] - 1. `params` has its layers
    stacked.

    `how`: form of attention (`selection.choose`) and what the backward pass makes again (`remat.checkpointed`). A layer's weights
    are gathered inside the loop over layers: one layer's at a time are whole.
    """
    first, differ = scanned_kinds(cfg)
    form = choose(forward.attention, tokens.shape[1], cfg, layout)
    kept = keeping(forward.remat, tokens.shape, cfg, layout)
    mix_of = mixer(form, Rows(until, position), cfg, layout)
    if "reach" not in differ:
        mix_of(first.reach)

    def step(x: Array, scanned: tuple[Layer, dict[str, Array]]) -> tuple[Array, None]:
        layer, own = scanned
        kind = first._replace(**own)
        mix = mix_of(kind.reach)
        mix = jax.checkpoint(mix) if kept == "attention" and form == "plain" else mix
        x, _ = _block(layer, named_input(x), angles(position, kind.turn), cfg, layout, mix)
        return x, None

    x = _embed(params, tokens, cfg, layout)
    x, _ = jax.lax.scan(checkpointed(step, kept), x, (params["layers"], differ))
    return rms_norm(x, params["final_norm"], cfg)


def logits(params: PyTree, h: Float[Array, "... D"], cfg: ModelConfig) -> Float[Array, "... V"]:
    """Next-token logits of normed activations, f32."""
    head = jax.tree.map(jnp.transpose, params["embed" if cfg.tied_head else "head"])
    return _capped(contract(h, head), cfg)


def _capped(x: Array, cfg: ModelConfig) -> Array:
    return x if cfg.logit_softcap is None else cfg.logit_softcap * jnp.tanh(x / cfg.logit_softcap)


def prefill(
    params: PyTree,
    tokens: Int[Array, "U S"],
    length: Int[Array, " U"],
    caching: Caching,
    cfg: ModelConfig,
    layout: Layout,
) -> PromptCache:
    """Keys and values of the first `length` tokens of right-padded prompts. No logits: the first decode step, which reads each
    prompt's last token, makes them.

    Args:
        params: one entry per layer.
        tokens: the prompts; their S may be less than the cache's.
        length: tokens to read of each.
        caching: slots of the cache, how many tokens are read at a time, and the form that keys and values are held in.
        cfg: the model.
        layout: where the cache lies.

    Returns:
        The cache of the prompts, one entry per prompt.
    """
    slots, chunk, form = caching
    num, total = tokens.shape
    turns = -(-total // chunk)
    if turns == 1:
        past = _read_chunk(params, tokens, length, 0, (None,) * cfg.layers, cfg, layout)
    else:
        tokens = jnp.pad(tokens, ((0, 0), (0, -total % chunk)))

        def read(n: Array, past: tuple[Past, ...]) -> tuple[Past, ...]:
            part = jax.lax.dynamic_slice_in_dim(tokens, n * chunk, chunk, axis=1)
            return _read_chunk(params, part, length, n * chunk, past, cfg, layout)

        past = jax.lax.fori_loop(0, turns, read, nothing_read(cfg, num, total, chunk, layout))
    sizes = [(min(reach, total), min(reach, slots)) for reach in reaches(cfg)]
    keys, values = zip(*(p.held(length, *size, form, layout) for p, size in zip(past, sizes, strict=True)), strict=True)
    return PromptCache(k=keys, v=values)


def _read_chunk(
    params: PyTree,
    tokens: Int[Array, "U T"],
    length: Int[Array, " U"],
    start: int | Int[Array, ""],
    past: tuple[Past | None, ...],
    cfg: ModelConfig,
    layout: Layout,
) -> tuple[Past, ...]:
    """What was read once the tokens from position `start` on are; None: nothing was before them."""
    position = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
    after: list[Past] = []

    def mix(reach: int, before: Past | None, q: Array, k: Array, v: Array) -> Array:
        after.append(Past(k, v) if before is None else before.with_chunk(k, v, start, length))
        first, keys, values = (0, k, v) if before is None else before.joined(k, v, start)
        behind = position[:, :, None] - (first + jnp.arange(keys.shape[1]))
        # Of keys before the first token there is room, but there are none.
        mask = (behind >= 0) & (behind < reach) & (behind <= position[:, :, None])
        return attend(q, keys, values, mask, cfg.attention_scale, cfg.attention_softcap)

    x = _embed(params, tokens, cfg, layout)
    for kind, layer, before in zip(kinds(cfg), params["layers"], past, strict=True):
        x, _ = _block(layer, x, angles(position, kind.turn), cfg, layout, partial(mix, kind.reach, before))
    return tuple(after)


class Place(NamedTuple):
    """Where a decode step stands."""

    count: Int[Array, ""]
    """Keys written to the rows' rings before."""
    length: Int[Array, " U"]
    """Keys of each unit's prompt that count: all but its last token's, which the unit's first step reads."""
    age: Int[Array, " U"]
    """Steps that the unit has made before."""


def decode(
    params: PyTree,
    token: Int[Array, " B"],
    place: Place,
    prompt: PromptCache,
    suffix: SuffixCache,
    cfg: ModelConfig,
    layout: Layout,
) -> tuple[Float[Array, "B V"], SuffixCache]:
    """Logits after one more token a row, and the cache with that token's keys and values written.

    The token of a row of unit u stands at position length[u] + age[u].
    The F rows of a unit are folded into query rows against its one copy of the prompt.
    """
    rows, units = token.shape[0], place.age.shape[0]
    each = rows // units
    position = jnp.repeat(place.length + place.age, each)[:, None]
    keys, values, form = list(suffix.k), list(suffix.v), suffix.form
    x = _embed(params, token[:, None], cfg, layout)
    attend_to = partial(attend_part, scale=cfg.attention_scale, softcap=cfg.attention_softcap)
    # Masks once for all layers with rings of a size: a ring that has gone round holds the last `size` <= reach tokens.
    sizes = {num_slots(x) for x in values}
    own_masks = {n: jnp.repeat(seen(n, place.count, place.age), each, axis=0) for n in sizes}

    def mix(i: int, reach: int, q: Array, k: Array, v: Array) -> Array:
        # Written first, then read back from the written cache: the other order makes XLA copy the cache.
        keys[i] = write(keys[i], k, place.count, form, form.across)
        values[i] = write(values[i], v, place.count, form)
        own = attend_to(q[:, 0], keys[i], values[i], own_masks[num_slots(values[i])], across=form.across)
        folded = q[:, 0].reshape(units, each, *q.shape[2:]).swapaxes(1, 2)
        folded = folded.reshape(units, cfg.kv_heads, each * cfg.group, cfg.head_dim)
        mask = seen_of_prompt(num_slots(prompt.v[i]), place.length, place.age, reach)
        shared = attend_to(folded, prompt.k[i], prompt.v[i], mask)
        return merge(tuple(_unfold(part, each) for part in shared), own)[:, None]

    turns = {cfg.slides(i): kind.turn for i, kind in enumerate(kinds(cfg))}
    by = {slides: shared_angles(position, turn, place.count) for slides, turn in turns.items()}
    for i, (kind, layer) in enumerate(zip(kinds(cfg), params["layers"], strict=True)):
        x, _ = _block(layer, x, by[cfg.slides(i)], cfg, layout, partial(mix, i, kind.reach))
    h = rms_norm(x[:, 0], params["final_norm"], cfg)
    return logits(params, h, cfg), suffix.replace(k=tuple(keys), v=tuple(values))


def _unfold(x: Array, each: int) -> Array:
    """[U K (F G) ...] -> [(U F) K G ...]"""
    u, k, q = x.shape[:3]
    return x.reshape(u, k, each, q // each, *x.shape[3:]).swapaxes(1, 2).reshape(u * each, k, q // each, *x.shape[3:])

"""The decoder-only transformer: one block, used by three forward passes.

`hidden` runs whole sequences, layers scanned (training, scoring). `prefill` runs prompts and returns only keys and values.
`decode` runs one token per row against the caches, layers unrolled. All three share the block's arithmetic line by line,
so sampling and scoring compute the same distribution.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrl_llm.model.attention.plain import PackedRows, attend, attend_part, merge
from jaxrl_llm.model.attention.selection import attention_for, choose_attention
from jaxrl_llm.model.cache import (
    Caching,
    PrefillState,
    PromptCache,
    SuffixCache,
    attention_windows,
    empty_prefill_state,
    num_slots,
    prompt_mask,
    suffix_mask,
    write,
)
from jaxrl_llm.model.config import ForwardOptions, ModelConfig
from jaxrl_llm.model.experts import mixture
from jaxrl_llm.model.linear import contract
from jaxrl_llm.model.mlp import dense
from jaxrl_llm.model.products import inner_products
from jaxrl_llm.model.quantized_weights import look_up
from jaxrl_llm.model.remat import checkpointed, choose_remat, named_input
from jaxrl_llm.model.rope import Angles, Rotation, angles, rope, rotation, shared_angles
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.types import PyTree

Layer = dict[str, jax.Array]
KV = tuple[jax.Array, jax.Array]


class LayerAttention(NamedTuple):
    """The attention parameters that differ between layers."""

    frequency: np.ndarray | Array
    scale: float | Array
    window: int | Array
    """Attention window: the number of keys a query attends to, its own included."""

    @property
    def rotation(self) -> Rotation:
        """The layer's rotary embedding."""
        return Rotation(self.frequency, self.scale)


def layer_attentions(cfg: ModelConfig) -> tuple[LayerAttention, ...]:
    """One entry per layer."""
    rotations = {slides: rotation(cfg, slides) for slides in (False, True)}
    return tuple(LayerAttention(*rotations[cfg.slides(i)], window) for i, window in enumerate(attention_windows(cfg)))


def scanned_attentions(cfg: ModelConfig) -> tuple[LayerAttention, dict[str, np.ndarray]]:
    """The first layer's attention, and per-layer arrays of the fields in which the layers differ (none if all are equal)."""
    columns = {
        name: [getattr(attention, name) for attention in layer_attentions(cfg)] for name in LayerAttention._fields
    }
    differ = {name: column for name, column in columns.items() if any(np.any(x != column[0]) for x in column)}
    dtypes = {"frequency": np.float32, "scale": np.float32, "window": np.int32}
    return layer_attentions(cfg)[0], {name: np.asarray(column, dtypes[name]) for name, column in differ.items()}


def rms_norm(x: Array, weight: Array, cfg: ModelConfig) -> Array:
    """x / rms(x) * weight over the last dimension, in f32 (Zhang & Sennrich 2019); * (1 + weight) in Gemma."""
    weight = weight.astype(jnp.float32)
    return _over_rms(x, 1 + weight if cfg.norm_plus_one else weight, cfg.norm_eps)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _over_rms(x: Array, factor: Array, eps: float) -> Array:
    """The gradient is written out: it stores only `x`, and its sums are in a form that XLA:CPU computes fast (`inner_products`)."""
    wide = x.astype(jnp.float32)
    return (wide * _inverse_rms(wide, eps) * factor).astype(x.dtype)


def _inverse_rms(wide: Array, eps: float) -> Array:
    return jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)


def _over_rms_forward(x: Array, factor: Array, eps: float) -> tuple[Array, tuple[Array, Array]]:
    return _over_rms(x, factor, eps), (x, factor)


def _over_rms_backward(eps: float, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, factor = saved
    wide, g = x.astype(jnp.float32), g.astype(jnp.float32)
    inverse = _inverse_rms(wide, eps)
    normalized, of_normalized = wide * inverse, g * factor
    mean = inner_products(of_normalized, normalized)[..., None] / x.shape[-1]
    dx = inverse * (of_normalized - normalized * mean)
    return dx.astype(x.dtype), jnp.sum((g * normalized).reshape(-1, x.shape[-1]), axis=0)


_over_rms.defvjp(_over_rms_forward, _over_rms_backward)


def _qkv(layer: Layer, x: Array, rotary: Angles, cfg: ModelConfig) -> tuple[Array, Array, Array]:
    """Queries [B T K G H], keys and values [B T K H], rotated."""
    packed = contract(rms_norm(x, layer["attn_norm"], cfg), layer["qkv"])
    if cfg.qkv_bias:
        packed = packed + layer["qkv_bias"].astype(jnp.float32)
    packed = packed.astype(x.dtype)
    # The gradient of a split is one array; that of three slices would be a sum of three.
    q, k, v = jax.lax.split(packed, (cfg.group, 1, 1), axis=packed.ndim - 2)
    k, v = jnp.squeeze(k, -2), jnp.squeeze(v, -2)
    if cfg.qk_norm:
        q, k = rms_norm(q, layer["q_norm"], cfg), rms_norm(k, layer["k_norm"], cfg)
    return rope(q, rotary), rope(k, rotary), v


def _attention_out(layer: Layer, x: Array, attended: Array, cfg: ModelConfig) -> Array:
    out = contract(attended.astype(x.dtype), layer["out"], 3, x.dtype)
    return x + (rms_norm(out, layer["attn_out_norm"], cfg) if cfg.sandwich_norms else out)


def _mlp(layer: Layer, x: Array, cfg: ModelConfig, layout: Layout) -> Array:
    h = rms_norm(x, layer["mlp_norm"], cfg)
    out = mixture(layer, h, cfg, layout) if cfg.experts else dense(layer, h, cfg, layout)
    return x + (rms_norm(out, layer["mlp_out_norm"], cfg) if cfg.sandwich_norms else out)


def _embed(params: PyTree, tokens: Array, cfg: ModelConfig, layout: Layout) -> Array:
    x = look_up(params["embed"], tokens, cfg.compute, layout)
    if cfg.scale_embedding:
        x = x * jnp.asarray(cfg.d_model**0.5, cfg.compute)
    # First sharded like the table, then by rows: in training one all-to-all in the compute dtype, and one back for the gradient.
    return layout.constrain(layout.constrain(x, "rows_beside_embed", None, "embed"), "rows", None, None)


def _block(
    layer: Layer,
    x: Array,
    rotary: Angles,
    cfg: ModelConfig,
    layout: Layout,
    attention: Callable[[Array, Array, Array], Array],
) -> tuple[Array, KV]:
    """One transformer layer.

    Args:
        layer: the layer's parameters.
        x: the residual stream [B T D].
        rotary: rotary angles of the positions.
        cfg: the model.
        layout: how activations are sharded.
        attention: attention as a function of queries, keys and values.

    Returns:
        The residual stream after the layer, and the layer's keys and values.
    """
    with jax.named_scope("attention"):
        q, k, v = _qkv(layer, x, rotary, cfg)
        x = layout.constrain(_attention_out(layer, x, attention(q, k, v), cfg), "rows", None, None)
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
    """Activations of whole rows after the final norm.

    A layer's weights are gathered inside the loop over layers, so only one layer is gathered at a time.

    Args:
        params: the parameters, layers stacked.
        tokens: token ids.
        position: position of each token in its own sequence.
        until: slots t to until[t] - 1 attend to slot t.
        cfg: the model.
        layout: how activations are sharded.
        forward: attention implementation (`selection.choose_attention`) and rematerialization (`remat.choose_remat`).
    """
    first, differ = scanned_attentions(cfg)
    implementation = choose_attention(forward.attention, tokens.shape[1], cfg, layout)
    remat = choose_remat(forward.remat, tokens.shape, cfg, layout)
    attention_of = attention_for(implementation, PackedRows(until, position), cfg, layout)
    if "window" not in differ:
        attention_of(first.window)

    def step(x: Array, scanned: tuple[Layer, dict[str, Array]]) -> tuple[Array, None]:
        layer, own = scanned
        attention = first._replace(**own)
        attend_rows = attention_of(attention.window)
        if remat == "attention" and implementation == "plain":
            attend_rows = jax.checkpoint(attend_rows)
        x, _ = _block(layer, named_input(x), angles(position, attention.rotation), cfg, layout, attend_rows)
        return x, None

    x = _embed(params, tokens, cfg, layout)
    x, _ = jax.lax.scan(checkpointed(step, remat), x, (params["layers"], differ))
    return rms_norm(x, params["final_norm"], cfg)


def logits(params: PyTree, h: Float[Array, "... D"], cfg: ModelConfig) -> Float[Array, "... V"]:
    """Next-token logits of normalized activations, f32."""
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
) -> tuple[Float[Array, "U S D"], PromptCache]:
    """Read the first `length` tokens of right-padded prompts. No logits: the first decode step reads each prompt's last token and
    computes them.

    Args:
        params: the policy's parameters, one entry per layer.
        tokens: the prompts; their S may be less than the cache's.
        length: tokens to read per prompt.
        caching: slots of the cache, tokens per chunk, and the cache format.
        cfg: the model.
        layout: decode layout.

    Returns:
        Activations after the final norm, and the prompts' keys and values, one entry per prompt.
    """
    slots, chunk, format = caching
    num, total = tokens.shape
    chunks = -(-total // chunk)
    # Equally long ones, with less padding.
    chunk = -(-total // chunks)
    if chunks == 1:
        x, past = _read_chunk(params, tokens, length, 0, (None,) * cfg.layers, cfg, layout)
    else:
        tokens = jnp.pad(tokens, ((0, 0), (0, -total % chunk)))

        def read(n: Array, carry: tuple[Array, tuple[PrefillState, ...]]) -> tuple[Array, tuple[PrefillState, ...]]:
            part = jax.lax.dynamic_slice_in_dim(tokens, n * chunk, chunk, axis=1)
            x, past = _read_chunk(params, part, length, n * chunk, carry[1], cfg, layout)
            return jax.lax.dynamic_update_slice_in_dim(carry[0], x, n * chunk, axis=1), past

        blank = layout.constrain(jnp.zeros((*tokens.shape, cfg.d_model), cfg.compute), "rows", None, None)
        start = blank, empty_prefill_state(cfg, num, total, chunk, layout)
        x, past = jax.lax.fori_loop(0, chunks, read, start)
        x = x[:, :total]
    sizes = [(min(window, total), min(window, slots)) for window in attention_windows(cfg)]
    keys, values = zip(
        *(p.to_cache(length, *size, format, layout) for p, size in zip(past, sizes, strict=True)), strict=True
    )
    return x, PromptCache(k=keys, v=values)


def _read_chunk(
    params: PyTree,
    tokens: Int[Array, "U T"],
    length: Int[Array, " U"],
    start: int | Int[Array, ""],
    past: tuple[PrefillState | None, ...],
    cfg: ModelConfig,
    layout: Layout,
) -> tuple[Float[Array, "U T D"], tuple[PrefillState, ...]]:
    """Activations of the chunk of tokens that begins at position `start`, and the state of each layer after it; `past` is None
    before the first chunk."""
    position = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
    after: list[PrefillState] = []

    def attend_chunk(window: int, before: PrefillState | None, q: Array, k: Array, v: Array) -> Array:
        after.append(PrefillState(k, v) if before is None else before.with_chunk(k, v, start, length))
        first, keys, values = (0, k, v) if before is None else before.join(k, v, start)
        behind = position[:, :, None] - (first + jnp.arange(keys.shape[1]))
        # Slots before the first token hold no keys.
        mask = (behind >= 0) & (behind < window) & (behind <= position[:, :, None])
        return attend(q, keys, values, mask, cfg.attention_scale, cfg.attention_softcap)

    x = _embed(params, tokens, cfg, layout)
    for attention, layer, before in zip(layer_attentions(cfg), params["layers"], past, strict=True):
        x, _ = _block(
            layer, x, angles(position, attention.rotation), cfg, layout, partial(attend_chunk, attention.window, before)
        )
    return rms_norm(x, params["final_norm"], cfg), tuple(after)


class DecodePosition(NamedTuple):
    """Position of a decode step."""

    count: Int[Array, ""]
    """Keys written to the rows' rings so far."""
    length: Int[Array, "U F"]
    """Keys of its group's prompt that each row attends to, the first ones. The row's first step reads the token behind them."""
    age: Int[Array, "U F"]
    """Keys in each row's ring."""


def decode(
    params: PyTree,
    token: Int[Array, " B"],
    at: DecodePosition,
    prompt: PromptCache,
    suffix: SuffixCache,
    cfg: ModelConfig,
    layout: Layout,
) -> tuple[Float[Array, "B V"], SuffixCache]:
    """Decode one token per row.

    A token of row f of sequence group u has position length[u, f] + age[u, f]. The F rows of a group are folded into query rows
    against its one copy of the prompt.

    Args:
        params: the policy's parameters, one entry per layer.
        token: the last token of each row, not yet in the cache.
        at: the position of the step.
        prompt: prompt cache, one entry per group.
        suffix: the rows' own keys and values.
        cfg: the model.
        layout: decode layout.

    Returns:
        The next token's logits, and the suffix cache with this token's keys and values written.
    """
    groups, each = at.age.shape
    position = (at.length + at.age).reshape(-1, 1)
    keys, values, format = list(suffix.k), list(suffix.v), suffix.format
    x = _embed(params, token[:, None], cfg, layout)
    attend_to = partial(attend_part, scale=cfg.attention_scale, softcap=cfg.attention_softcap)
    # One mask for all layers with rings of equal size: a ring that has wrapped around holds the last `size` <= window tokens.
    sizes = {num_slots(x) for x in values}
    own_masks = {n: suffix_mask(n, at.count, at.age.reshape(-1)) for n in sizes}

    def attend_caches(i: int, window: int, q: Array, k: Array, v: Array) -> Array:
        # Write first, then read from the written cache: the other order makes XLA copy the cache.
        keys[i] = write(keys[i], k, at.count, format, format.transposed)
        values[i] = write(values[i], v, at.count, format)
        own = attend_to(q[:, 0], keys[i], values[i], own_masks[num_slots(values[i])], transposed=format.transposed)
        folded = q[:, 0].reshape(groups, each, *q.shape[2:]).swapaxes(1, 2)
        folded = folded.reshape(groups, cfg.kv_heads, each * cfg.group, cfg.head_dim)
        # Repeated per query head: [U (F G) S].
        of_heads = (jnp.repeat(x, cfg.group, axis=1) for x in (at.length, at.age))
        mask = prompt_mask(num_slots(prompt.v[i]), *of_heads, window)
        shared = attend_to(folded, prompt.k[i], prompt.v[i], mask)
        return merge(tuple(_unfold(part, each) for part in shared), own)[:, None]

    rotations = {cfg.slides(i): attention.rotation for i, attention in enumerate(layer_attentions(cfg))}
    rotary = {slides: shared_angles(position, rotation, at.count) for slides, rotation in rotations.items()}
    for i, (attention, layer) in enumerate(zip(layer_attentions(cfg), params["layers"], strict=True)):
        x, _ = _block(layer, x, rotary[cfg.slides(i)], cfg, layout, partial(attend_caches, i, attention.window))
    h = rms_norm(x[:, 0], params["final_norm"], cfg)
    return logits(params, h, cfg), suffix.replace(k=tuple(keys), v=tuple(values))


def _unfold(x: Array, each: int) -> Array:
    """[U K (F G) ...] -> [(U F) K G ...]"""
    u, k, q = x.shape[:3]
    return x.reshape(u, k, each, q // each, *x.shape[3:]).swapaxes(1, 2).reshape(u * each, k, q // each, *x.shape[3:])

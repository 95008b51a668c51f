"""The decoder-only transformer: one block, three ways through it.

`hidden` runs whole sequences, layers scanned (training, scoring). `prefill` runs prompts and keeps only keys and values.
`decode` runs one token a row against the caches, layers unrolled. All three share the block's arithmetic line by line,
so that what was sampled is what is scored.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.model.attention import attend, attend_part, causal_mask, merge, rope
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.linear import contract, gather
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.types import PyTree

Layer = dict[str, jax.Array]
KV = tuple[jax.Array, jax.Array]


class PromptCache(flax.struct.PyTreeNode):
    """Keys and values of the prompts, once a prompt whatever the number of samples."""

    k: tuple[Float[Array, "P K S H"], ...]
    v: tuple[Float[Array, "P K S H"], ...]
    length: Int[Array, " P"]
    """Keys that count: the prompt less its last token, which the first decode step reads again."""


class SuffixCache(flax.struct.PyTreeNode):
    """Keys and values of what each row decoded, one array a layer, all rows written at the same slot."""

    k: tuple[Float[Array, "B K C H"], ...]
    v: tuple[Float[Array, "B K C H"], ...]

    @staticmethod
    def empty(cfg: ModelConfig, rows: int, slots: int, layout: Layout) -> "SuffixCache":
        shape = (rows, cfg.kv_heads, slots, cfg.head_dim)
        make = lambda: layout.constrain(jnp.zeros(shape, cfg.compute), "rows", "heads", None, None)  # noqa: E731
        return SuffixCache(k=tuple(make() for _ in range(cfg.layers)), v=tuple(make() for _ in range(cfg.layers)))


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / rms(x) * weight over the last dim, in f32 (Zhang & Sennrich 2019)."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * weight.astype(jnp.float32)).astype(x.dtype)


def _qkv(layer: Layer, x: Array, position: Array, cfg: ModelConfig) -> tuple[Array, Array, Array]:
    """Queries [B T K G H], keys and values [B T K H], rotated."""
    packed = contract(rms_norm(x, layer["attn_norm"], cfg.norm_eps), layer["qkv"])
    if cfg.qkv_bias:
        packed = packed + layer["qkv_bias"].astype(jnp.float32)
    packed = packed.astype(x.dtype)
    q, k, v = packed[..., : cfg.group, :], packed[..., cfg.group, :], packed[..., cfg.group + 1, :]
    if cfg.qk_norm:
        q, k = rms_norm(q, layer["q_norm"], cfg.norm_eps), rms_norm(k, layer["k_norm"], cfg.norm_eps)
    return rope(q, position, cfg.rope_theta), rope(k, position, cfg.rope_theta), v


def _attention_out(layer: Layer, x: Array, mixed: Array) -> Array:
    return x + contract(mixed.astype(x.dtype), layer["out"], 3).astype(x.dtype)


def _mlp(layer: Layer, x: Array, cfg: ModelConfig) -> Array:
    gate_up = layer["gate_up"].swapaxes(0, 1)
    gate, up = jnp.moveaxis(contract(rms_norm(x, layer["mlp_norm"], cfg.norm_eps), gate_up), -2, 0)
    return x + contract((jax.nn.silu(gate) * up).astype(x.dtype), layer["down"]).astype(x.dtype)


def _embed(params: PyTree, tokens: Array, cfg: ModelConfig, layout: Layout) -> Array:
    return layout.constrain(jnp.take(params["embed"], tokens, axis=0).astype(cfg.compute), "rows", None, None)


def _block(
    layer: Layer,
    x: Array,
    position: Array,
    cfg: ModelConfig,
    layout: Layout,
    mix: Callable[[Array, Array, Array], Array],
) -> tuple[Array, KV]:
    """One layer; `mix(q, k, v)` is the attention. Returns the residual stream and this layer's keys and values."""
    with jax.named_scope("attention"):
        q, k, v = _qkv(layer, x, position, cfg)
        x = layout.constrain(_attention_out(layer, x, mix(q, k, v)), "rows", None, None)
    with jax.named_scope("mlp"):
        x = layout.constrain(_mlp(layer, x, cfg), "rows", None, None)
    return x, (k, v)


def hidden(
    params: PyTree,
    tokens: Int[Array, "R T"],
    segment: Int[Array, "R T"],
    position: Int[Array, "R T"],
    cfg: ModelConfig,
    layout: Layout,
) -> Float[Array, "R T D"]:
    """Normed activations after the last layer, for whole rows. `params` has its layers stacked.

    Each layer is recomputed in the backward pass: what is kept is one residual stream a layer.
    """
    mask = causal_mask(segment, position)

    @jax.checkpoint
    def step(x: Array, layer: Layer) -> tuple[Array, None]:
        x, _ = _block(layer, x, position, cfg, layout, lambda q, k, v: attend(q, k, v, mask))
        return x, None

    x, _ = jax.lax.scan(step, _embed(params, tokens, cfg, layout), params["layers"])
    return rms_norm(x, params["final_norm"], cfg.norm_eps)


def logits(params: PyTree, h: Float[Array, "... D"], cfg: ModelConfig) -> Float[Array, "... V"]:
    """Next-token logits of normed activations, f32."""
    head = params["embed"].T if cfg.tied_head else params["head"]
    return contract(h, head)


def gather_head(params: PyTree, cfg: ModelConfig, layout: Layout) -> Float[Array, "shards D V"]:
    """The head, one copy for each shard of the rows, split over the vocabulary alone: for `logits_in_loop`."""
    name, axes = ("embed", ("vocab", "embed")) if cfg.tied_head else ("head", ("embed", "vocab"))
    whole = layout.sharding(("rows", *(axis if axis == "vocab" else None for axis in axes)))
    head = gather(params[name], layout.size("rows"), cfg.compute, layout.sharding(axes), whole)
    return head.swapaxes(1, 2) if cfg.tied_head else head


def logits_in_loop(head: Float[Array, "shards D V"], h: Float[Array, "R T D"]) -> Float[Array, "R T V"]:
    """`logits`, each shard of the rows with its own copy of the head."""
    by_shard = h.reshape(head.shape[0], -1, *h.shape[1:])
    return jax.vmap(lambda h, head: contract(h, head))(by_shard, head).reshape(*h.shape[:-1], head.shape[-1])


def prefill(
    params: PyTree, tokens: Int[Array, "P S"], length: Int[Array, " P"], cfg: ModelConfig, layout: Layout
) -> PromptCache:
    """Keys and values of right-padded prompts. `params` has one entry a layer. No logits: the first decode step makes them."""
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    mask = causal_mask((position < length[:, None]).astype(jnp.int32), position)
    x = _embed(params, tokens, cfg, layout)
    keys, values = [], []
    for layer in params["layers"]:
        x, (k, v) = _block(layer, x, position, cfg, layout, lambda q, k, v: attend(q, k, v, mask))
        keys.append(layout.constrain(k.swapaxes(1, 2), "rows", "heads", None, None))
        values.append(layout.constrain(v.swapaxes(1, 2), "rows", "heads", None, None))
    return PromptCache(k=tuple(keys), v=tuple(values), length=length - 1)


def decode(
    params: PyTree,
    token: Int[Array, " B"],
    slot: Int[Array, ""],
    prompt: PromptCache,
    suffix: SuffixCache,
    cfg: ModelConfig,
    layout: Layout,
) -> tuple[Float[Array, "B V"], SuffixCache]:
    """Logits after one more token a row, and the cache with that token written at `slot`, the same for all rows.

    Slot 0 takes each prompt's last token; so row b's token stands at position `prompt.length[p] + slot`.
    The G samples of a prompt are folded into query rows against its one copy of keys and values.
    """
    num_prompts, rows = prompt.length.shape[0], token.shape[0]
    samples = rows // num_prompts
    position = jnp.repeat(prompt.length, samples)[:, None] + slot
    prompt_mask = jnp.arange(prompt.k[0].shape[2]) < prompt.length[:, None]
    suffix_mask = jnp.broadcast_to(jnp.arange(suffix.k[0].shape[2]) <= slot, (rows, suffix.k[0].shape[2]))
    keys, values = list(suffix.k), list(suffix.v)
    x = _embed(params, token[:, None], cfg, layout)

    def mix(i: int, q: Array, k: Array, v: Array) -> Array:
        # Written first, then read back from the written cache: the other order makes XLA copy the cache.
        keys[i] = jax.lax.dynamic_update_slice(keys[i], k.swapaxes(1, 2), (0, 0, slot, 0))
        values[i] = jax.lax.dynamic_update_slice(values[i], v.swapaxes(1, 2), (0, 0, slot, 0))
        own = attend_part(q[:, 0], keys[i], values[i], suffix_mask)
        folded = q[:, 0].reshape(num_prompts, samples, *q.shape[2:]).swapaxes(1, 2)
        folded = folded.reshape(num_prompts, cfg.kv_heads, samples * cfg.group, cfg.head_dim)
        shared = attend_part(folded, prompt.k[i], prompt.v[i], prompt_mask)
        return merge(tuple(_unfold(part, samples) for part in shared), own)[:, None]

    for i, layer in enumerate(params["layers"]):
        x, _ = _block(layer, x, position, cfg, layout, lambda q, k, v, i=i: mix(i, q, k, v))
    h = rms_norm(x[:, 0], params["final_norm"], cfg.norm_eps)
    return logits(params, h, cfg), SuffixCache(k=tuple(keys), v=tuple(values))


def _unfold(x: Array, samples: int) -> Array:
    """[P K (n G) ...] -> [(P n) K G ...]"""
    p, k, q = x.shape[:3]
    return (
        x.reshape(p, k, samples, q // samples, *x.shape[3:])
        .swapaxes(1, 2)
        .reshape(p * samples, k, q // samples, *x.shape[3:])
    )

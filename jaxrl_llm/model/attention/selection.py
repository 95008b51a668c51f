"""Selection among the attention implementations for whole rows. All compute `attend` under `tree_mask`.

    plain    one product and one [T, T] mask; the reference that the others are tested against
    blocks   `model/attention/blockwise.py`, on every backend: no [T, T] array, fully masked blocks are skipped
    splash   JAX's TPU kernel, which skips such blocks too; T a multiple of 128. Its mask is [T, T] booleans per row
    cudnn    NVIDIA's fused kernel; bfloat16, no soft cap. Its mask is [T, T] per row

The output of a query without keys (padding) is meaningless and differs between implementations.
"""

from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxrl_llm.errors import UserError
from jaxrl_llm.model.attention.blockwise import BlockOptions, attend_blocks
from jaxrl_llm.model.attention.plain import PackedRows, attend, tree_mask
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.types import PyTree

Attention = Callable[[Array, Array, Array], Array]
"""Queries [B T K G H], keys and values [B T K H] to [B T K G H]."""

LANES = 128
# Shorter rows are faster without blocks on a CPU (measured); elsewhere blocks pay off once the scores no longer fit on the chip.
BLOCKS_FROM = {"cpu": 128, "other": 1024}
# Slots per block. Small blocks waste least on masked scores, and a CPU multiplies them as fast.
SIZES = {"cpu": 64, "other": 128}
# Scores that `blocks` holds at a time on a GPU: at T = 8,192, K = 2, G = 4 the backward pass takes 33 iterations of a dozen
# kernels; with the scores that fit into the caches of a CPU it would take 1,040.
SCORES_ON_GPU = 2**24


def choose_attention(name: str, slots: int, cfg: ModelConfig, layout: Layout) -> str:
    """Resolve `update.attention`. `auto` depends on the devices of `layout`:

    - TPU: splash for multiples of 128 from 1,024 slots on;
    - elsewhere blocks, from 128 slots on a CPU and from 1,024 on a GPU;
    - plain for shorter rows, and for lengths that splash does not support.

    Args:
        name: auto, plain, blocks, splash or cudnn.
        slots: slots per row (T).
        cfg: the model.
        layout: how rows and heads are sharded.

    Returns:
        The implementation, never `auto`.

    Raises:
        UserError: the implementation does not support this model, device or row length.
    """
    platform = _platform(layout)
    if name == "auto":
        if platform == "tpu":
            return "splash" if slots >= BLOCKS_FROM["other"] and slots % LANES == 0 else "plain"
        return "blocks" if slots >= BLOCKS_FROM.get(platform, BLOCKS_FROM["other"]) else "plain"
    if found := _mismatches(name, slots, platform, cfg):
        raise UserError("\n".join(found))
    return name


def problems(name: str, slots: Iterable[int], platform: str, cfg: ModelConfig) -> list[str]:
    """Error messages for an attention implementation that cannot run.

    Args:
        name: the implementation.
        slots: row lengths (T) of the run.
        platform: cpu, gpu, cuda or tpu.
        cfg: the model.
    """
    found = {text: None for n in sorted(set(slots)) for text in _mismatches(name, n, platform, cfg)}
    if name == "splash" and platform != "tpu":
        # Interpreted, it gives the same numbers a thousand times slower: for tests.
        return [f"update.attention: got splash on {platform}, want a TPU; blocks runs everywhere", *found]
    return list(found)


def _platform(layout: Layout) -> str:
    return layout.mesh.devices.flat[0].platform


def _mismatches(name: str, slots: int, platform: str, cfg: ModelConfig) -> list[str]:
    found = []
    if name == "splash" and slots % LANES:
        found.append(f"update.attention: got splash for rows of {slots} slots, want a multiple of {LANES}, or blocks")
    if name != "cudnn":
        return found
    if platform not in ("gpu", "cuda"):
        found.append(f"update.attention: got cudnn on {platform}, want an NVIDIA GPU; blocks runs everywhere")
    if cfg.compute != "bfloat16":
        found.append(f"update.attention: got cudnn with {cfg.compute}, want model.compute bfloat16, or blocks")
    if cfg.head_dim % 8 or cfg.head_dim > 256:
        found.append(
            f"update.attention: got cudnn with model.head_dim {cfg.head_dim}, want a multiple of 8 up to 256, or blocks"
        )
    if cfg.attention_softcap is not None:
        found.append("update.attention: got cudnn for a model with a soft cap on its scores, want blocks")
    return found


def attention_for(
    name: str, rows: PackedRows, cfg: ModelConfig, layout: Layout
) -> Callable[[int | Int[Array, ""]], Attention]:
    """Attention over these rows, as a function of the layer's attention window.

    Args:
        name: implementation, not `auto`.
        rows: structure of the rows.
        cfg: the model.
        layout: how rows and heads are sharded.
    """
    implementations = {"plain": _plain, "splash": _splash, "cudnn": _cudnn}
    if name == "blocks":
        options = BlockOptions(SIZES["cpu" if layout.on_cpu else "other"], cfg.attention_scale, cfg.attention_softcap)
        options = options._replace(at_a_time=SCORES_ON_GPU) if layout.on_gpu else options
        return lambda window: _on_mesh(partial(attend_blocks, options=options), layout, rows, window=window)

    @_cache_by_window
    def attention(window: int | Array) -> Attention:
        mask = tree_mask(rows, window)
        if name == "plain":
            return partial(_plain, mask=mask, cfg=cfg)
        return _on_mesh(partial(implementations[name], cfg=cfg, layout=layout), layout, mask)

    return attention


def _cache_by_window(make: Callable[[int | Array], Attention]) -> Callable[[int | Array], Attention]:
    """Cache by window, so that layers with equal windows share one mask."""
    made: dict[int, Attention] = {}

    def get(window: int | Array) -> Attention:
        if not isinstance(window, int):
            return make(window)
        return made.setdefault(window, made.get(window) or make(window))

    return get


def _on_mesh(attend_shard: Callable, layout: Layout, per_row: PyTree, **rest: object) -> Attention:
    """`attend_shard(q, k, v, per_row, **rest)` on each device's rows and heads; nothing moves between devices."""
    spec = lambda *axes: layout.sharding(axes).spec  # noqa: E731
    heads = (
        spec("rows", None, "heads", None, None),
        spec("rows", None, "heads", None),
        spec("rows", None, "heads", None),
    )
    rows = jax.tree.map(lambda x: spec("rows", *(None,) * (x.ndim - 1)), per_row)
    static = {name: x for name, x in rest.items() if isinstance(x, int)}
    traced = {name: x for name, x in rest.items() if name not in static}

    def block(q: Array, k: Array, v: Array, per_row: PyTree, traced: dict[str, Array]) -> Array:
        return attend_shard(q, k, v, per_row, **static, **traced)

    specs = (*heads, rows, {name: spec() for name in traced})
    # Outputs vary over the mesh as the inputs do; with check_vma each loop that starts from zeros would have to declare it.
    run = jax.shard_map(block, mesh=layout.mesh, in_specs=specs, out_specs=heads[0], check_vma=False)
    return lambda q, k, v: run(q, k, v, per_row, traced)


def _plain(q: Array, k: Array, v: Array, mask: Array, cfg: ModelConfig) -> Array:
    return attend(q, k, v, mask, cfg.attention_scale, cfg.attention_softcap)


def _scale(cfg: ModelConfig) -> float:
    return cfg.head_dim**-0.5 if cfg.attention_scale is None else cfg.attention_scale


def _splash(q: Array, k: Array, v: Array, mask: Array, cfg: ModelConfig, layout: Layout) -> Array:
    """Row by row, since each row has its own mask and list of blocks. The kernel is interpreted on other devices than TPUs."""
    from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes, make_splash_mha_single_device

    slots = q.shape[1]
    edge = next(n for n in (512, 256, LANES) if slots % n == 0)
    sizes = BlockSizes(
        block_q=edge, block_kv=edge, block_kv_compute=edge, block_q_dkv=edge, block_kv_dkv=edge,
        block_kv_dkv_compute=edge, block_q_dq=edge, block_kv_dq=edge,
    )  # fmt: skip
    # The kernel divides by a sum over keys: a query without keys attends to itself.
    own = jnp.eye(slots, dtype=bool) & ~jnp.any(mask, axis=2, keepdims=True)
    scaled = (q.astype(jnp.float32) * _scale(cfg)).astype(q.dtype)

    def row(x: tuple[Array, Array, Array, Array]) -> Array:
        q, k, v, mask = x
        kernel = make_splash_mha_single_device(
            mask[None], block_sizes=sizes, attn_logits_soft_cap=cfg.attention_softcap,
            interpret=_platform(layout) != "tpu",
        )  # fmt: skip
        # Inside jit the kernel's `is_dynamic_mask` is traced, and the kernel then needs its value.
        for name in ("fwd_mask_info", "dq_mask_info", "dkv_mask_info"):
            setattr(kernel, name, getattr(kernel, name)._replace(is_dynamic_mask=True))
        heads = q.reshape(slots, -1, q.shape[-1]).swapaxes(0, 1)
        return kernel(heads, k.swapaxes(0, 1), v.swapaxes(0, 1)).swapaxes(0, 1).reshape(q.shape)

    return jax.lax.map(row, (scaled, k, v, mask | own))


def _cudnn(q: Array, k: Array, v: Array, mask: Array, cfg: ModelConfig, layout: Layout) -> Array:
    heads = q.reshape(*q.shape[:2], -1, q.shape[-1])
    out = jax.nn.dot_product_attention(heads, k, v, mask=mask[:, None], scale=_scale(cfg), implementation="cudnn")
    return out.reshape(q.shape)

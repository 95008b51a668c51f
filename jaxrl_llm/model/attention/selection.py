"""The forms of attention over whole rows, behind one switch. All compute what `attend` does under `tree_mask`.

    plain    one product and one [T, T] mask; the reference that the others are tested against
    blocks   `model/attention/blockwise.py`, on every backend: no [T, T] array, blocks that no query sees are left out
    splash   JAX's kernel for TPUs, which leaves such blocks out too; T a multiple of 128. Its mask is [T, T] booleans a row
    cudnn    NVIDIA's fused kernel; bfloat16, no soft cap. Its mask is [T, T] a row

A query that sees no key, which padding alone is, gives numbers that mean nothing and differ from form to form.
"""

from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes, make_splash_mha_single_device
from jaxtyping import Array, Int

from jaxrl_llm.errors import UserError
from jaxrl_llm.model.attention.blockwise import Blocks, attend_blocks
from jaxrl_llm.model.attention.plain import Rows, attend, tree_mask
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.types import PyTree

Mix = Callable[[Array, Array, Array], Array]
"""Queries [B T K G H], keys and values [B T K H] to [B T K G H]."""

LANES = 128
# Rows shorter than this are faster whole on a CPU (measured); elsewhere blocks pay when the scores no longer stay on the chip.
BLOCKS_FROM = {"cpu": 128, "other": 1024}
# Slots of a block. Small ones waste least on masks, and a CPU multiplies them as fast.
SIZES = {"cpu": 64, "other": 128}


def choose(name: str, slots: int, cfg: ModelConfig, layout: Layout) -> str:
    """The form for rows of `slots`. `auto` is, by the devices of `layout`:

    - TPU: splash for multiples of 128 from 1,024 slots on;
    - elsewhere blocks, from 128 slots on a CPU and from 1,024 on a GPU;
    - plain for what is shorter, and for what splash does not take.

    UserError where a form that is asked for by name cannot be had.
    """
    platform = _platform(layout)
    if name == "auto":
        if platform == "tpu":
            return "splash" if slots >= BLOCKS_FROM["other"] and slots % LANES == 0 else "plain"
        return "blocks" if slots >= BLOCKS_FROM.get(platform, BLOCKS_FROM["other"]) else "plain"
    if found := _misfits(name, slots, platform, cfg):
        raise UserError("\n".join(found))
    return name


def problems(name: str, slots: Iterable[int], platform: str, cfg: ModelConfig) -> list[str]:
    """What stands against this form in runs, for rows of these sizes on such devices, in words."""
    found = {text: None for n in sorted(set(slots)) for text in _misfits(name, n, platform, cfg)}
    if name == "splash" and platform != "tpu":
        # Interpreted it gives the same numbers, a thousand times slower: for tests.
        return [f"update.attention: got splash on {platform}, want a TPU; blocks runs everywhere", *found]
    return list(found)


def _platform(layout: Layout) -> str:
    return layout.mesh.devices.flat[0].platform


def _misfits(name: str, slots: int, platform: str, cfg: ModelConfig) -> list[str]:
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


def mixer(name: str, rows: Rows, cfg: ModelConfig, layout: Layout) -> Callable[[int | Int[Array, ""]], Mix]:
    """For a layer's reach, its attention over these rows, in the form `name`, which is not `auto`."""
    masked = {"plain": _plain, "splash": _splash, "cudnn": _cudnn}
    if name == "blocks":
        blocks = Blocks(SIZES["cpu" if layout.on_cpu else "other"], cfg.attention_scale, cfg.attention_softcap)
        return lambda reach: _on_mesh(partial(attend_blocks, blocks=blocks), layout, rows, reach=reach)

    @_remember
    def of(reach: int | Array) -> Mix:
        mask = tree_mask(rows, reach)
        if name == "plain":
            return partial(_plain, mask=mask, cfg=cfg)
        return _on_mesh(partial(masked[name], cfg=cfg, layout=layout), layout, mask)

    return of


def _remember(of: Callable[[int | Array], Mix]) -> Callable[[int | Array], Mix]:
    """One mask for all layers that reach equally far, made where the first is asked for."""
    made: dict[int, Mix] = {}

    def get(reach: int | Array) -> Mix:
        if not isinstance(reach, int):
            return of(reach)
        return made.setdefault(reach, made.get(reach) or of(reach))

    return get


def _on_mesh(form: Callable, layout: Layout, of_rows: PyTree, **rest: object) -> Mix:
    """`form(q, k, v, of_rows, **rest)` on each device for its own rows and heads: nothing there moves between devices."""
    spec = lambda *axes: layout.sharding(axes).spec  # noqa: E731
    heads = (
        spec("rows", None, "heads", None, None),
        spec("rows", None, "heads", None),
        spec("rows", None, "heads", None),
    )
    rows = jax.tree.map(lambda x: spec("rows", *(None,) * (x.ndim - 1)), of_rows)
    static = {name: x for name, x in rest.items() if isinstance(x, int)}
    traced = {name: x for name, x in rest.items() if name not in static}

    def block(q: Array, k: Array, v: Array, of_rows: PyTree, traced: dict[str, Array]) -> Array:
        return form(q, k, v, of_rows, **static, **traced)

    specs = (*heads, rows, {name: spec() for name in traced})
    # Its outputs vary as the inputs do; loops that start from zeros would have to say so one by one.
    run = jax.shard_map(block, mesh=layout.mesh, in_specs=specs, out_specs=heads[0], check_vma=False)
    return lambda q, k, v: run(q, k, v, of_rows, traced)


def _plain(q: Array, k: Array, v: Array, mask: Array, cfg: ModelConfig) -> Array:
    return attend(q, k, v, mask, cfg.attention_scale, cfg.attention_softcap)


def _scale(cfg: ModelConfig) -> float:
    return cfg.head_dim**-0.5 if cfg.attention_scale is None else cfg.attention_scale


def _splash(q: Array, k: Array, v: Array, mask: Array, cfg: ModelConfig, layout: Layout) -> Array:
    """Row by row: each has a mask of its own, and with it its own list of blocks. Off a TPU the kernel is interpreted."""
    slots = q.shape[1]
    edge = next(n for n in (512, 256, LANES) if slots % n == 0)
    sizes = BlockSizes(
        block_q=edge, block_kv=edge, block_kv_compute=edge, block_q_dkv=edge, block_kv_dkv=edge,
        block_kv_dkv_compute=edge, block_q_dq=edge, block_kv_dq=edge,
    )  # fmt: skip
    # The kernel divides by a sum over keys: a query without any sees itself.
    own = jnp.eye(slots, dtype=bool) & ~jnp.any(mask, axis=2, keepdims=True)
    scaled = (q.astype(jnp.float32) * _scale(cfg)).astype(q.dtype)

    def row(x: tuple[Array, Array, Array, Array]) -> Array:
        q, k, v, mask = x
        kernel = make_splash_mha_single_device(
            mask[None], block_sizes=sizes, attn_logits_soft_cap=cfg.attention_softcap,
            interpret=_platform(layout) != "tpu",
        )  # fmt: skip
        # Made inside a jit, the kernel's own mark of such a mask is traced, and then it asks for its value.
        for name in ("fwd_mask_info", "dq_mask_info", "dkv_mask_info"):
            setattr(kernel, name, getattr(kernel, name)._replace(is_dynamic_mask=True))
        heads = q.reshape(slots, -1, q.shape[-1]).swapaxes(0, 1)
        return kernel(heads, k.swapaxes(0, 1), v.swapaxes(0, 1)).swapaxes(0, 1).reshape(q.shape)

    return jax.lax.map(row, (scaled, k, v, mask | own))


def _cudnn(q: Array, k: Array, v: Array, mask: Array, cfg: ModelConfig, layout: Layout) -> Array:
    heads = q.reshape(*q.shape[:2], -1, q.shape[-1])
    out = jax.nn.dot_product_attention(heads, k, v, mask=mask[:, None], scale=_scale(cfg), implementation="cudnn")
    return out.reshape(q.shape)

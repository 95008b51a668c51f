"""FLOPs and bytes of a decode step and FLOPs of an update, counted from shapes. A multiply and an add are two FLOPs."""

import math
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int

from jaxrl_llm.model import lora
from jaxrl_llm.model import params as model_params
from jaxrl_llm.model.cache import attention_windows
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.types import Batch, PyTree


class Work(NamedTuple):
    """Bytes moved and FLOPs of one step."""

    bytes: float
    flops: float


def weight_products(cfg: ModelConfig) -> list[tuple[int, int, int]]:
    """Return (inputs, outputs, count) of the matrices that one token meets; the embedding counts as head, not as look-up."""
    heads = cfg.heads * cfg.head_dim
    packed = cfg.kv_heads * (cfg.group + 2) * cfg.head_dim
    mlps = cfg.layers * max(cfg.experts_per_token, 1)
    return [
        (cfg.d_model, packed, cfg.layers),
        (heads, cfg.d_model, cfg.layers),
        (cfg.d_model, 2 * cfg.d_mlp, mlps),
        (cfg.d_mlp, cfg.d_model, mlps),
        (cfg.d_model, cfg.vocab_size, 1),
    ]


def matmul_params(cfg: ModelConfig) -> int:
    """Return N of 2 N and 6 N: the number of entries of the matrices of `weight_products`."""
    return sum(k * n * count for k, n, count in weight_products(cfg))


def decode_step(
    cfg: ModelConfig,
    length: Int[np.ndarray, " U"],
    age: Int[np.ndarray, " U"],
    rows_per_group: int,
    bytes_per_number: float,
) -> Work:
    """Return the minimum work of one decode step over the whole mesh, without reading the weights: the prompt's keys and values
    read once per sequence group, a row's own once per row, new ones written; products with weights, scores and values.

    Args:
        cfg: the model.
        length: prompt tokens of each sequence group (U): a prompt and the rows that share its KV cache.
        age: tokens that the rows of each sequence group have sampled so far.
        rows_per_group: rows that share one prompt.
        bytes_per_number: bytes per cached number, scales included.
    """
    prompt, own = 0.0, 0.0
    for window in attention_windows(cfg):
        prompt += np.minimum(length, np.maximum(window - age - 1, 0)).sum()
        own += rows_per_group * np.minimum(age + 1, window).sum()
    rows = rows_per_group * len(age)
    numbers = 2 * cfg.kv_heads * cfg.head_dim * (prompt + own + rows * cfg.layers)
    return Work(bytes_per_number * numbers, forward_flops(cfg, rows_per_group * prompt + own, rows, rows))


def attention_pairs(cfg: ModelConfig, position: Int[np.ndarray, "R T"], real: Bool[np.ndarray, "R T"]) -> int:
    """Return the number of (query, key) pairs that attend, over all layers: a token at position p attends to itself and the p
    before it, in a sliding layer to at most its window. The same in packed rows and in trees: other slots are masked."""
    keys = position[real].astype(np.int64) + 1
    return sum(int(np.minimum(keys, window).sum()) for window in attention_windows(cfg))


def causal_pairs(cfg: ModelConfig, length: int) -> int:
    """Return `attention_pairs` of a sequence of `length` tokens: 1 + 2 + ... up to a layer's window, then the window per token."""
    short = [min(length, window) for window in attention_windows(cfg)]
    return sum(n * (n + 1) // 2 + (length - n) * n for n in short)


class TokenCounts(NamedTuple):
    """The counts that an update's FLOPs depend on."""

    pairs: int
    """`attention_pairs`."""
    tokens: int
    """Without padding; a shared prompt counts once."""
    scored: int
    """Tokens in the loss."""


def count_tokens(cfg: ModelConfig, batch: Batch) -> TokenCounts:
    """Return the counts of a batch that is on the host."""
    real = np.asarray(batch.group) > 0
    return TokenCounts(
        attention_pairs(cfg, batch.position, real), int(real.sum()), int(np.asarray(batch.loss_mask).sum())
    )


def forward_flops(cfg: ModelConfig, pairs: float, tokens: int, scored: int) -> float:
    """Return 2 (N - N_head) tokens + 2 N_head scored + 4 heads head_dim pairs, with N = `matmul_params`.

    The embedding look-up is not counted, the head only at tokens that are scored or sampled; a pair's score and weighted value take
    2 heads head_dim each.

    Args:
        cfg: the model.
        pairs: `attention_pairs`.
        tokens: tokens that pass through the layers.
        scored: tokens that pass through the head.
    """
    head = cfg.d_model * cfg.vocab_size
    return 2 * (matmul_params(cfg) - head) * tokens + 2 * head * scored + 4 * cfg.heads * cfg.head_dim * pairs


class TrainFlops(NamedTuple):
    """Model FLOPs of an update over the whole mesh; MFU counts their sum."""

    layers: float
    head: float
    attention: float


def train_flops(cfg: ModelConfig, pairs: int, tokens: int, scored: int, adapters: int | None = None) -> TrainFlops:
    """Return `forward_flops` plus the backward pass, twice as many:

        6 (N - N_head) tokens + 6 N_head scored + 12 heads head_dim pairs

    Recomputation by remat is not counted, nor a critic, norms, rotary embedding and the optimizer.

    Args:
        cfg: the model.
        pairs: `attention_pairs`.
        tokens: tokens that pass through the layers.
        scored: tokens in the loss.
        adapters: number of LoRA parameters A, all else frozen: 4 N (forward and the gradient of activations) + 6 A per token.
            None: every parameter is trained.
    """
    head = cfg.d_model * cfg.vocab_size
    per_param = 6 if adapters is None else 4
    layers = per_param * (matmul_params(cfg) - head) + 6 * (adapters or 0)
    return TrainFlops(layers * tokens, per_param * head * scored, 12 * cfg.heads * cfg.head_dim * pairs)


def count_adapter_params(specs: PyTree, cfg: ModelConfig) -> int | None:
    """Return the number of LoRA parameters of the policy for `train_flops`; None without adapters."""
    trained, frozen = lora.split(model_params.policy_params(specs, cfg))
    return model_params.count(trained) if jax.tree.leaves(frozen) else None


def weight_bytes(params: PyTree, cfg: ModelConfig) -> int:
    """Return the bytes of weights that one device reads per decode step: all of them except an untied embedding."""
    return bytes_per_device(params if cfg.tied_head else {name: x for name, x in params.items() if name != "embed"})


def bytes_per_device(tree: PyTree) -> int:
    """Return the bytes of sharded arrays on one device, without the padding of a TPU's tiles."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))

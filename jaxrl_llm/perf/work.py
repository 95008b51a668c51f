"""How much work a model is: matrices that a token meets, bytes and FLOPs of a decode step. A multiply and an add are two FLOPs."""

import math
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int

from jaxrl_llm.model import lora
from jaxrl_llm.model import params as model_params
from jaxrl_llm.model.cache import reaches
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.types import Batch, PyTree


class Work(NamedTuple):
    """Of one step, on one device."""

    bytes: float
    flops: float


def weight_products(cfg: ModelConfig) -> list[tuple[int, int, int]]:
    """(inputs, outputs, how often) of the matrices that one token meets; the embedding counts as head, not as look-up."""
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
    """N of 2 N and 6 N: entries of the matrices of `weight_products`."""
    return sum(k * n * often for k, n, often in weight_products(cfg))


def decode_step(
    cfg: ModelConfig,
    length: Int[np.ndarray, " U"],
    age: Int[np.ndarray, " U"],
    each: int,
    entry: float,
) -> Work:
    """What a step of `each` rows a unit must do beside reading the weights, over the whole mesh: keys and values read once a unit
    (prompt) or row (its own), and written; products with weights, scores and values. `entry`: bytes of a cached number."""
    prompt, own = 0.0, 0.0
    for reach in reaches(cfg):
        prompt += np.minimum(length, np.maximum(reach - age - 1, 0)).sum()
        own += each * np.minimum(age + 1, reach).sum()
    rows = each * len(age)
    numbers = 2 * cfg.kv_heads * cfg.head_dim * (prompt + own + rows * cfg.layers)
    return Work(entry * numbers, forward_flops(cfg, each * prompt + own, rows, rows))


def attention_pairs(cfg: ModelConfig, position: Int[np.ndarray, "R T"], real: Bool[np.ndarray, "R T"]) -> int:
    """(query, key) pairs that attend, over all layers: a token at position p sees itself and the p before it, a sliding layer's at
    most its reach of them. The same in packed rows and in trees: what lies between in the row is not seen."""
    seen = position[real].astype(np.int64) + 1
    return sum(int(np.minimum(seen, reach).sum()) for reach in reaches(cfg))


def causal_pairs(cfg: ModelConfig, length: int) -> int:
    """`attention_pairs` of one sequence of so many tokens: 1 + 2 + ... up to a layer's reach, and the reach from there on."""
    short = [min(length, reach) for reach in reaches(cfg)]
    return sum(n * (n + 1) // 2 + (length - n) * n for n in short)


class Seen(NamedTuple):
    """What an update's FLOPs depend on."""

    pairs: int
    """`attention_pairs`."""
    tokens: int
    """Real ones: no padding, a shared prompt once."""
    scored: int
    """Those that are learned from."""


def seen(cfg: ModelConfig, batch: Batch) -> Seen:
    """Of a batch on the host."""
    real = np.asarray(batch.group) > 0
    return Seen(attention_pairs(cfg, batch.position, real), int(real.sum()), int(np.asarray(batch.loss_mask).sum()))


def forward_flops(cfg: ModelConfig, pairs: float, tokens: int, scored: int) -> float:
    """2 (N - N_head) tokens + 2 N_head scored + 4 heads head_dim pairs, N: `matmul_params`. The look-up of the embedding is not
    counted, the head only at tokens that are scored or drawn; a pair's score and weighted value take 2 heads head_dim each."""
    head = cfg.d_model * cfg.vocab_size
    return 2 * (matmul_params(cfg) - head) * tokens + 2 * head * scored + 4 * cfg.heads * cfg.head_dim * pairs


class TrainFlops(NamedTuple):
    """Model FLOPs of an update, over the whole mesh; their sum is what MFU counts."""

    layers: float
    head: float
    attention: float


def train_flops(cfg: ModelConfig, pairs: int, tokens: int, scored: int, adapters: int | None = None) -> TrainFlops:
    """`forward_flops`, and backward twice that:

        6 (N - N_head) tokens + 6 N_head scored + 12 heads head_dim pairs

    What remat computes again is not counted, nor a critic, norms, rotations and the optimizer.

    Args:
        adapters: entries of LoRA's matrices, all else frozen: forward and the gradient of activations alone, 4 N, and 6 of these.
            None: every parameter is trained.
    """
    head = cfg.d_model * cfg.vocab_size
    each = 6 if adapters is None else 4
    layers = each * (matmul_params(cfg) - head) + 6 * (adapters or 0)
    return TrainFlops(layers * tokens, each * head * scored, 12 * cfg.heads * cfg.head_dim * pairs)


def adapters_of(specs: PyTree, cfg: ModelConfig) -> int | None:
    """Of a learner with these specs, as `train_flops` takes them."""
    trained, frozen = lora.split(model_params.policy_part(specs, cfg))
    return model_params.count(trained) if jax.tree.leaves(frozen) else None


def weight_bytes(params: PyTree, cfg: ModelConfig) -> int:
    """Bytes of the weights that one device reads in a step: all it holds, but for an embedding that is no head."""
    return held(params if cfg.tied_head else {name: x for name, x in params.items() if name != "embed"})


def held(tree: PyTree) -> int:
    """Bytes that one device holds of arrays with shardings; not counting what a TPU's tiles leave empty."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))

"""Counted work: attention pairs against the mask itself, FLOPs by hand."""

import dataclasses

import jax
import numpy as np
import pytest
from setups import TINY, Sequences, layouts

from jaxrl_llm.errors import UserError
from jaxrl_llm.model.cache import CacheFormat, empty_suffix
from jaxrl_llm.perf import chips
from jaxrl_llm.perf.utilization import UpdateRates, min_seconds
from jaxrl_llm.perf.work import TokenCounts, TrainFlops, attention_pairs, forward_flops, matmul_params, train_flops
from jaxrl_llm.update.batch import fill_batch
from jaxrl_llm.update.packing import batch_shape, equal_groups

SLIDING = dataclasses.replace(TINY, window=3, sliding=(True, False))
PROMPT, COMPLETION = np.array([3, 3, 2, 2]), np.array([4, 2, 1, 3])


def batch(kind):
    """Two groups of two: prompts of 3 and 2 tokens, completions of 4, 2, 1 and 3."""
    zeros = np.zeros((4, 4), np.float32)
    learn = np.arange(4) < COMPLETION[:, None]
    tokens = np.ones((4, 4), np.int32)
    sequences = Sequences(
        tokens[:, :3], PROMPT, tokens, COMPLETION, np.array([0, 0, 1, 1]), learn, np.ones(4, np.float32), zeros, zeros
    )
    return fill_batch(sequences.experience, batch_shape(kind, equal_groups(2, 2), (3, 4), 11, 1, 1), 0)[0]


def pairs_of_the_mask(batch, window):
    """Slot t attends to slot u iff u <= t < until[u] and their positions are less than `window` apart."""
    slots = np.arange(batch.tokens.shape[1])
    sees = (slots <= slots[:, None]) & (slots[:, None] < batch.until[:, None, :])
    return int((sees & (batch.position[:, :, None] - batch.position[:, None, :] < window)).sum())


@pytest.mark.parametrize("kind", ["none", "plain", "shared_prefix"])
def test_pairs_are_those_of_the_mask(kind):
    found = batch(kind)
    real = found.group > 0
    assert real.sum() == (20 if kind != "shared_prefix" else 15)
    assert attention_pairs(SLIDING, found.position, real) == sum(pairs_of_the_mask(found, window) for window in (3, 99))
    if kind != "shared_prefix":
        # Lengths 7, 5, 3, 5: n (n + 1) / 2 each; with a window of 3, three per token except for the first two.
        assert attention_pairs(SLIDING, found.position, real) == (28 + 15 + 6 + 15) + (18 + 12 + 6 + 12)


def test_flops_by_hand():
    """TINY: 2 layers of qkv 16 x 64, out 32 x 16, gate and up 16 x 32, down 16 x 16; head 16 x 16."""
    layers = 2 * (16 * 64 + 32 * 16 + 16 * 32 + 16 * 16)
    assert matmul_params(TINY) == layers + 16 * 16
    assert train_flops(TINY, pairs=7, tokens=5, scored=3) == TrainFlops(6 * layers * 5, 6 * 256 * 3, 12 * 4 * 8 * 7)
    adapted = train_flops(TINY, pairs=7, tokens=5, scored=3, adapters=100)
    assert adapted == TrainFlops((4 * layers + 600) * 5, 4 * 256 * 3, 12 * 4 * 8 * 7)


def test_training_is_three_forward_passes():
    counts = TokenCounts(pairs=7, tokens=5, scored=3)
    assert sum(train_flops(TINY, *counts)) == 3 * forward_flops(TINY, *counts)


@pytest.mark.parametrize(("form", "each"), [(CacheFormat(), 4), (CacheFormat(int8=True), 1 + 4 / 8)])
def test_bytes_per_cached_number_are_those_of_the_cache(form, each):
    """4 in f32; in int8 one scale of 4 bytes for the 8 numbers of a head."""
    layout = layouts()[1]
    cache = jax.eval_shape(lambda: empty_suffix(TINY, 3, 5, layout, form))
    numbers = 2 * TINY.layers * 3 * TINY.kv_heads * 5 * TINY.head_dim
    assert form.number_bytes(TINY) == each
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)) == each * numbers


def test_min_seconds_by_hand():
    """(6 + 2) / 4 + 3 / 1.5 seconds of one device, divided by eight."""
    assert min_seconds(TrainFlops(layers=6.0, head=3.0, attention=2.0), UpdateRates(4.0, 1.5), 8) == 0.5


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v4", 275e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v6e", 918e12),
        ("NVIDIA GH200 480GB", None),
        ("cpu", None),
        ("TPU v7x", None),
    ],
)
def test_peak_flops_by_device_kind(kind, peak):
    """`update/mfu` and `jaxrl plan` look up the same chip."""
    chip = chips.lookup(kind)
    assert (chip and chip.flops) == peak
    if peak is None and kind != "cpu":
        with pytest.raises(UserError, match="a chip that is not in the table of chips"):
            chips.of_device("gpu", kind, 1)
    elif peak:
        assert chips.of_device("gpu", kind, 1) == chip

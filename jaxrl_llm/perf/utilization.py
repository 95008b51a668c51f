"""Hardware ceilings (bandwidth and matmul FLOP/s) at a run's own shapes, and the fraction of them that its updates achieve."""

from functools import cache
from typing import NamedTuple

import jax.numpy as jnp

from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.perf import chips
from jaxrl_llm.perf.ceilings import copy_bandwidth, matmul_rate
from jaxrl_llm.perf.work import TrainFlops, matmul_params, weight_products

# Larger products are no faster, and their results take memory beside the state.
MAX_ROWS, MAX_ROWS_ON_CPU, MAX_WIDTH = 4096, 1024, 8192
# About half of the time per measurement: twice as long gives the same within the noise.
SECONDS = 0.05


class DecodeRates(NamedTuple):
    """Ceilings of one device at the shapes of a decode step."""

    bytes_per_s: float
    flops_per_s: float


@cache
def decode_rates(model: ModelConfig, rows: int, shards: int) -> DecodeRates:
    """Measure a decode step's ceilings, once per process, in about half a second.

    Args:
        rows: active rows per device.
        shards: devices that split each matrix.
    """
    # The head is left out: with a large vocabulary it would not fit beside the policy.
    nbytes = matmul_params(model) * jnp.dtype(model.compute).itemsize // shards
    products = [("forward", rows, k, n) for k, n in layer_shapes(model, shards)]
    return DecodeRates(copy_bandwidth(min(nbytes, 2**28), SECONDS), matmul_rate(products, model.compute, SECONDS))


def layer_shapes(model: ModelConfig, shards: int) -> list[tuple[int, int]]:
    """Return (inputs, outputs) of a layer's matrices on one of `shards` devices that split them."""
    (d, packed, _), (heads, _, _), (_, up, _), (down, _, _), _ = weight_products(model)
    shapes = (d, packed // shards), (heads // shards, d), (d, up // shards), (down // shards, d)
    return [(max(k, 1), max(n, 1)) for k, n in shapes]


class UpdateRates(NamedTuple):
    """FLOPs per second of one device at the shapes of an update."""

    layers: float
    head: float


def update_rates(model: ModelConfig, tokens: int, layout: Layout, has_adapters: bool) -> UpdateRates:
    """Measure the products of a layer and those of the head, once per process, in about half a second.

    Args:
        model: the model that is trained.
        tokens: tokens per micro-batch and device.
        layout: the training layout.
        has_adapters: the matrices themselves are frozen and have no gradient.
    """
    passes = ("forward", "dx") if has_adapters else ("forward", "dx", "dw")
    return measure_update(
        model, min(tokens, MAX_ROWS_ON_CPU if layout.on_cpu else MAX_ROWS), layout.size("mlp"), passes
    )


@cache
def measure_update(
    model: ModelConfig,
    rows: int,
    shards: int,
    passes: tuple[str, ...] = ("forward", "dx", "dw"),
    seconds: float = SECONDS,
) -> UpdateRates:
    """Measure products of `rows` tokens with matrices split by `shards` devices, in each of `passes`.

    Args:
        model: the model that is trained.
        rows: tokens per product.
        shards: devices that split each matrix.
        passes: keys of `ceilings.CONTRACTIONS`.
        seconds: about half of the time per measurement.
    """

    def rate(shapes: list[tuple[int, int]]) -> float:
        products = [(name, rows, min(k, MAX_WIDTH), min(n, MAX_WIDTH)) for k, n in shapes for name in passes]
        return matmul_rate(products, model.compute, seconds)

    return UpdateRates(rate(layer_shapes(model, shards)), rate([(model.d_model, max(model.vocab_size // shards, 1))]))


def min_seconds(flops: TrainFlops, rates: UpdateRates, devices: int) -> float:
    """Return the seconds that the products alone take at the measured rates; attention at the rate of the layers."""
    return ((flops.layers + flops.attention) / rates.layers + flops.head / rates.head) / devices


def describe_updates(flops: TrainFlops, seconds: float, rates: UpdateRates | None, layout: Layout) -> dict[str, float]:
    """Return the achieved FLOP/s of updates, and their fraction of what the devices can do.

    `update/ceiling_fraction`: `min_seconds` / `seconds`. `update/mfu`: model FLOPs (`train_flops`) per second, divided by the
    published bf16 peak of all devices, whatever the compute dtype; left out for a chip that is not in the table.

    Args:
        flops: model FLOPs of the updates together.
        seconds: wall time of the updates together.
        rates: `update_rates`; None: not measured.
        layout: the training layout.
    """
    devices = layout.mesh.devices
    chip = chips.lookup(devices.flat[0].device_kind)
    found = {"update/flops_per_s": sum(flops) / seconds}
    if rates is not None:
        found["update/ceiling_fraction"] = min_seconds(flops, rates, devices.size) / seconds
    return found | ({"update/mfu": sum(flops) / (seconds * chip.flops * devices.size)} if chip else {})

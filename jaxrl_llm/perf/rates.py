"""What the devices were measured to do at most, at a run's own shapes, and how near to that it comes."""

from functools import cache
from typing import NamedTuple

import jax.numpy as jnp

from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.perf import chips
from jaxrl_llm.perf.ceilings import copy_bandwidth, matmul_rate
from jaxrl_llm.perf.work import TrainFlops, matmul_params, weight_products
from jaxrl_llm.rollout.engine import Engine
from jaxrl_llm.update.packing import Shape

# Larger products are no faster, and their results take memory beside the state.
MOST_ROWS, MOST_ROWS_ON_CPU, WIDEST = 4096, 1024, 8192


class Rates(NamedTuple):
    """Of one device, at the shapes of a decode step."""

    bytes_per_s: float
    flops_per_s: float


def decode_rates(engine: Engine) -> Rates:
    """Of a step with all rows in flight; measured once per process, in about a second."""
    sizes, of = engine.sizes, engine.decoding
    return _decode_rates(of.model, sizes.units(sizes.prompts[0]) * sizes.each // sizes.shards, of.layout.size("mlp"))


@cache
def _decode_rates(model: ModelConfig, rows: int, shards: int) -> Rates:
    # The head is left out: with a large vocabulary it would not fit beside the policy.
    nbytes = matmul_params(model) * jnp.dtype(model.compute).itemsize // shards
    products = [("forward", rows, k, n) for k, n in layer_shapes(model, shards)]
    return Rates(copy_bandwidth(min(nbytes, 2**28), 0.1), matmul_rate(products, model.compute, 0.1))


def layer_shapes(model: ModelConfig, shards: int) -> list[tuple[int, int]]:
    """(inputs, outputs) of a layer's matrices on one of `shards` devices that split them."""
    (d, packed, _), (heads, _, _), (_, up, _), (down, _, _), _ = weight_products(model)
    shapes = (d, packed // shards), (heads // shards, d), (d, up // shards), (down // shards, d)
    return [(max(k, 1), max(n, 1)) for k, n in shapes]


class UpdateRates(NamedTuple):
    """FLOPs a second of one device, at the shapes of an update."""

    layers: float
    head: float


def update_rates(model: ModelConfig, shape: Shape, layout: Layout, has_adapters: bool) -> UpdateRates:
    """Over the products of a layer and those of the head; measured once per process, in about a second.

    Args:
        shape: of a minibatch.
        layout: of training.
        has_adapters: the matrices themselves are frozen, and have no gradient.
    """
    tokens = shape.rows // shape.parts // layout.size("rows") * shape.slots
    forms = ("forward", "dx") if has_adapters else ("forward", "dx", "dw")
    most = MOST_ROWS_ON_CPU if layout.on_cpu else MOST_ROWS
    return measure_update(model, min(tokens, most), layout.size("mlp"), forms)


@cache
def measure_update(
    model: ModelConfig, rows: int, shards: int, forms: tuple[str, ...] = ("forward", "dx", "dw"), seconds: float = 0.1
) -> UpdateRates:
    """With `rows` tokens through matrices that `shards` devices split; the forms as in `ceilings.FORMS`."""

    def rate(shapes: list[tuple[int, int]]) -> float:
        products = [(form, rows, min(k, WIDEST), min(n, WIDEST)) for k, n in shapes for form in forms]
        return matmul_rate(products, model.compute, seconds)

    return UpdateRates(rate(layer_shapes(model, shards)), rate([(model.d_model, max(model.vocab_size // shards, 1))]))


def least_seconds(flops: TrainFlops, rates: UpdateRates, devices: int) -> float:
    """Of products alone at the measured rates, nothing waited for; attention at that of the layers."""
    return ((flops.layers + flops.attention) / rates.layers + flops.head / rates.head) / devices


def describe_updates(flops: TrainFlops, seconds: float, rates: UpdateRates, layout: Layout) -> dict[str, float]:
    """How near updates that took `seconds` together came to what the devices can do.

    `update/ceiling_fraction`: `least_seconds` of the time they took. `update/mfu`: model FLOPs (`train_flops`) over the time and
    the maker's bf16 peak of all devices, whatever the compute dtype; left out where that is not known. The first step's time holds
    the compilation.

    Args:
        rates: `update_rates`.
        layout: of training.
    """
    devices = layout.mesh.devices
    chip = chips.known(devices.flat[0].device_kind)
    least = least_seconds(flops, rates, devices.size)
    found = {"update/flops_per_s": sum(flops) / seconds, "update/ceiling_fraction": least / seconds}
    return found | ({"update/mfu": sum(flops) / (seconds * chip.flops * devices.size)} if chip else {})

"""The device mesh that generation and training share."""

import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jaxrl_llm.parallel.config import AXES


def make_mesh(sizes: tuple[int, ...], devices: list | None = None) -> Mesh:
    """Return a (data, fsdp, tensor, expert) mesh over `devices` (by default all of the job); missing sizes are 1.

    The axes are Auto: one model function serves both layouts, and the compiler inserts the collectives, which `tests/tpu_aot`
    counts. An axis may be part of a physical axis of a TPU slice, e.g. 2 of 4; `jax.make_mesh` refuses that except on v5e.
    """
    sizes = (*sizes, *(1,) * (len(AXES) - len(sizes)))
    devices = (jax.devices() if devices is None else devices)[: math.prod(sizes)]
    placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))

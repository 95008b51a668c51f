"""The one mesh that hosts generation and training."""

import jax
from jax.sharding import AxisType, Mesh

from jaxrl_llm.parallel.config import AXES


def make_mesh(sizes: tuple[int, ...], devices: list | None = None) -> Mesh:
    """A (data, fsdp, tensor, expert) mesh over `devices` (all of the job's by default); sizes left out are 1.

    The axes are Auto: one model function then serves both layouts, and the compiler inserts the collectives,
    which `tests/tpu_aot` counts. (`jax.make_mesh` would make them Explicit.)
    """
    sizes = (*sizes, *(1,) * (len(AXES) - len(sizes)))
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)

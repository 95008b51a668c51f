"""The device mesh that generation and training share."""

from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jaxrl_llm.errors import UserError
from jaxrl_llm.parallel.config import AXES, MeshConfig, resolve
from jaxrl_llm.parallel.program_cache import use_program_cache


def make_mesh(
    data: int = 1, fsdp: int = -1, tensor: int = 1, expert: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Return a mesh with the axes data, fsdp, tensor and expert; -1, on one of them, takes the devices that are left.

        mesh = rl.make_mesh(fsdp=-1)               # parameters sharded over all devices
        mesh = rl.make_mesh(fsdp=4, tensor=2)      # eight devices

    The axes are Auto: one model function serves both layouts, and the compiler inserts the collectives, which `tests/aot`
    counts. An axis may be part of a physical axis of a TPU slice, e.g. 2 of 4; `jax.make_mesh` refuses that except on v5e.

    The programs that are compiled for a mesh are kept for later runs: `parallel.program_cache`.

    Args:
        data, fsdp, tensor, expert: devices per axis, as in `MeshConfig`.
        devices: to be used, all of them; None: all of the job.

    Raises:
        UserError: a size is out of range, or the sizes do not fit the number of devices.
    """
    use_program_cache()
    devices = jax.devices() if devices is None else list(devices)
    asked = MeshConfig(data, fsdp, tensor, expert)
    for axis, size in zip(AXES, asked.sizes(), strict=True):
        if size != -1 and size < 1:
            raise UserError(f"mesh.{axis}: got {size}, want 1 or more, or -1 for what is left")
    sizes, wrong = resolve(asked, len(devices))
    if wrong:
        raise UserError("\n".join(wrong))
    placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))

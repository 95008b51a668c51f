"""Config of the mesh: devices per axis."""

from dataclasses import dataclass
from math import isqrt, prod
from typing import Annotated

from pydantic import AfterValidator, ConfigDict
from pydantic_core import PydanticCustomError

AXES = ("data", "fsdp", "tensor", "expert")


def check_axis_size(size: int) -> int:
    if size != -1 and size < 1:
        raise PydanticCustomError("axis_size", "1 or more, or -1 for what is left")
    return size


AxisSize = Annotated[int, AfterValidator(check_axis_size)]


@dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each axis; -1, at most once, takes the remaining ones."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    data: AxisSize = 1
    """Replicas of the training state. Batch rows are sharded over `data`, `fsdp` and `expert`."""
    fsdp: AxisSize = -1
    """Shards of parameters and optimizer state in training; further replicas of the policy in decoding."""
    tensor: AxisSize = 1
    """Shards of heads, MLP and vocabulary, in training and decoding."""
    expert: AxisSize = 1
    """Shards of the experts, in training and decoding; for all other parameters further replicas with different rows."""

    def sizes(self) -> tuple[int, ...]:
        """Sizes in the order of AXES."""
        return (self.data, self.fsdp, self.tensor, self.expert)


def resolve(mesh: MeshConfig, num_devices: int) -> tuple[tuple[int, ...] | None, list[str]]:
    """Return the sizes with -1 replaced, or None, and error messages: requested, found, sizes that work."""
    sizes = mesh.sizes()
    if sizes.count(-1) > 1:
        return None, [f"mesh: got {dict(zip(AXES, sizes, strict=True))}, want -1 on one axis at most"]
    fixed = prod(n for n in sizes if n != -1)
    if -1 in sizes:
        if num_devices % fixed:
            return None, [_does_not_fit(sizes, fixed, num_devices)]
        return tuple(num_devices // fixed if n == -1 else n for n in sizes), []
    if fixed != num_devices:
        return None, [_does_not_fit(sizes, fixed, num_devices)]
    return sizes, []


def _does_not_fit(sizes: tuple[int, ...], fixed: int, num_devices: int) -> str:
    requested = ", ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
    works = ", ".join(str(n) for n in divisors(num_devices))
    return (
        f"mesh: asked for {requested} (a product of {fixed}), found {num_devices} devices; "
        f"the product must {'divide' if -1 in sizes else 'be'} {num_devices}, sizes that work on an axis: {works}"
    )


def divisors(n: int) -> list[int]:
    """Divisors of n, ascending."""
    small = [d for d in range(1, isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d < n]

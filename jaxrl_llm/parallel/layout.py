"""Layouts: the mesh axes over which each logical axis is sharded. A jit with other shardings moves parameters between them."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl_llm.parallel.config import AXES, MeshConfig, resolve

Axes = tuple[str | None, ...]
Rules = Mapping[str, str | tuple[str, ...] | None]

# `tensor` shards the same dimensions in TRAIN and DECODE, so switching takes one all-gather over `fsdp` per parameter.
TRAIN: Rules = MappingProxyType(
    {
        "rows": ("data", "fsdp", "expert"),
        # Rows of an array whose width is sharded as `embed`.
        "rows_beside_embed": ("data", "expert"),
        "embed": "fsdp",
        "heads": "tensor",
        "mlp": "tensor",
        "vocab": "tensor",
        "expert": "expert",
        "layers": None,
    }
)
DECODE: Rules = MappingProxyType({**TRAIN, "embed": None, "rows_beside_embed": TRAIN["rows"]})
# `fsdp` shards the dimensions of `tensor`, as the minor axis: in this order switching from TRAIN takes one all-to-all per
# parameter.
WIDE: Rules = MappingProxyType(
    {
        **DECODE,
        **dict.fromkeys(("rows", "rows_beside_embed"), ("data", "expert")),
        **dict.fromkeys(("heads", "mlp", "vocab"), ("tensor", "fsdp")),
    }
)


@dataclass(frozen=True)
class Layout:
    """A mesh and the rules for sharding logical axes on it. Hashable, so it can be a static argument of jit."""

    mesh: Mesh
    rules: Rules = dataclasses.field(hash=False)

    def sharding(self, axes: Axes) -> NamedSharding:
        """Sharding of an array with these logical axes; None and trailing axes are not sharded."""
        return NamedSharding(self.mesh, PartitionSpec(*(None if a is None else self.rules[a] for a in axes)))

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Constrain `x` to this layout inside a jit."""
        return jax.lax.with_sharding_constraint(x, self.sharding(axes))

    def size(self, axis: str) -> int:
        """Number of shards of a logical axis."""
        names = self.rules[axis] or ()
        return math.prod(self.mesh.shape[name] for name in ((names,) if isinstance(names, str) else names))

    def for_decode(self, choice: str | MeshConfig) -> "Layout":
        """Layout of the policy on the same devices: `replicated` over fsdp, `wide`, or a separate mesh config."""
        if isinstance(choice, str):
            return Layout(self.mesh, {"replicated": DECODE, "wide": WIDE}[choice])
        sizes, _ = resolve(choice, self.mesh.size)
        # Devices in the same order, so that one jit can read arrays of one mesh and return them on the other.
        devices = self.mesh.devices.reshape(sizes)
        return Layout(Mesh(devices, AXES, axis_types=self.mesh.axis_types), DECODE)

    @property
    def on_cpu(self) -> bool:
        return self.mesh.devices.flat[0].platform == "cpu"

    @property
    def on_gpu(self) -> bool:
        return self.mesh.devices.flat[0].platform == "gpu"

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

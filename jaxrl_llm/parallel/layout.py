"""Layouts: which mesh axis splits which logical axis. Moving parameters between layouts is one jit with other shardings."""

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

# `tensor` splits the same dimensions in both, so a switch is one all-gather over `fsdp` per parameter and nothing else.
TRAIN: Rules = MappingProxyType(
    {
        "rows": ("data", "fsdp", "expert"),
        # Of an array whose width is split over `embed` as well.
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
# `fsdp` splits what `tensor` splits, behind it: in this order a switch from TRAIN is one all-to-all per parameter.
WIDE: Rules = MappingProxyType(
    {
        **DECODE,
        **dict.fromkeys(("rows", "rows_beside_embed"), ("data", "expert")),
        **dict.fromkeys(("heads", "mlp", "vocab"), ("tensor", "fsdp")),
    }
)


@dataclass(frozen=True)
class Layout:
    """A mesh and the rules by which logical axes lie on it. Hashable by identity of its rules, so it may be static in jit."""

    mesh: Mesh
    rules: Rules = dataclasses.field(hash=False)

    def sharding(self, axes: Axes) -> NamedSharding:
        """Where an array with these logical axes lies; None and unnamed axes are not split."""
        return NamedSharding(self.mesh, PartitionSpec(*(None if a is None else self.rules[a] for a in axes)))

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Hold `x` to this layout inside a jit."""
        return jax.lax.with_sharding_constraint(x, self.sharding(axes))

    def size(self, axis: str) -> int:
        """Number of shards that the logical axis is split into."""
        names = self.rules[axis] or ()
        return math.prod(self.mesh.shape[name] for name in ((names,) if isinstance(names, str) else names))

    def for_decode(self, choice: str | MeshConfig) -> "Layout":
        """Where the policy lies over the same devices: `replicated` over fsdp, `wide`, or on axes of its own."""
        if isinstance(choice, str):
            return Layout(self.mesh, {"replicated": DECODE, "wide": WIDE}[choice])
        sizes, _ = resolve(choice, self.mesh.size)
        # Devices in the same order: a jit may then read arrays of one mesh and leave them on the other.
        devices = self.mesh.devices.reshape(sizes)
        return Layout(Mesh(devices, AXES, axis_types=self.mesh.axis_types), DECODE)

    @property
    def on_cpu(self) -> bool:
        return self.mesh.devices.flat[0].platform == "cpu"

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

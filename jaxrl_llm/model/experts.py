"""Mixture of experts in place of the MLP: each token is routed to its k most probable experts; no token is dropped.

Rows are sorted by expert and multiplied group by group. The block is written for one device of the mesh: experts are sharded over
`expert`, their width over `tensor`. Each expert shard gathers the rows of all shards, computes those routed to its own experts, and
scatters the sums.

Dimensions: N rows, E experts of this device, k experts per token, M = N k assignments of a row to an expert.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.grouped_matmul import contract_groups
from jaxrl_llm.model.linear import contract
from jaxrl_llm.model.mlp import gated
from jaxrl_llm.parallel.layout import Layout


def mixture(
    layer: dict[str, Array], h: Float[Array, "B T D"], cfg: ModelConfig, layout: Layout
) -> Float[Array, "B T D"]:
    """Weighted sum of each token's experts.

    Args:
        layer: the layer's parameters.
        h: normalized activations.
        cfg: the model.
        layout: how activations and experts are sharded.
    """
    axes = {"h": ("rows", None, None), "scores": ("rows", None, None)}
    axes |= {"gate_up": (None, "expert", "embed", "mlp"), "down": ("expert", "mlp", "embed")}
    specs = {name: layout.sharding(a).spec for name, a in axes.items()}

    def block(shards: dict[str, Array]) -> Array:
        return _on_device(**{name: _vary(x, specs[name], layout) for name, x in shards.items()}, cfg=cfg, layout=layout)

    on_mesh = jax.shard_map(block, mesh=layout.mesh, in_specs=(specs,), out_specs=specs["h"])
    values = {"h": h, "scores": contract(h, layer["router"]), "gate_up": layer["gate_up"], "down": layer["down"]}
    return on_mesh(values).astype(h.dtype)


def _vary(x: Array, spec: PartitionSpec, layout: Layout) -> Array:
    """Mark a shard as varying over all mesh axes: its gradient is summed here over the axes it is not split by."""
    split = {axis for part in spec if part for axis in ((part,) if isinstance(part, str) else part)}
    return lax.pcast(x, tuple(axis for axis in layout.mesh.axis_names if axis not in split), to="varying")


class Routing(NamedTuple):
    """The experts of each row, most probable first."""

    weight: Float[Array, "N k"]
    """f32."""
    expert: Int[Array, "N k"]
    """Index among all experts."""


def route(scores: Float[Array, "N all"], cfg: ModelConfig) -> Routing:
    """Route each row to its k most probable experts; ties go to the lower index."""
    weight, expert = lax.top_k(jax.nn.softmax(scores.astype(jnp.float32), axis=-1), cfg.experts_per_token)
    return Routing(weight / jnp.sum(weight, axis=-1, keepdims=True) if cfg.norm_top_k else weight, expert)


def _on_device(h: Array, scores: Array, gate_up: Array, down: Array, *, cfg: ModelConfig, layout: Layout) -> Array:
    """The block on one device: [b T D] to [b T D], f32; on GPUs in the dtype of `h`, see `products.rounded_dot`."""
    sent = h.dtype if layout.on_gpu else jnp.float32
    rows = h.reshape(-1, h.shape[-1]), route(scores.reshape(-1, cfg.experts), cfg)
    embed = layout.rules["embed"] if layout.size("embed") > 1 else None
    if layout.size("expert") == 1:
        out = lax.psum(_own_experts(*rows, gate_up, down, 0, embed, cfg).astype(sent), layout.rules["mlp"])
    else:
        axis = layout.rules["expert"]
        rows = jax.tree.map(lambda x: lax.all_gather(x, axis, tiled=True), rows)
        out = _own_experts(*rows, gate_up, down, lax.axis_index(axis), embed, cfg)
        out = lax.psum_scatter(lax.psum(out.astype(sent), layout.rules["mlp"]), axis, tiled=True)
    return out.reshape(h.shape)


def _own_experts(
    h: Float[Array, "N D"],
    routing: Routing,
    gate_up: Float[Array, "2 E D F"],
    down: Float[Array, "E F D"],
    shard: int | Int[Array, ""],
    embed: str | None,
    cfg: ModelConfig,
) -> Float[Array, "N D"]:
    """Sum of weight * expert(row) over this device's experts and its shard of their width, f32."""
    assignment = assign(routing.expert, down.shape[0], shard)
    gate, up = contract_groups(_gather_rows(h, assignment), gate_up, assignment.counts, embed, 2)
    (out,) = contract_groups(gated(gate, up, cfg).astype(h.dtype), down[None], assignment.counts, embed, 3)
    choices = _unsort(out, assignment).reshape(*routing.weight.shape, -1)
    return jnp.sum(choices * routing.weight[..., None], axis=1)


class Assignment(NamedTuple):
    """Assignments sorted by expert; assignment a is choice a % k of row a // k."""

    order: Int[Array, " M"]
    """Assignment at each sorted position. Those to experts of other shards come last."""
    position: Int[Array, " M"]
    """Sorted position of each assignment."""
    counts: Int[Array, " E"]
    """Number of assignments per expert of this shard."""


def assign(expert: Int[Array, "N k"], count: int, shard: int | Int[Array, ""]) -> Assignment:
    """Sort assignments by expert, for the shard of experts shard * count to (shard + 1) * count - 1."""
    own = expert.reshape(-1) - shard * count
    own = jnp.where((own >= 0) & (own < count), own, count)
    order = jnp.argsort(own, stable=True)
    return Assignment(order, jnp.argsort(order), jnp.sum(own[:, None] == jnp.arange(count), axis=0, dtype=jnp.int32))


# The gradient of a gather is a scatter, which adds in any order and is slow on a TPU; of a permutation it is the inverse gather.


@jax.custom_vjp
def _gather_rows(h: Float[Array, "N D"], assignment: Assignment) -> Float[Array, "M D"]:
    """Rows in the order of sorted assignments."""
    return h[assignment.order // (len(assignment.order) // len(h))]


def _gather_rows_backward(saved: tuple[Assignment, int], g: Array) -> tuple[Array, None]:
    assignment, rows = saved
    total = jnp.sum(g[assignment.position].reshape(rows, -1, g.shape[-1]), axis=1, dtype=jnp.float32)
    return total.astype(g.dtype), None


_gather_rows.defvjp(lambda h, assignment: (_gather_rows(h, assignment), (assignment, len(h))), _gather_rows_backward)


@jax.custom_vjp
def _unsort(x: Float[Array, "M D"], assignment: Assignment) -> Float[Array, "M D"]:
    """Undo the sorting: assignments in the order of rows."""
    return x[assignment.position]


_unsort.defvjp(
    lambda x, assignment: (_unsort(x, assignment), assignment), lambda assignment, g: (g[assignment.order], None)
)

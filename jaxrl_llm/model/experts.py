"""A mixture of experts in the place of the MLP: each token goes to the k experts that its router likes best; none is dropped.

Rows are sorted by expert and multiplied group by group. The block is written for one device of the mesh: experts are split over
`expert`, their width over `tensor`. Each shard of experts sees the rows of all of them, works on those that chose its own, and
gives back sums. Letters: N rows, E experts of this device, k experts a token, M = N k assignments of a row to an expert.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.grouped import contract_groups
from jaxrl_llm.model.linear import contract
from jaxrl_llm.model.mlp import gated
from jaxrl_llm.parallel.layout import Layout


def mixture(
    layer: dict[str, Array], h: Float[Array, "B T D"], cfg: ModelConfig, layout: Layout
) -> Float[Array, "B T D"]:
    """Each token's experts, weighted and added up."""
    axes = {"h": ("rows", None, None), "scores": ("rows", None, None)}
    axes |= {"gate_up": (None, "expert", "embed", "mlp"), "down": ("expert", "mlp", "embed")}
    specs = {name: layout.sharding(a).spec for name, a in axes.items()}

    def block(shards: dict[str, Array]) -> Array:
        return _on_device(**{name: _vary(x, specs[name], layout) for name, x in shards.items()}, cfg=cfg, layout=layout)

    on_mesh = jax.shard_map(block, mesh=layout.mesh, in_specs=(specs,), out_specs=specs["h"])
    values = {"h": h, "scores": contract(h, layer["router"]), "gate_up": layer["gate_up"], "down": layer["down"]}
    return on_mesh(values).astype(h.dtype)


def _vary(x: Array, spec: PartitionSpec, layout: Layout) -> Array:
    """A shard as what may differ along all axes of the mesh: its gradient is summed here, over those that it is not split by."""
    split = {axis for part in spec if part for axis in ((part,) if isinstance(part, str) else part)}
    return lax.pcast(x, tuple(axis for axis in layout.mesh.axis_names if axis not in split), to="varying")


class Routing(NamedTuple):
    """Which experts each row goes to, the likeliest first."""

    weight: Float[Array, "N k"]
    """f32."""
    expert: Int[Array, "N k"]
    """Its number among all experts."""


def route(scores: Float[Array, "N all"], cfg: ModelConfig) -> Routing:
    """To the k likeliest of all experts; of equals to the lower number."""
    weight, expert = lax.top_k(jax.nn.softmax(scores.astype(jnp.float32), axis=-1), cfg.experts_per_token)
    return Routing(weight / jnp.sum(weight, axis=-1, keepdims=True) if cfg.norm_top_k else weight, expert)


def _on_device(h: Array, scores: Array, gate_up: Array, down: Array, *, cfg: ModelConfig, layout: Layout) -> Array:
    """[b T D] of this device to [b T D], f32."""
    rows = h.reshape(-1, h.shape[-1]), route(scores.reshape(-1, cfg.experts), cfg)
    embed = layout.rules["embed"] if layout.size("embed") > 1 else None
    if layout.size("expert") == 1:
        out = lax.psum(_own_experts(*rows, gate_up, down, 0, embed, cfg), layout.rules["mlp"])
    else:
        axis = layout.rules["expert"]
        rows = jax.tree.map(lambda x: lax.all_gather(x, axis, tiled=True), rows)
        out = _own_experts(*rows, gate_up, down, lax.axis_index(axis), embed, cfg)
        out = lax.psum_scatter(lax.psum(out, layout.rules["mlp"]), axis, tiled=True)
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
    """The sum over this device's experts, with the part of their width that it has, of weight * expert(row). f32."""
    to = assign(routing.expert, down.shape[0], shard)
    gate, up = contract_groups(_spread(h, to), gate_up, to.counts, embed, 2)
    (out,) = contract_groups(gated(gate, up, cfg).astype(h.dtype), down[None], to.counts, embed, 3)
    choices = _unsort(out, to).reshape(*routing.weight.shape, -1)
    return jnp.sum(choices * routing.weight[..., None], axis=1)


class Assignment(NamedTuple):
    """Assignments sorted by expert; number a is the choice a % k of row a // k."""

    order: Int[Array, " M"]
    """Which assignment stands at each place. Those to experts of other shards come last."""
    place: Int[Array, " M"]
    """At which place each assignment stands."""
    counts: Int[Array, " E"]
    """Assignments to each expert of this shard."""


def assign(expert: Int[Array, "N k"], count: int, shard: int | Int[Array, ""]) -> Assignment:
    """Sort by expert, for the shard that has experts shard * count and on."""
    own = expert.reshape(-1) - shard * count
    own = jnp.where((own >= 0) & (own < count), own, count)
    order = jnp.argsort(own, stable=True)
    return Assignment(order, jnp.argsort(order), jnp.sum(own[:, None] == jnp.arange(count), axis=0, dtype=jnp.int32))


# A gather's gradient is a scatter, which adds in any order and is slow on a TPU. Of a permutation it is the inverse gather.


@jax.custom_vjp
def _spread(h: Float[Array, "N D"], to: Assignment) -> Float[Array, "M D"]:
    """Rows at the places of their assignments."""
    return h[to.order // (len(to.order) // len(h))]


def _spread_backward(saved: tuple[Assignment, int], g: Array) -> tuple[Array, None]:
    to, rows = saved
    return jnp.sum(g[to.place].reshape(rows, -1, g.shape[-1]), axis=1, dtype=jnp.float32).astype(g.dtype), None


_spread.defvjp(lambda h, to: (_spread(h, to), (to, len(h))), _spread_backward)


@jax.custom_vjp
def _unsort(x: Float[Array, "M D"], to: Assignment) -> Float[Array, "M D"]:
    """Back in the order of rows."""
    return x[to.place]


_unsort.defvjp(lambda x, to: (_unsort(x, to), to), lambda to, g: (g[to.order], None))

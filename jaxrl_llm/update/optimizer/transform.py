"""Gradients to changes of parameters: clip -> direction -> weight decay -> learning rate, of optax's parts.

A parameter is known by its path, `layers/qkv`; under `layers` the first axis holds the layers and counts as no axis of its own.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from optax.contrib import MuonDimensionNumbers

from jaxrl_llm.errors import UserError
from jaxrl_llm.types import PyTree
from jaxrl_llm.update.optimizer.config import Adafactor, AdamW, GroupConfig, Lion, Muon, Optimizer, OwnSchedule

# (inputs, outputs) of the matrices that Muon makes orthogonal, from the last axis; axes that are in neither are many matrices:
# layers, experts, gate and up. The queries, keys and values of a layer are one matrix.
MATRICES = {
    "qkv": MuonDimensionNumbers((-4,), (-3, -2, -1)),
    "out": MuonDimensionNumbers((-4, -3, -2), (-1,)),
    "gate_up": MuonDimensionNumbers((-2,), (-1,)),
    "down": MuonDimensionNumbers((-2,), (-1,)),
}


def path_of(keys: tuple) -> str:
    """`layers/qkv`, of the keys of a leaf of nested dicts; `layers/qkv/pairs/q/a` of an adapter's."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in keys)


def names(params: PyTree) -> tuple[str, ...]:
    """Paths of the leaves, in jax's order."""
    return tuple(path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params))


def make_optimizer(cfg: Optimizer) -> optax.GradientTransformation:
    """Of any tree of parameters, stacked layers under `layers`. `init` raises UserError for a group that fits none of them."""
    return optax.chain(
        optax.GradientTransformation(
            partial(_refuse_idle_groups, cfg), lambda grads, state, _: (_clip(cfg, grads), state)
        ),
        DIRECTIONS[type(cfg)](cfg),
        optax.stateless(partial(_decay_and_scale, cfg)),
        # optax counts from 0, and a first update of size 0 would be wasted.
        optax.scale_by_learning_rate(lambda count: learning_rate(cfg, count + 1)),
    )


def learning_rate(cfg: Optimizer, update: Array) -> Array:
    """Of update 1, 2, ...: up for `warmup_steps`, level for `hold_steps`, down for `decay_steps`, level; or your own function's."""
    if isinstance(cfg.schedule, OwnSchedule):
        return _own_rate(cfg.schedule, update)
    rise = jnp.minimum(update / max(cfg.warmup_steps, 1), 1)
    way = jnp.clip((update - cfg.warmup_steps - cfg.hold_steps) / cfg.decay_steps, 0, 1) if cfg.decay_steps else 0.0
    left = {"linear": 1 - way, "cosine": (1 + jnp.cos(jnp.pi * way)) / 2, "sqrt": 1 - way**0.5}[cfg.schedule]
    return rise * (cfg.final_lr + (cfg.lr - cfg.final_lr) * left)


def _own_rate(schedule: OwnSchedule, update: Array) -> Array:
    found = schedule.traced("optimizer.schedule")(update)
    try:
        rate = jnp.asarray(found, jnp.float32)
    except (TypeError, ValueError):
        rate = None
    if rate is None or rate.shape:
        got = type(found).__name__ if rate is None else f"an array of {list(rate.shape)}"
        raise UserError(
            f"optimizer.schedule {schedule.function}: got {got}, want one number, the learning rate of an update"
        )
    return rate


def _adamw(cfg: AdamW) -> optax.GradientTransformation:
    return optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps)


def _lion(cfg: Lion) -> optax.GradientTransformation:
    return optax.scale_by_lion(cfg.b1, cfg.b2)


def _adafactor(cfg: Adafactor) -> optax.GradientTransformation:
    return optax.chain(
        optax.scale_by_factored_rms(decay_rate=cfg.decay_exponent, min_dim_size_to_factor=cfg.factor_from),
        optax.clip_by_block_rms(cfg.clip_rms),
        optax.scale_by_param_block_rms() if cfg.relative else optax.identity(),
    )


def _muon(cfg: Muon) -> optax.GradientTransformation:
    # The rate of -1 undoes the sign: what follows has a rate, a decay and groups of its own.
    return optax.contrib.muon(
        -1.0,
        ns_steps=cfg.iterations,
        beta=cfg.momentum,
        eps=cfg.eps,
        adam_b1=cfg.b1,
        adam_b2=cfg.b2,
        muon_weight_dimension_numbers=_matrices,
        consistent_rms=cfg.rms,
    )


DIRECTIONS = {AdamW: _adamw, Adafactor: _adafactor, Lion: _lion, Muon: _muon}


def _matrices(params: PyTree) -> PyTree:
    return jax.tree_util.tree_map_with_path(lambda keys, x: _matrix(path_of(keys).split("/"), x.ndim), params)


def _matrix(path: list[str], ndim: int) -> MuonDimensionNumbers | None:
    """None: no matrix of a layer. Adapters, [L *inputs rank] and [L rank *outputs], are two."""
    if "pairs" in path:
        cut = ndim - 1 if path[-1] == "a" else 2
        return MuonDimensionNumbers(tuple(range(1, cut)), tuple(range(cut, ndim)))
    return MATRICES.get(path[-1])


def _refuse_idle_groups(cfg: Optimizer, params: PyTree) -> optax.EmptyState:
    paths = names(params)
    for g in sorted(set(range(len(cfg.groups))) - set(_group_numbers(cfg, paths))):
        raise UserError(
            f"update.optimizer.groups.{g}.match: got {cfg.groups[g].match!r}, want a pattern that fits one of {', '.join(paths)} "
            "that no group before it has"
        )
    return optax.EmptyState()


def _clip(cfg: Optimizer, grads: PyTree) -> PyTree:
    """The global norm of each group, and that of the parameters in none, is held at `max_grad_norm`: the gradient of a critic does
    not make the policy's smaller."""
    leaves, treedef = jax.tree.flatten(grads)
    of = _group_numbers(cfg, names(grads))
    norms = {g: optax.tree.norm([x for x, other in zip(leaves, of, strict=True) if other == g]) for g in set(of)}

    def clip(x: Array, norm: Array) -> Array:
        return jnp.where(norm < cfg.max_grad_norm, x, x / norm * cfg.max_grad_norm)

    return treedef.unflatten([clip(x, norms[g]) for x, g in zip(leaves, of, strict=True)])


def _group_numbers(cfg: Optimizer, paths: tuple[str, ...]) -> list[int]:
    """Each parameter's place in `cfg.groups`; -1 where no pattern fits."""
    return [next((g for g, group in enumerate(cfg.groups) if re.match(group.match, path)), -1) for path in paths]


def _decay_and_scale(cfg: Optimizer, changes: PyTree, params: PyTree) -> PyTree:
    """scale * (change + decay * parameter), by the group's numbers."""
    groups = (*cfg.groups, GroupConfig(match=""))
    of = iter(_group_numbers(cfg, names(params)))

    def apply(keys: tuple, change: Array, param: Array) -> Array:
        group, path = groups[next(of)], path_of(keys)
        decay = cfg.weight_decay if group.weight_decay is None else group.weight_decay
        if _is_vector(path, param) or (path.endswith("embed") and not cfg.decay_embedding):
            decay = 0.0
        return group.lr_scale * (change + decay * param)

    return jax.tree_util.tree_map_with_path(apply, changes, params)


def _is_vector(path: str, param: Array) -> bool:
    """A norm or a bias. That of queries, keys and values is as many-dimensional as the heads it lies beside."""
    return param.ndim - ("layers" in path.split("/")) < 2 or path.endswith("bias")

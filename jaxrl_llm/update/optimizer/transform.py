"""Optimizers as optax transformations: clip -> direction -> weight decay -> learning rate.

A parameter is identified by its path, `layers/qkv`; under `layers` the first axis is that of the stacked layers.
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

# (inputs, outputs) of the matrices that Muon orthogonalizes, from the last axis; axes in neither are batches of matrices: layers,
# experts, gate and up. The queries, keys and values of a layer are one matrix.
MATRICES = {
    "qkv": MuonDimensionNumbers((-4,), (-3, -2, -1)),
    "out": MuonDimensionNumbers((-4, -3, -2), (-1,)),
    "gate_up": MuonDimensionNumbers((-2,), (-1,)),
    "down": MuonDimensionNumbers((-2,), (-1,)),
}


def path_of(keys: tuple) -> str:
    """Return the path of a leaf from its keys: `layers/qkv`, or `layers/qkv/pairs/q/a` for an adapter."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in keys)


def parameter_paths(params: PyTree) -> tuple[str, ...]:
    """Return the paths of the leaves, in jax's order."""
    return tuple(path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params))


def make_optimizer(cfg: Optimizer) -> optax.GradientTransformation:
    """Return the optimizer for any parameter tree with stacked layers under `layers`.

    Its `init` raises UserError for a parameter group that matches nothing.
    """
    return optax.chain(
        optax.GradientTransformation(
            partial(_refuse_idle_groups, cfg), lambda grads, state, _: (_clip(cfg, grads), state)
        ),
        DIRECTIONS[type(cfg)](cfg),
        optax.stateless(partial(_decay_and_scale, cfg)),
        # optax counts from 0, which would waste the first update of a warm-up.
        optax.scale_by_learning_rate(lambda count: learning_rate(cfg, count + 1)),
    )


def learning_rate(cfg: Optimizer, update: Array) -> Array:
    """Return the learning rate of update 1, 2, ...: warm-up, hold, decay, constant; or that of the custom schedule."""
    if isinstance(cfg.schedule, OwnSchedule):
        return _own_rate(cfg.schedule, update)
    rise = jnp.minimum(update / max(cfg.warmup_steps, 1), 1)
    progress = (
        jnp.clip((update - cfg.warmup_steps - cfg.hold_steps) / cfg.decay_steps, 0, 1) if cfg.decay_steps else 0.0
    )
    remaining = {"linear": 1 - progress, "cosine": (1 + jnp.cos(jnp.pi * progress)) / 2, "sqrt": 1 - progress**0.5}[
        cfg.schedule
    ]
    return rise * (cfg.final_lr + (cfg.lr - cfg.final_lr) * remaining)


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
    # The rate of -1 undoes the sign: learning rate, decay and groups follow in the chain.
    return optax.contrib.muon(
        -1.0,
        ns_steps=cfg.iterations,
        beta=cfg.momentum,
        eps=cfg.eps,
        adam_b1=cfg.b1,
        adam_b2=cfg.b2,
        muon_weight_dimension_numbers=_matrix_dimensions,
        consistent_rms=cfg.rms,
    )


DIRECTIONS = {AdamW: _adamw, Adafactor: _adafactor, Lion: _lion, Muon: _muon}


def _matrix_dimensions(params: PyTree) -> PyTree:
    return jax.tree_util.tree_map_with_path(lambda keys, x: _matrix_dimension(path_of(keys).split("/"), x.ndim), params)


def _matrix_dimension(path: list[str], ndim: int) -> MuonDimensionNumbers | None:
    """Return Muon's dimensions; None if not a matrix of a layer. Adapters are two: [L *inputs rank] and [L rank *outputs]."""
    if "pairs" in path:
        cut = ndim - 1 if path[-1] == "a" else 2
        return MuonDimensionNumbers(tuple(range(1, cut)), tuple(range(cut, ndim)))
    return MATRICES.get(path[-1])


def _refuse_idle_groups(cfg: Optimizer, params: PyTree) -> optax.EmptyState:
    paths = parameter_paths(params)
    for g in sorted(set(range(len(cfg.groups))) - set(_group_numbers(cfg, paths))):
        raise UserError(
            f"update.optimizer.groups.{g}.match: got {cfg.groups[g].match!r}, want a pattern that fits one of {', '.join(paths)} "
            "that no group before it has"
        )
    return optax.EmptyState()


def _clip(cfg: Optimizer, grads: PyTree) -> PyTree:
    """Clip the global norm of each group, and of the ungrouped parameters, to `max_grad_norm`: a critic's gradient does not shrink
    the policy's."""
    leaves, treedef = jax.tree.flatten(grads)
    of = _group_numbers(cfg, parameter_paths(grads))
    norms = {g: optax.tree.norm([x for x, other in zip(leaves, of, strict=True) if other == g]) for g in set(of)}

    def clip(x: Array, norm: Array) -> Array:
        return jnp.where(norm < cfg.max_grad_norm, x, x / norm * cfg.max_grad_norm)

    return treedef.unflatten([clip(x, norms[g]) for x, g in zip(leaves, of, strict=True)])


def _group_numbers(cfg: Optimizer, paths: tuple[str, ...]) -> list[int]:
    """Return each parameter's index in `cfg.groups`; -1 if no pattern matches."""
    return [next((g for g, group in enumerate(cfg.groups) if re.match(group.match, path)), -1) for path in paths]


def _decay_and_scale(cfg: Optimizer, changes: PyTree, params: PyTree) -> PyTree:
    """Return lr_scale * (change + decay * parameter), with the group's values."""
    groups = (*cfg.groups, GroupConfig(match=""))
    of = iter(_group_numbers(cfg, parameter_paths(params)))

    def apply(keys: tuple, change: Array, param: Array) -> Array:
        group, path = groups[next(of)], path_of(keys)
        decay = cfg.weight_decay if group.weight_decay is None else group.weight_decay
        if _is_vector(path, param) or (path.endswith("embed") and not cfg.decay_embedding):
            decay = 0.0
        return group.lr_scale * (change + decay * param)

    return jax.tree_util.tree_map_with_path(apply, changes, params)


def _is_vector(path: str, param: Array) -> bool:
    """Return whether a parameter is a norm or a bias; the bias of queries, keys and values has an axis for heads too."""
    return param.ndim - ("layers" in path.split("/")) < 2 or path.endswith("bias")

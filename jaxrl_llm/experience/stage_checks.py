"""Checks of the results of custom stages, at the call: otherwise an unreadable checkpoint would be found only at the resume."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxrl_llm.errors import UserError
from jaxrl_llm.types import Groups


def as_array(found: Any) -> np.ndarray:
    """Return what a custom stage returned as an array, of objects if it is none of numbers."""
    try:
        return np.asarray(found)
    except ValueError:
        return np.asarray(found, object)


def copied(state: Any) -> Any:
    """Return the state with its arrays copied, so that a custom stage that changes its arguments changes nothing else."""
    return jax.tree.map(lambda x: x.copy() if isinstance(x, np.ndarray) else x, state)


def checked_init(name: str, init: Callable[..., Any]) -> Callable[..., Any]:
    """Return `init` with its state converted to arrays. Raises UserError if a leaf is not numeric."""

    def call(*args: Any) -> Any:
        state = init(*args)
        arrays = [np.asarray(x) for x in _leaves(name, state)]
        if wrong := [x.dtype for x in arrays if x.dtype.kind not in "biuf"]:
            raise UserError(f"{name}: got a state that holds {wrong[0]}, want numbers and arrays of numbers alone")
        return jax.tree.unflatten(jax.tree.structure(state), arrays)

    return call


def checked_state(name: str, before: Any, state: Any) -> Any:
    """Return `state` cast to the dtypes of `before`. Raises UserError if its structure, a shape or the kind of a dtype differs:
    checkpoints fix them."""
    want, got = _leaves(name, before), [np.asarray(x) for x in _leaves(name, state)]
    same = jax.tree.structure(before) == jax.tree.structure(state)
    fits = [x.shape == y.shape and np.can_cast(y.dtype, x.dtype, "same_kind") for x, y in zip(want, got, strict=False)]
    if not same or not all(fits):
        described = [
            str(jax.tree.map(lambda x: f"{np.asarray(x).dtype}{list(np.shape(x))}", x)) for x in (state, before)
        ]
        raise UserError(
            f"{name}: got a state of {described[0]}, want one as before, {described[1]}: shapes and dtypes are fixed"
        )
    arrays = [y.astype(x.dtype) for x, y in zip(want, got, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(before), arrays)


def checked_tuple(name: str, found: Any, want: tuple[str, ...]) -> tuple[Any, ...]:
    """Return `found`. Raises UserError unless it is a tuple with one item per name in `want`."""
    if not (isinstance(found, tuple) and len(found) == len(want)):
        raise UserError(f"{name}: got {type(found).__name__}, want ({', '.join(want)})")
    return found


def checked_metrics(name: str, found: Any) -> dict[str, float]:
    """Return the metrics as floats. Raises UserError unless `found` maps names to numbers."""
    if not isinstance(found, Mapping):
        raise UserError(f"{name}: got {type(found).__name__} for metrics, want a dict of numbers, perhaps empty")
    metrics = {}
    for key, value in found.items():
        if not isinstance(key, str) or np.shape(value) or np.asarray(value).dtype.kind not in "biuf":
            raise UserError(f"{name}: got {value!r} for the metric {key!r}, want a name and one number")
        metrics[key] = float(value)
    return metrics


def checked_groups(name: str, found: Any, like: Groups) -> Groups:
    """Return `found`. Raises UserError unless it is Groups in the shapes and dtypes of `like`; it may have `reused` and
    `loss_weight` beside them."""
    if not isinstance(found, Groups):
        raise UserError(f"{name}: got {type(found).__name__}, want Groups")
    rows = np.zeros(len(like.keep), bool)
    optional = {"reused": rows, "loss_weight": rows.astype(np.float32)}
    whole = like.replace(**{field: x for field, x in optional.items() if getattr(found, field) is not None})
    want, given = (dict(jax.tree_util.tree_leaves_with_path(groups)) for groups in (whole, found))
    for path, x in want.items():
        y = np.asarray(given[path]) if path in given else None
        if y is None or (y.shape, y.dtype) != (x.shape, x.dtype):
            got = "nothing" if y is None else f"{y.dtype}{list(y.shape)}"
            where = f"groups{jax.tree_util.keystr(path)}"
            raise UserError(f"{name}: got {got} for {where}, want {x.dtype}{list(x.shape)}: a step has fixed shapes")
    return found


def _leaves(name: str, state: Any) -> list[Any]:
    try:
        return jax.tree.leaves(state)
    except ValueError as error:
        raise UserError(f"{name}: got a state that is no tree ({error}), want dicts with keys of one type") from error

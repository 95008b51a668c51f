"""What stages of your own give, checked where they give it: a checkpoint that cannot be read again is found too late."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxrl_llm.errors import UserError
from jaxrl_llm.types import Groups


def first_state(name: str, init: Callable[..., Any]) -> Callable[..., Any]:
    """`init`, whose state is made of arrays. Raises UserError where it holds anything but numbers."""

    def call(*args: Any) -> Any:
        state = init(*args)
        arrays = [np.asarray(x) for x in _leaves(name, state)]
        if wrong := [x.dtype for x in arrays if x.dtype.kind not in "biuf"]:
            raise UserError(f"{name}: got a state that holds {wrong[0]}, want numbers and arrays of numbers alone")
        return jax.tree.unflatten(jax.tree.structure(state), arrays)

    return call


def next_state(name: str, before: Any, state: Any) -> Any:
    """`state` in the dtypes of the one before. Raises UserError where its structure or shapes are others, or a dtype of another
    kind: those of a checkpoint are fixed."""
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


def parts_of(name: str, found: Any, want: tuple[str, ...]) -> tuple[Any, ...]:
    """`found`, which must be as many things as `want` names."""
    if not (isinstance(found, tuple) and len(found) == len(want)):
        raise UserError(f"{name}: got {type(found).__name__}, want ({', '.join(want)})")
    return found


def metrics_of(name: str, found: Any) -> dict[str, float]:
    """Metrics as floats."""
    if not isinstance(found, Mapping):
        raise UserError(f"{name}: got {type(found).__name__} for metrics, want a dict of numbers, perhaps empty")
    metrics = {}
    for key, value in found.items():
        if not isinstance(key, str) or np.shape(value) or np.asarray(value).dtype.kind not in "biuf":
            raise UserError(f"{name}: got {value!r} for the metric {key!r}, want a name and one number")
        metrics[key] = float(value)
    return metrics


def groups_of(name: str, found: Any, like: Groups) -> Groups:
    """Groups in the shapes and dtypes of `like`."""
    if not isinstance(found, Groups):
        raise UserError(f"{name}: got {type(found).__name__}, want Groups")
    pairs = zip(jax.tree_util.tree_leaves_with_path(like), jax.tree.leaves(found), strict=False)
    wrong = [
        (path, x, np.asarray(y)) for (path, x), y in pairs if (np.shape(y), np.asarray(y).dtype) != (x.shape, x.dtype)
    ]
    for path, x, y in wrong[:1]:
        where = jax.tree_util.keystr(path)
        got = f"{y.dtype}{list(y.shape)}"
        raise UserError(f"{name}: got {got} for groups{where}, want {x.dtype}{list(x.shape)}: a step has fixed shapes")
    return found


def _leaves(name: str, state: Any) -> list[Any]:
    try:
        return jax.tree.leaves(state)
    except ValueError as error:
        raise UserError(f"{name}: got a state that is no tree ({error}), want dicts with keys of one type") from error

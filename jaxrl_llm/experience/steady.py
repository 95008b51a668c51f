"""States of parts of your own, checked where they are given: a checkpoint that cannot be read again is found too late."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxrl_llm.errors import UserError


def steady(name: str, function: Callable, gives: tuple[str, ...]) -> Callable:
    """`function`, whose first argument is a state, and which gives `gives`, the next state the first of them.

    Where it is called a UserError is raised that names it, if it gives anything else: not as many things, a state of other shapes
    than the one before, or metrics that are none.
    """

    def call(state: Any, *args: Any) -> Any:
        found = function(state, *args)
        if len(gives) > 1 and not (isinstance(found, tuple) and len(found) == len(gives)):
            raise UserError(f"{name}: got {type(found).__name__}, want ({', '.join(gives)})")
        before, after = described(state, name), described(found[0] if len(gives) > 1 else found, name)
        if before != after:
            raise UserError(
                f"{name}: got a state of {after}, want one as before, {before}: checkpoints have fixed shapes"
            )
        if gives[-1] == "metrics" and not isinstance(found[-1], Mapping):
            raise UserError(
                f"{name}: got {type(found[-1]).__name__} for metrics, want a dict of numbers, perhaps empty"
            )
        return found

    return call


def described(state: Any, name: str) -> str:
    """Shapes and dtypes of a state. Raises UserError where something in it is no number."""
    leaves, tree = jax.tree.flatten(state)
    arrays = [np.asarray(x) for x in leaves]
    for x in arrays:
        if x.dtype.kind not in "biuf":
            raise UserError(f"{name}: got a state that holds {x.dtype}, want numbers and arrays of numbers alone")
    return str(tree.unflatten([f"{x.dtype}{list(x.shape)}" for x in arrays]))

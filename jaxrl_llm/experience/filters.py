"""Filters: which graded rows may teach. They only lower `Groups.keep`; rows never leave."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from jaxrl_llm.errors import UserError
from jaxrl_llm.experience.config import OwnFilter
from jaxrl_llm.experience.stage_checks import first_state, metrics_of, next_state, parts_of
from jaxrl_llm.metrics.estimates import correct
from jaxrl_llm.types import Groups

Metrics = dict[str, float]


class Filter(NamedTuple):
    """Pure functions over a state, which is a tree of NumPy arrays and belongs into checkpoints."""

    init: Callable[[], Any]
    apply: Callable[[Any, Groups], tuple[Any, Groups, Metrics]]


def of(keep: Callable[[Groups], Bool[np.ndarray, " B"]], name: str = "a filter") -> Filter:
    """The filter without state that keeps the rows for which `keep` is True, of those that are kept so far.

    Raises UserError, when it is applied, if `keep` gives anything but one truth per row. `name`: what it is called then.
    """

    def apply(state: tuple, groups: Groups) -> tuple[tuple, Groups, Metrics]:
        return state, _lowered(name, groups, keep(groups)), {}

    return Filter(tuple, apply)


def _lowered(name: str, groups: Groups, keep: Bool[np.ndarray, " B"]) -> Groups:
    """The groups with those rows kept that are kept so far and by `keep`."""
    rows = np.asarray(keep)
    if rows.shape != groups.keep.shape or rows.dtype != bool:
        raise UserError(f"{name}: got {rows.dtype}{list(rows.shape)}, want bool[{len(groups.keep)}], one truth per row")
    return groups.replace(keep=groups.keep & rows)


def own_filter(cfg: OwnFilter, texts_of: Callable[[Groups], list[str]]) -> Filter:
    """A filter of your own. `texts_of`: the responses as text, for one that takes `texts`."""
    found, name = cfg.made(), f"experience.filter {cfg.function}"
    if not hasattr(found, "apply"):
        return of(_with_texts(found, texts_of), name)
    own = _with_texts(found.apply, texts_of)

    def apply(state: Any, groups: Groups) -> tuple[Any, Groups, Metrics]:
        after, kept, metrics = parts_of(name, own(state, groups), ("state", "groups", "metrics"))
        if not isinstance(kept, Groups):
            raise UserError(f"{name}: got {type(kept).__name__}, want Groups with another keep")
        return next_state(name, state, after), _lowered(name, groups, kept.keep), metrics_of(name, metrics)

    return Filter(first_state(name, found.init), apply)


def _with_texts(function: Callable, texts_of: Callable[[Groups], list[str]]) -> Callable:
    """Groups are the last of its arguments."""
    try:
        takes_texts = "texts" in inspect.signature(function).parameters
    except ValueError:
        # A function in C says nothing of its parameters.
        takes_texts = False
    return (lambda *args: function(*args, texts=texts_of(args[-1]))) if takes_texts else function


def has_signal(groups: Groups) -> Bool[np.ndarray, " B"]:
    """True for the rows of a group whose rewards differ.

    Never asked of the advantages: six equal rewards of 0.3 have a float32 mean one ulp off, and an "advantage" of 0.75.
    """
    return _differs(groups.reward, groups)


def _differs(number: Float[np.ndarray, " B"], groups: Groups) -> Bool[np.ndarray, " B"]:
    """max > min of a group's numbers; False where one is NaN: the group was not graded."""
    of_group = number.reshape(len(groups.failure), -1)
    return np.repeat(of_group.max(axis=1) > of_group.min(axis=1), of_group.shape[1])


def make_filter(name: str, graders: Sequence[str], threshold: float) -> Filter:
    """A built-in filter.

    Args:
        name: has_signal, success, none or one of `graders`.
        graders: names of the graders, in the order of `Groups.components`.
        threshold: what the first of them must give a response that is right, as in the evaluation.
    """
    if name == "none":
        return of(lambda groups: groups.keep)
    if name == "has_signal":
        return of(has_signal)
    if name == "success":
        return of(lambda groups: _differs(correct(groups.components[:, 0], threshold), groups))
    index = graders.index(name)
    return of(lambda groups: _differs(groups.components[:, index], groups))

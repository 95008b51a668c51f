"""Filters: which graded rows are trained on. A filter only clears entries of `Groups.keep`; it never removes rows."""

import inspect
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float

from jaxrl_llm.errors import UserError
from jaxrl_llm.experience.config import OwnFilter
from jaxrl_llm.experience.stage_checks import checked_init, checked_metrics, checked_state, checked_tuple
from jaxrl_llm.metrics.estimates import correct
from jaxrl_llm.types import Groups

Metrics = dict[str, float]


class Filter(NamedTuple):
    """Pure functions over a state: a tree of NumPy arrays that is saved in checkpoints. A filter without state may be called."""

    init: Callable[[], Any]
    """init(): the state before the first step."""
    apply: Callable[[Any, Groups], tuple[Any, Groups, Metrics]]
    """apply(state, groups): the next state, the groups with fewer rows kept, and metrics."""

    def __call__(self, groups: Groups) -> Groups:
        """Return the groups with fewer rows kept. Raises UserError if the filter has a state."""
        state = self.init()
        if jax.tree.leaves(state):
            raise UserError(
                f"the filter: got a state, {state}, which a call would lose; want state = keep.init() before the first step, and "
                "state, groups, metrics = keep.apply(state, groups) in each"
            )
        return self.apply(state, groups)[1]


def chain(*filters: Any) -> Filter:
    """Return the filter that applies each in turn: a row is kept if all of them keep it.

        keep = rl.filters.chain(rl.filters.has_signal, lambda groups: groups.rollouts.length >= 5)
        groups = keep(groups)

    Each is a function Groups -> bool[B], a `Filter`, or an object with `init` and `apply`. The state is the tuple of theirs, the
    metrics are theirs together.
    """
    parts = [as_filter(part, _name_of(part)) for part in filters]

    def apply(state: tuple, groups: Groups) -> tuple[tuple, Groups, Metrics]:
        after, metrics = [], {}
        for part, of_part in zip(parts, state, strict=True):
            new, groups, more = part.apply(of_part, groups)
            after.append(new)
            metrics |= more
        return tuple(after), groups, metrics

    return Filter(lambda: tuple(part.init() for part in parts), apply)


def as_filter(found: Any, name: str) -> Filter:
    """Return a function Groups -> bool[B], or an object with `init` and `apply`, as a filter whose results are checked.

    `name`: its name in error messages.
    """
    if isinstance(found, Filter):
        return found
    if not callable(getattr(found, "apply", found)):
        raise UserError(
            f"{name}: got a {type(found).__name__}, want a function of groups, or an object with init and apply"
        )
    if not hasattr(found, "apply"):
        return stateless_filter(found, name)

    def apply(state: Any, groups: Groups) -> tuple[Any, Groups, Metrics]:
        after, kept, metrics = checked_tuple(name, found.apply(state, groups), ("state", "groups", "metrics"))
        if not isinstance(kept, Groups):
            raise UserError(f"{name}: got {type(kept).__name__}, want Groups with another keep")
        return checked_state(name, state, after), _lowered(name, groups, kept.keep), checked_metrics(name, metrics)

    return Filter(checked_init(name, found.init), apply)


def _name_of(found: Any) -> str:
    return f"the filter {getattr(found, '__name__', type(found).__name__)}"


def stateless_filter(keep: Callable[[Groups], Bool[np.ndarray, " B"]], name: str = "a filter") -> Filter:
    """Return the filter that keeps rows for which `keep` is True, among those kept so far.

    When applied, it raises UserError if `keep` returns anything but bool[B]. `name`: its name in that message.
    """

    def apply(state: tuple, groups: Groups) -> tuple[tuple, Groups, Metrics]:
        return state, _lowered(name, groups, keep(groups)), {}

    return Filter(tuple, apply)


def _lowered(name: str, groups: Groups, keep: Bool[np.ndarray, " B"]) -> Groups:
    """Return the groups with rows kept if they were kept so far and by `keep`."""
    rows = np.asarray(keep)
    if rows.shape != groups.keep.shape or rows.dtype != bool:
        raise UserError(f"{name}: got {rows.dtype}{list(rows.shape)}, want bool[{len(groups.keep)}], one truth per row")
    return groups.replace(keep=groups.keep & rows)


def own_filter(cfg: OwnFilter, texts_of: Callable[[Groups], list[str]]) -> Filter:
    """Return a custom filter, its results checked. `texts_of`: returns the responses as text, for a filter that takes `texts`."""
    found, name = cfg.made(), f"experience.filter {cfg.function}"
    if hasattr(found, "apply"):
        return as_filter(SimpleNamespace(init=found.init, apply=_with_texts(found.apply, texts_of)), name)
    return as_filter(_with_texts(found, texts_of), name)


def _with_texts(function: Callable, texts_of: Callable[[Groups], list[str]]) -> Callable:
    """Return the function with `texts` filled in if it takes them. The groups are its last positional argument."""
    try:
        takes_texts = "texts" in inspect.signature(function).parameters
    except ValueError:
        # A function in C has no signature.
        takes_texts = False
    return (lambda *args: function(*args, texts=texts_of(args[-1]))) if takes_texts else function


def has_signal(groups: Groups) -> Bool[np.ndarray, " B"]:
    """Return True for the rows of groups whose rewards differ.

    Advantages cannot decide this: six equal rewards of 0.3 have a float32 mean one ulp off, and an "advantage" of 0.75.
    """
    return _differs(groups.reward, groups)


def _differs(number: Float[np.ndarray, " B"], groups: Groups) -> Bool[np.ndarray, " B"]:
    """Return max > min per group, at each row; False if a number is NaN (ungraded group)."""
    of_group = number.reshape(len(groups.failure), -1)
    return np.repeat(of_group.max(axis=1) > of_group.min(axis=1), of_group.shape[1])


def make_filter(name: str, graders: Sequence[str], threshold: float) -> Filter:
    """Return a built-in filter.

    Args:
        name: has_signal, success, none or one of `graders`.
        graders: names of the graders, in the order of `Groups.components`.
        threshold: lowest reward by the first grader of a right response, as in the evaluation.
    """
    if name == "none":
        return stateless_filter(lambda groups: groups.keep)
    if name == "has_signal":
        return stateless_filter(has_signal)
    if name == "success":
        return stateless_filter(lambda groups: _differs(correct(groups.components[:, 0], threshold), groups))
    index = graders.index(name)
    return stateless_filter(lambda groups: _differs(groups.components[:, index], groups))

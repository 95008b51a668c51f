"""Filters: which graded rows are trained on. A filter only clears entries of `Groups.keep`; it never removes rows."""

import inspect
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool

from jaxrl_llm.errors import UserError
from jaxrl_llm.experience.config import AllOfConfig, AnyOfConfig, ChainConfig, FilterConfig, OwnFilter
from jaxrl_llm.experience.group_filters import DifficultyBand as DifficultyBand
from jaxrl_llm.experience.group_filters import Signal as Signal
from jaxrl_llm.experience.row_filters import BestBy as BestBy
from jaxrl_llm.experience.row_filters import FirstSamples as FirstSamples
from jaxrl_llm.experience.row_filters import MaxVariance as MaxVariance
from jaxrl_llm.experience.row_filters import NoDuplicates as NoDuplicates
from jaxrl_llm.experience.row_filters import NoRepetition as NoRepetition
from jaxrl_llm.experience.row_filters import NotCutOff as NotCutOff
from jaxrl_llm.experience.row_filters import NotStale as NotStale
from jaxrl_llm.experience.row_filters import RewardBetween as RewardBetween
from jaxrl_llm.experience.stage_checks import (
    as_array,
    checked_init,
    checked_metrics,
    checked_state,
    checked_tuple,
    copied,
)
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
    """Return the filter that applies each to what the one before left: a row is kept if all of them keep it.

        keep = rl.filters.chain(rl.filters.Signal(by="success"), lambda groups: groups.rollouts.length >= 5)
        groups = keep(groups)

    Each is a function Groups -> bool[B], a `Filter`, or an object with `init` and `apply`. The state is the tuple of theirs, the
    metrics are theirs together.
    """
    parts = [of(part) for part in filters]

    def apply(state: tuple, groups: Groups) -> tuple[tuple, Groups, Metrics]:
        after, metrics = [], {}
        for part, of_part in zip(parts, state, strict=True):
            new, groups, more = part.apply(of_part, groups)
            after.append(new)
            metrics |= more
        return tuple(after), groups, metrics

    return Filter(lambda: tuple(part.init() for part in parts), apply)


def all_of(*filters: Any) -> Filter:
    """Return the filter that keeps the rows that all of these keep, each applied to the same groups. Arguments as in `chain`."""
    return _side_by_side(filters, np.logical_and)


def any_of(*filters: Any) -> Filter:
    """Return the filter that keeps the rows that at least one of these keeps, each applied to the same groups. Arguments as in
    `chain`."""
    return _side_by_side(filters, np.logical_or)


def _side_by_side(filters: Sequence[Any], join: np.ufunc) -> Filter:
    if not filters:
        raise UserError("a filter of filters: got none, want one or more")
    parts = [of(part) for part in filters]

    def apply(state: tuple, groups: Groups) -> tuple[tuple, Groups, Metrics]:
        found = [part.apply(of_part, groups) for part, of_part in zip(parts, state, strict=True)]
        keep = join.reduce([kept.keep for _, kept, _ in found])
        metrics = {name: value for *_, more in found for name, value in more.items()}
        return tuple(after for after, *_ in found), groups.replace(keep=keep), metrics

    return Filter(lambda: tuple(part.init() for part in parts), apply)


def of(found: Any) -> Filter:
    """Return a function Groups -> bool[B], or an object with `init` and `apply`, as a filter. Its metric `filter/NAME/dropped` is
    the number of rows that it dropped."""
    label = _label_of(found)
    return as_filter(found, f"the filter {label}", label)


def as_filter(found: Any, name: str, label: str = "") -> Filter:
    """Return a function Groups -> bool[B], or an object with `init` and `apply`, as a filter whose results are checked.

    Args:
        found: function or object; a `Filter` is returned as it is.
        name: in error messages.
        label: in metrics, as `filter/LABEL/dropped`, the number of rows dropped; "": there are none.
    """
    if isinstance(found, Filter):
        return found
    if not callable(getattr(found, "apply", found)):
        raise UserError(
            f"{name}: got a {type(found).__name__}, want a function of groups, or an object with init and apply"
        )
    if not hasattr(found, "apply"):
        return stateless_filter(found, name, label)

    def apply(state: Any, groups: Groups) -> tuple[Any, Groups, Metrics]:
        after, kept, metrics = checked_tuple(name, found.apply(copied(state), groups), ("state", "groups", "metrics"))
        if not isinstance(kept, Groups):
            raise UserError(f"{name}: got {type(kept).__name__}, want Groups with another keep")
        lowered, metrics = _lowered(name, groups, kept.keep), checked_metrics(name, metrics)
        return checked_state(name, state, after), lowered, _dropped(label, groups, lowered) | metrics

    return Filter(checked_init(name, found.init), apply)


def _label_of(found: Any) -> str:
    """Name in metrics: a built-in's kind and what it measures by, or that of the function or class."""
    kind = getattr(found, "kind", None)
    own = getattr(found, "__name__", type(found).__name__)
    return own if kind is None else "_".join([kind, *([found.by] if hasattr(found, "by") else [])])


def stateless_filter(
    keep: Callable[[Groups], Bool[np.ndarray, " B"]], name: str = "a filter", label: str = ""
) -> Filter:
    """Return the filter that keeps rows for which `keep` is True, among those kept so far.

    When applied, it raises UserError if `keep` returns anything but bool[B]. `name`, `label`: as in `as_filter`.
    """

    def apply(state: tuple, groups: Groups) -> tuple[tuple, Groups, Metrics]:
        lowered = _lowered(name, groups, keep(groups))
        return state, lowered, _dropped(label, groups, lowered)

    return Filter(tuple, apply)


def _dropped(label: str, before: Groups, after: Groups) -> Metrics:
    return {f"filter/{label}/dropped": float(before.keep.sum() - after.keep.sum())} if label else {}


def _lowered(name: str, groups: Groups, keep: Bool[np.ndarray, " B"]) -> Groups:
    """Return the groups with rows kept if they were kept so far and by `keep`."""
    rows = as_array(keep)
    if rows.shape != groups.keep.shape or rows.dtype != bool:
        raise UserError(f"{name}: got {rows.dtype}{list(rows.shape)}, want bool[{len(groups.keep)}], one truth per row")
    return groups.replace(keep=groups.keep & rows)


def make_filter(cfg: FilterConfig, texts_of: Callable[[Groups], list[str]]) -> Filter:
    """Return the filter of a config other than `auto`. `texts_of`: returns the responses, for a filter that takes `texts`."""
    if isinstance(cfg, OwnFilter):
        return _own_filter(cfg, texts_of)
    if type(cfg) in COMPOSED:
        return COMPOSED[type(cfg)](*(make_filter(part, texts_of) for part in cfg.filters))
    return of(cfg)


COMPOSED = {ChainConfig: chain, AllOfConfig: all_of, AnyOfConfig: any_of}


def _own_filter(cfg: OwnFilter, texts_of: Callable[[Groups], list[str]]) -> Filter:
    found, name, label = cfg.made(), f"experience.filter {cfg.function}", cfg.function.rpartition(":")[2]
    if hasattr(found, "apply"):
        return as_filter(SimpleNamespace(init=found.init, apply=_with_texts(found.apply, texts_of)), name, label)
    return as_filter(_with_texts(found, texts_of), name, label)


def _with_texts(function: Callable, texts_of: Callable[[Groups], list[str]]) -> Callable:
    """Return the function with `texts` filled in if it takes them. The groups are its last positional argument."""
    try:
        takes_texts = "texts" in inspect.signature(function).parameters
    except ValueError:
        # A function in C has no signature.
        takes_texts = False
    return (lambda *args: function(*args, texts=texts_of(args[-1]))) if takes_texts else function


def has_signal(groups: Groups) -> Bool[np.ndarray, " B"]:
    """Return True for the rows of groups whose rewards differ. Raises UserError for a sum of several graders: see `Signal`."""
    graders = (~np.isnan(groups.components)).sum(axis=1).max(initial=0)
    if graders > 1:
        raise UserError(
            f"has_signal: got rewards that are the sum of {graders} graders, want Signal(by=...) with the "
            'grader that decides, "success", or "reward" for the sum: by it, groups stay in which every answer is wrong'
        )
    return Signal(by="reward")(groups)

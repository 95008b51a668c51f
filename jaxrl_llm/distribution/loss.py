"""A loss as a value: what an update minimizes, whatever objective made it."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from jaxtyping import Array, Bool, Float

from jaxrl_llm.distribution.score import TokenScores
from jaxrl_llm.types import Batch, OwnColumn

Tokens = Float[Array, "R T"]
Mask = Bool[Array, "R T"]
NOTHING: Mapping[str, Tokens] = MappingProxyType({})


class Terms(NamedTuple):
    """A loss's terms per token, inside and outside the loss mask; they are summed later, by global counts."""

    loss: Tokens
    means: Mapping[str, Tokens] = NOTHING
    """Named values to average over the tokens of the loss mask."""
    maxima: Mapping[str, Tokens] = NOTHING
    """Named values to maximize over the loss mask; a minimum is the maximum of the negative."""
    weighted: Mapping[str, Tokens] = NOTHING
    """Named values to sum with the weights of the loss, which makes a mean over sequences of one number per sequence."""


class Loss(NamedTuple):
    """Terms per token, and how they become one number."""

    terms: Callable[[TokenScores, Batch], Terms]
    aggregation: str = "token"
    """What the terms are averaged over: one of the aggregations of `token_weights`."""
    length: int = 1
    """Divisor of the aggregation `constant`."""
    columns: tuple[str, ...] = ()
    """Optional columns of `Batch` that it reads."""
    own: tuple[OwnColumn, ...] = ()
    """Columns that it adds, as `Batch.own`."""
    keep: Callable[[Batch], Mask] | None = None
    """Tokens that keep their weight, chosen over a whole minibatch before it is cut into micro-batches; None: all."""

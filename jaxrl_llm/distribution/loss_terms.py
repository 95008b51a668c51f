"""The loss that an update minimizes: per-token terms and their aggregation, independent of the objective that made it."""

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
    """Per-token terms of a loss, inside and outside the loss mask; the update sums them, with global counts."""

    loss: Tokens
    means: Mapping[str, Tokens] = NOTHING
    """Named values, averaged over the tokens in the loss mask."""
    maxima: Mapping[str, Tokens] = NOTHING
    """Named values, maximized over the loss mask; a minimum is the maximum of the negative."""
    weighted: Mapping[str, Tokens] = NOTHING
    """Named values, summed with the weights of the loss; gives the mean over sequences of one number per sequence."""
    log_ratio: Tokens | None = None
    """log p - log p_behavior, without a gradient; of it the update reports the effective sample size."""


class Loss(NamedTuple):
    """Per-token terms and their aggregation."""

    terms: Callable[[TokenScores, Batch], Terms]
    aggregation: str = "token"
    """Unit of the average, one of the aggregations of `token_weights`."""
    length: int = 1
    """Divisor of the aggregation `constant`, in tokens."""
    columns: tuple[str, ...] = ()
    """Optional columns of `Batch` that the loss uses."""
    own: tuple[OwnColumn, ...] = ()
    """Additional columns that the loss defines, in `Batch.own`."""
    keep: Callable[[Batch], Mask] | None = None
    """Selects the tokens that keep their weight, over a whole minibatch before it is split into micro-batches; None: all."""

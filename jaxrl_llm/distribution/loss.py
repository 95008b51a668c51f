"""A loss as a value: what an update minimizes, whichever objective made it."""

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
    """What a loss says of each token, inside the loss mask and out; sums come later, by global counts."""

    loss: Tokens
    means: Mapping[str, Tokens] = NOTHING
    """Named values to average over the tokens of the loss mask."""
    maxima: Mapping[str, Tokens] = NOTHING
    """Named values whose maximum over the loss mask is wanted; a minimum is the maximum of the negative."""
    weighted: Mapping[str, Tokens] = NOTHING
    """Named values to add up with the weights of the loss, which make a mean over sequences of what is one number for each."""


class Loss(NamedTuple):
    """One term per token, and what makes one number of them."""

    terms: Callable[[TokenScores, Batch], Terms]
    aggregation: str = "token"
    """What the terms are averaged over, as `token_weights` lists them."""
    length: int = 1
    """Of the aggregation `constant`."""
    columns: tuple[str, ...] = ()
    """Of `Batch`, those that it reads beside the ones that are always there."""
    own: tuple[OwnColumn, ...] = ()
    """Columns that it brings along, as `Batch.own`."""
    keep: Callable[[Batch], Mask] | None = None
    """The tokens that keep their weight, chosen over a whole minibatch before it is cut into parts; None: all."""

"""Config of the checkpoints."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge
from pydantic import ConfigDict


@dataclass(frozen=True)
class CheckpointConfig:
    """When the whole state is saved. The last step, SIGTERM and Ctrl-C always save."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    every: Annotated[int, Ge(1)] = 50
    """Steps between saves."""
    keep: Annotated[int, Ge(2)] = 3
    """Number of newest checkpoints kept, at least two, so that one remains to fall back on. A checkpoint with non-finite
    updates does not count."""

"""How a step samples."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge
from pydantic import ConfigDict


@dataclass(frozen=True)
class RolloutConfig:
    """G samples for each of P prompts."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompts: Annotated[int, Ge(1)] = 32
    """P, prompts a step. A multiple of mesh.data * mesh.fsdp."""
    samples: Annotated[int, Ge(1)] = 8
    """G, samples for each prompt: the group that rewards are compared in."""
    max_new_tokens: Annotated[int, Ge(1)] = 8
    """C, the length cap."""
    temperature: Annotated[float, Ge(0)] = 1.0
    """Divides the logits, in drawing and in scoring alike. May change without compiling anything. 0, the likeliest token always, is
    for `jaxrl sample` and `jaxrl eval` alone."""

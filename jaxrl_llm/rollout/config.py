"""How a step samples: the distribution that tokens are drawn from, and how the engine gets through the work."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict

from jaxrl_llm.parallel.config import MeshConfig

Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]


@dataclass(frozen=True)
class EngineConfig:
    """Speed and memory alone: nothing here changes a token, but for the rounding of quantized weights and caches."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    in_flight: Natural = 0
    """Prompts decoded at a time, rounded up to what the mesh splits; the others wait and take the place of finished ones.
    0: all of a step."""
    shared_by: Natural = 0
    """Rows that read one copy of a prompt's keys and values, and that join and leave together: a divisor of `samples`; 0: all of
    them. Fewer take more memory, and waste less where lengths differ much within a group."""
    segment: Count = 128
    """Steps between two looks of the host: there finished rows leave, waiting ones join, and the cache grows."""
    eos_interval: Count = 8
    """Steps between two looks of the device at whether any row still lives."""
    window: Natural = 0
    """Slots that the cache of the rows' own keys starts with; it doubles as rows grow. 0: 128, or what fits a CPU's caches;
    `max_new_tokens` or more: it has them all at once."""
    compact: bool = True
    """Finished rows leave the batch when half of it, or less, lives."""
    prefill_chunk: Count = 1024
    """Prompt tokens read at a time: bounds the memory of activations."""
    weights: Literal["compute", "int8", "fp8"] = "compute"
    """How the policy that samples holds its matrices: the model's compute dtype, or 8 bits with one scale an output channel."""
    cache: Literal["compute", "int8"] = "compute"
    """How keys and values are held: the compute dtype, or int8 with one scale a head and slot."""
    attention: Literal["auto", "dot", "across"] = "auto"
    """How keys lie in the cache: dot, each slot's H numbers together; across, those of all slots together; auto: as was measured
    fastest on the backend."""
    layout: Literal["replicated", "wide"] | MeshConfig = "replicated"
    """How the policy lies: copied over `fsdp`; or `wide`, heads, mlp and vocabulary split over `fsdp` too; or on axes of its own
    over the same devices."""


@dataclass(frozen=True)
class RolloutConfig:
    """G samples for each of P prompts."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompts: Count = 32
    """P, prompts a step. A multiple of mesh.data * mesh.fsdp."""
    samples: Count = 8
    """G, samples for each prompt: the group that rewards are compared in."""
    max_new_tokens: Count = 8
    """C, the length cap."""
    temperature: Annotated[float, Ge(0)] = 1.0
    """Divides the logits, in drawing and in scoring alike. May change without compiling anything. 0, the likeliest token always, is
    for `jaxrl sample` and `jaxrl eval` alone."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Draw from the smallest set of likeliest tokens that holds this mass (Holtzman et al. 2020)."""
    top_k: Natural = 0
    """Draw from the k likeliest tokens; 0: from all."""
    min_p: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Draw from tokens with at least this share of the likeliest one's probability (Nguyen et al. 2024)."""
    max_kept_tokens: Count = 128
    """K, tokens that a truncated draw keeps at most, and records for the scorer. Where more would qualify, the K likeliest stay and
    `sampling/support_overflow` counts it."""
    min_new_tokens: Natural = 0
    """No end token is drawn before so many tokens."""
    stop: tuple[str, ...] = ()
    """Texts at which a response ends; the token that completes one is its last. They may hold special tokens."""
    raw_logprobs: bool = False
    """Also record each token's log-probability under the untruncated distribution."""
    engine: EngineConfig = field(default_factory=EngineConfig)

    @property
    def truncates(self) -> bool:
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    def max_kept_of(self, num_tokens: int) -> int:
        """Tokens that a draw from so many keeps and records; 0 where nothing is truncated."""
        return min(self.max_kept_tokens, num_tokens) if self.truncates else 0

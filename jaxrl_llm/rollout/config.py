"""Config of the rollouts: the distribution that tokens are sampled from, and how the engine schedules the work."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict

from jaxrl_llm.parallel.config import MeshConfig

Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]


@dataclass(frozen=True)
class EngineConfig:
    """Speed and memory of the engine. No field changes a token, except by the rounding of quantized weights and caches."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    max_concurrent_prompts: Natural = 0
    """Maximum number of prompts decoded concurrently, rounded up to a multiple of the row shards. Further prompts queue, and are
    admitted as slots free up. 0: all prompts of a step."""
    rows_per_prompt_cache: Natural = 0
    """Rows that share one copy of a prompt's keys and values, and are admitted and released together: a divisor of `samples`; 0:
    all of them. Fewer take more memory, and waste fewer steps if lengths differ much within a group."""
    decode_chunk: Count = 128
    """Decode steps per chunk. Between chunks the host releases finished rows, admits waiting ones and widens the cache."""
    eos_interval: Count = 8
    """Decode steps between two checks on the device whether any row is active."""
    window: Natural = 0
    """Initial slots of the cache of the rows' own keys, which doubles as rows get longer. 0: 128, or what fits into a CPU's caches;
    `max_new_tokens` or more: all slots at once."""
    compact: bool = True
    """Compact the batch once at most half of its rows are active."""
    prefill_chunk: Count = 1024
    """Prompt tokens per prefill chunk, which bounds the memory of activations."""
    weights: Literal["compute", "int8", "fp8"] = "compute"
    """Dtype of the sampling policy's matrices: the model's compute dtype, or 8 bits with one scale per output channel."""
    cache: Literal["compute", "int8"] = "compute"
    """Dtype of cached keys and values: the compute dtype, or int8 with one scale per head and slot."""
    attention: Literal["auto", "dot", "across"] = "auto"
    """Memory order of the cached keys: dot, the H numbers of a slot together; across, those of all slots together; auto: the order
    measured fastest on the backend."""
    layout: Literal["replicated", "wide"] | MeshConfig = "replicated"
    """Layout of the policy: replicated over `fsdp`; `wide`, with heads, mlp and vocabulary split over `fsdp` too; or mesh axes of
    its own over the same devices."""


@dataclass(frozen=True)
class RolloutConfig:
    """G samples per prompt for P prompts."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompts: Count = 32
    """P, prompts per step. A multiple of mesh.data * mesh.fsdp."""
    samples: Count = 8
    """G, samples per prompt: the group within which rewards are compared."""
    max_new_tokens: Count = 8
    """C, maximum length of a response in tokens."""
    temperature: Annotated[float, Ge(0)] = 1.0
    """Divisor of the logits, in sampling and in scoring. Changing it compiles nothing. 0, always the likeliest token, is for
    `jaxrl sample` and `jaxrl eval` only."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Sample from the smallest set of likeliest tokens that holds this mass (Holtzman et al. 2020)."""
    top_k: Natural = 0
    """Sample from the k likeliest tokens; 0: from all."""
    min_p: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Sample from tokens with at least this fraction of the likeliest one's probability (Nguyen et al. 2024)."""
    max_kept_tokens: Count = 128
    """K, maximum number of tokens that truncated sampling keeps, and records for the scorer. If more qualify, the K likeliest are
    kept and `sampling/support_overflow` counts it."""
    min_new_tokens: Natural = 0
    """Minimum length: end tokens have probability 0 before this many tokens."""
    stop: tuple[str, ...] = ()
    """Stop texts: a response ends at the token that completes one. They may contain special tokens."""
    raw_logprobs: bool = False
    """Also record each token's log-probability under the untruncated distribution."""
    engine: EngineConfig = field(default_factory=EngineConfig)

    @property
    def truncates(self) -> bool:
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    def max_kept_of(self, num_tokens: int) -> int:
        """Tokens kept and recorded per sampled one, of a vocabulary of `num_tokens`; 0 without truncation."""
        return min(self.max_kept_tokens, num_tokens) if self.truncates else 0

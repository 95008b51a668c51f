"""Config of rollouts: the sampling distribution, and the engine's trade-offs of speed and memory."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, Field, model_validator

from jaxrl_llm.control.config import Control, NoControl
from jaxrl_llm.parallel.config import MeshConfig

Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]


@dataclass(frozen=True)
class EngineConfig:
    """Speed and memory of generation. Only quantized `weights` and `cache` change sampled tokens, by rounding."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    max_concurrent_prompts: Natural = 0
    """Maximum number of prompts decoded concurrently, rounded up to a multiple of the row shards. Further prompts queue and are
    admitted as slots free up. 0: all prompts of a step."""
    rows_per_prompt_cache: Natural = 0
    """Rows that share one prompt KV cache, and are admitted and removed together (a sequence group): a divisor of `samples`; 0: all
    samples. Smaller values take more memory, and waste less where lengths vary within a group."""
    decode_chunk: Count = 128
    """Decode steps per chunk. Between chunks the host removes finished rows, admits queued prompts and grows the cache."""
    eos_interval: Count = 8
    """Decode steps between two checks on the device that some row is still active."""
    window: Natural = 0
    """Initial slots of the KV cache of completions, which doubles as needed. 0: 128, or what fits a CPU's caches;
    `max_new_tokens` or more: full size from the start."""
    compact: bool = True
    """Compact the batch once at most half of its rows are still active."""
    prefill_chunk: Count = 1024
    """Prompt tokens per prefill chunk; bounds the memory of activations."""
    weights: Literal["compute", "int8", "fp8"] = "compute"
    """Format of the sampling policy's matrices: the model's compute dtype, or 8 bits with one scale per output channel."""
    cache: Literal["compute", "int8"] = "compute"
    """Format of the KV cache: the compute dtype, or int8 with one scale per head and slot."""
    attention: Literal["auto", "dot", "across"] = "auto"
    """Memory layout of keys in the cache: dot, the H numbers of one slot are adjacent; across, the slots are adjacent; auto: the
    layout measured fastest on the backend."""
    layout: Literal["replicated", "wide"] | MeshConfig = "replicated"
    """Sharding of the sampling policy: replicated over `fsdp`; `wide`, heads, mlp and vocabulary split over `fsdp` as well; or
    separate mesh axes over the same devices."""


@dataclass(frozen=True)
class PerSample:
    """Sampling parameters that differ between the samples of a prompt, so that its group is more diverse. Sample i takes value
    i mod n of n. Each row is scored under its own. Evaluations use the parameters of `rollout`."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    temperature: tuple[Annotated[float, Gt(0)], ...] = ()
    """Empty: that of `rollout`."""
    top_p: tuple[Annotated[float, Gt(0), Le(1)], ...] = ()
    """Empty: that of `rollout`. A row with 1 still keeps `max_kept_tokens` tokens at most if another row truncates."""


BRANCH_SCORES = {name: name for name in ("entropy", "surprisal", "random")}
"""Rules of `PointTree.by` that need no function, as `user_code.resolve` wants them."""


@dataclass(frozen=True)
class NoTree:
    """Rows of a prompt are sampled independently."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    kind: Literal["none"] = "none"


@dataclass(frozen=True)
class PointTree:
    """Rows leave others at chosen tokens. With M roots, N points per root and T branches per point, a prompt has M (1 + N T L)
    rows after L rounds: of `samples`, those beside the roots are branches. EPTree of TreeRL (arXiv 2506.11902) and FR3E
    (arXiv 2507.07017, one root) are of this form."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    kind: Literal["points"] = "points"
    roots: Count = 2
    """M, rows of a prompt that are sampled from the prompt on. Where a budget gives another number of rows, the same share."""
    branches: Count = 2
    """T, rows that leave another at the same token."""
    rounds: Count = 1
    """L, rounds of branching: later ones may leave the branches of earlier ones."""
    by: str = "entropy"
    """Rows are left before tokens where this is largest: entropy, of the distribution; surprisal, -log p of the token, which makes
    the leaves' mean reward biased; random; or "module:function" of rollouts, one number per token."""


@dataclass(frozen=True)
class SegmentTree:
    """Rows are left at fixed distances: every `tokens` tokens each path becomes `width` paths, until the prompt has its `samples`
    rows; if paths end before, the rest leaves them at random borders, as in TreePO (arXiv 2508.17445). SPO (arXiv 2505.23564) has
    such trees too."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    kind: Literal["segments"] = "segments"
    tokens: Count = 128
    """Tokens per segment."""
    width: Annotated[int, Ge(2)] = 2
    """Paths that a path becomes at the end of a segment."""
    roots: Count = 1
    """Rows of a prompt that are sampled from the prompt on."""


Tree = Annotated[NoTree | PointTree | SegmentTree, Field(discriminator="kind")]


@dataclass(frozen=True)
class NoReuse:
    """Every visit of a prompt samples its responses from the first token on."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    kind: Literal["none"] = "none"


@dataclass(frozen=True)
class ExactReuse:
    """Responses of a prompt's last visit are kept as far as the policy draws them again with the same noise, and decoded from
    there on: distributed as fresh samples."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    kind: Literal["exact"] = "exact"
    max_repeats: Natural = 0
    """Visits in a row that repeat the noise of an earlier one, at most; the next one has new noise. 0: any number."""


@dataclass(frozen=True)
class InexactReuse:
    """Responses of a prompt's last visit are kept up to the first token that is not accepted (SPEC-RL, arXiv 2509.23232), and
    decoded from there on with new noise. Not distributed as fresh samples: kept tokens stay those of the policy that drew them, and
    their log-probs include the probability of being accepted."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["inexact"] = "inexact"
    leniency: Annotated[float, Ge(0)] = 0.5
    """Nats: a token is accepted with probability min(1, exp(leniency) * new / old). 0.5 is SPEC-RL's."""


Reuse = Annotated[NoReuse | ExactReuse | InexactReuse, Field(discriminator="kind")]


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling of G completions for each of P prompts."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompts: Count = 32
    """P, prompts per step. A multiple of mesh.data * mesh.fsdp."""
    samples: Count = 8
    """G, samples per prompt: the group within which rewards are compared."""
    max_new_tokens: Count = 8
    """C, maximum completion tokens per row."""
    temperature: Annotated[float, Ge(0)] = 1.0
    """Divides the logits, both in sampling and in scoring. May change without recompiling. 0 (greedy) is only for `jaxrl sample`
    and `jaxrl eval`."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Sample from the smallest set of most likely tokens with at least this total probability (Holtzman et al. 2020)."""
    top_k: Natural = 0
    """Sample from the k most likely tokens; 0: from all."""
    min_p: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Sample from tokens with at least this fraction of the most likely token's probability (Nguyen et al. 2024)."""
    max_kept_tokens: Count = 128
    """K, maximum tokens kept by top-p, top-k or min-p and recorded for the scorer. Where more qualify, the K most likely are kept
    and `sampling/support_overflow` counts the event."""
    min_new_tokens: Natural = 0
    """End-of-sequence tokens are not sampled in the first `min_new_tokens` slots, unless `control` allows nothing else."""
    stop: tuple[str, ...] = ()
    """Stop strings: a completion ends with the token that completes one of them. They may contain special tokens."""
    control: Control = field(default_factory=NoControl)
    """What responses may consist of; also the distribution that is scored."""
    tree: Tree = field(default_factory=NoTree)
    """How the rows of a prompt share their beginnings."""
    reuse: Reuse = field(default_factory=NoReuse)
    """What a prompt's responses take over from those of its last visit."""
    raw_logprobs: bool = False
    """Also record each token's log-probability under the untruncated distribution."""
    per_sample: PerSample = field(default_factory=PerSample)
    engine: EngineConfig = field(default_factory=EngineConfig)

    @model_validator(mode="before")
    @classmethod
    def written_out(cls, value: Any) -> Any:
        """Expand the short forms: the name of a kind."""
        if not isinstance(value, dict):
            return value
        short = {name: kind for name in ("control", "tree", "reuse") if isinstance(kind := value.get(name), str)}
        return value | {name: {"kind": kind} for name, kind in short.items()}

    @property
    def truncates(self) -> bool:
        return min(self.top_p, *self.per_sample.top_p, 1) < 1 or self.top_k > 0 or self.min_p > 0

    @property
    def controlled(self) -> bool:
        """True if what may be sampled depends on a row's state."""
        return self.min_new_tokens > 0 or self.control.kind != "none"

    @property
    def rows_per_trunk(self) -> int:
        """Rows that leave a trunk in one round of the configured tree, about: a power of two. 1 without a tree."""
        tree, rows = self.tree, 1
        if isinstance(tree, PointTree):
            rows = max(-(-(self.samples - tree.roots) // (tree.rounds * tree.roots)), 1)
        if isinstance(tree, SegmentTree):
            rows = tree.width
        return min(1 << (rows - 1).bit_length(), self.samples)

    def max_kept_of(self, num_tokens: int) -> int:
        """Return the maximum tokens kept per sampled token, for a vocabulary of `num_tokens`; 0 without truncation."""
        return min(self.max_kept_tokens, num_tokens) if self.truncates else 0

"""The numbers that make a decoder-only transformer: enough fields to spell every family in `model/hf`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le
from pydantic import ConfigDict, Field

from jaxrl_llm.parallel.config import divisors

Count = Annotated[int, Gt(0)]
Positive = Annotated[float, Gt(0)]


@dataclass(frozen=True)
class LinearRope:
    """Positions divided by `factor` (Chen et al. 2023)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    factor: Positive
    kind: Literal["linear"] = "linear"


@dataclass(frozen=True)
class Llama3Rope:
    """Slow pairs divided by `factor`, fast ones kept, a ramp between (Llama 3.1)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    factor: Positive
    original_length: Count
    """Positions the model was trained on before it was stretched."""
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    kind: Literal["llama3"] = "llama3"


@dataclass(frozen=True)
class YarnRope:
    """NTK by parts, with the softmax sharpened (Peng et al. 2023)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    factor: Positive
    original_length: Count
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    attention_factor: Positive | None = None
    """Multiplies cosine and sine. None: 0.1 ln(factor) + 1."""
    truncate: bool = True
    """The ramp's ends are whole pairs."""
    kind: Literal["yarn"] = "yarn"


RopeScaling = Annotated[LinearRope | Llama3Rope | YarnRope, Field(discriminator="kind")]


@dataclass(frozen=True)
class ModelConfig:
    """RMSNorm, RoPE, grouped-query attention, gated MLP or experts; residual blocks. The defaults are Llama's."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    vocab_size: Count = 16
    """V, rows of the embedding. At least the tokenizer's size; the surplus is never drawn."""
    layers: Annotated[int, Gt(0), Le(1000)] = 2
    d_model: Count = 64
    heads: Count = 4
    """N, query heads."""
    kv_heads: Count = 2
    """K; each serves N / K query heads."""
    head_dim: Count = 16
    d_mlp: Count = 256
    """Width of the MLP, or of each expert."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    rope_theta: Positive = 10_000.0
    rope_scaling: RopeScaling | None = None
    window: Annotated[int, Ge(0)] = 0
    """Keys that a sliding layer's query sees, its own among them."""
    sliding: tuple[bool, ...] = ()
    """Which layers slide, one entry a layer; empty: none."""
    sliding_rope_theta: Positive | None = None
    """Sliding layers' own base, never scaled (Gemma 3). None: they turn as the others do."""
    attention_scale: Positive | None = None
    """What scores are multiplied by. None: head_dim^-0.5."""
    attention_softcap: Positive | None = None
    """c: scores become c tanh(scores / c) (Gemma 2)."""
    logit_softcap: Positive | None = None
    norm_eps: Positive = 1e-6
    norm_plus_one: bool = False
    """Norms multiply by 1 + w (Gemma)."""
    sandwich_norms: bool = False
    """Norms behind attention and MLP too, before they join the residual stream (Gemma 2 and 3)."""
    scale_embedding: bool = False
    """Embeddings are multiplied by sqrt(D), rounded to the compute dtype (Gemma)."""
    qk_norm: bool = False
    """RMSNorm over the head dim of queries and keys (Qwen3, Gemma 3)."""
    qkv_bias: bool = False
    """Bias on queries, keys and values (Qwen2)."""
    tied_head: bool = True
    """The output head is the embedding."""
    experts: Annotated[int, Ge(0)] = 0
    """E, experts a layer; 0: one MLP."""
    experts_per_token: Annotated[int, Ge(0)] = 0
    norm_top_k: bool = True
    """A token's expert weights are made to add up to 1 (Qwen3-MoE's norm_topk_prob)."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and of the policy's parameters. Masters, norms, softmax, head and log-probs are f32 always."""

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    def slides(self, layer: int) -> bool:
        return bool(self.sliding) and self.sliding[layer]

    def problems(self, tensor: int, expert: int = 1) -> list[str]:
        """What does not fit or divide, in words; `tensor` and `expert` are the sizes of those mesh axes."""
        found = []
        if self.heads % self.kv_heads:
            found.append(f"model.heads: got {self.heads}, want a multiple of model.kv_heads ({self.kv_heads})")
        if self.head_dim % 2:
            found.append(f"model.head_dim: got {self.head_dim}, want an even number (RoPE turns pairs)")
        if self.sliding and len(self.sliding) != self.layers:
            found.append(f"model.sliding: got {len(self.sliding)} entries, want one for each of {self.layers} layers")
        if any(self.sliding) and not self.window:
            found.append("model.window: got 0, want the keys that a sliding layer sees")
        if bool(self.experts) != bool(self.experts_per_token) or self.experts_per_token > self.experts:
            found.append(
                f"model.experts_per_token: got {self.experts_per_token}, want 1 to model.experts ({self.experts}), or 0 for both"
            )
        split = [("tensor", tensor, name) for name in ("kv_heads", "d_mlp", "vocab_size")]
        if self.experts or expert > 1:
            split.append(("expert", expert, "experts"))
        for axis, shards, name in split:
            size = getattr(self, name)
            if size % shards or shards > max(size, 1):
                works = ", ".join(map(str, divisors(size))) or 1
                found.append(f"mesh.{axis}: got {shards}, want a divisor of model.{name} ({size}): {works}")
        return found


@dataclass(frozen=True)
class ForwardOptions:
    """How whole rows go through the model in training and scoring: `update.attention`, `update.remat`."""

    attention: str = "auto"
    remat: str = "layer"


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside frozen matrices (Hu et al. 2021): W + alpha / rank * A B."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    rank: Annotated[int, Ge(0)] = 0
    """0: no adapters, every parameter is trained."""
    alpha: Positive = 16.0
    targets: tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...] = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class PretrainedModel:
    """A Hugging Face directory, or a hub name where there is internet: all numbers but `compute` come from its config.json."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    path: str
    compute: Literal["float32", "bfloat16"] = "bfloat16"

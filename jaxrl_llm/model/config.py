"""Model configs: the hyperparameters of a decoder-only transformer, enough for every family in `model/hf`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le
from pydantic import ConfigDict, Field

from jaxrl_llm.parallel.config import divisors

Count = Annotated[int, Gt(0)]
Positive = Annotated[float, Gt(0)]


@dataclass(frozen=True)
class LinearRope:
    """Position interpolation: positions divided by `factor` (Chen et al. 2023)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    factor: Positive
    kind: Literal["linear"] = "linear"


@dataclass(frozen=True)
class Llama3Rope:
    """Low frequencies divided by `factor`, high ones kept, interpolated in between (Llama 3.1)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    factor: Positive
    original_length: Count
    """Context length of the original training, in tokens."""
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    kind: Literal["llama3"] = "llama3"


@dataclass(frozen=True)
class YarnRope:
    """YaRN: NTK-by-parts frequencies and a sharper softmax (Peng et al. 2023)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    factor: Positive
    original_length: Count
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    attention_factor: Positive | None = None
    """Factor of cosine and sine. None: 0.1 ln(factor) + 1."""
    truncate: bool = True
    """Round the ends of the interpolation to whole pairs."""
    kind: Literal["yarn"] = "yarn"


RopeScaling = Annotated[LinearRope | Llama3Rope | YarnRope, Field(discriminator="kind")]


@dataclass(frozen=True)
class ModelConfig:
    """Pre-norm transformer: RMSNorm, RoPE, grouped-query attention, gated MLP or experts. The default variant is Llama's."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    vocab_size: Count = 16
    """V, rows of the embedding. At least the tokenizer's size; surplus ids are never sampled."""
    layers: Annotated[int, Gt(0), Le(1000)] = 2
    d_model: Count = 64
    heads: Count = 4
    """N, query heads."""
    kv_heads: Count = 2
    """K, key/value heads; each is shared by N / K query heads."""
    head_dim: Count = 16
    d_mlp: Count = 256
    """Width of the MLP, or of each expert."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    rope_theta: Positive = 10_000.0
    rope_scaling: RopeScaling | None = None
    window: Annotated[int, Ge(0)] = 0
    """Attention window of sliding layers: number of keys a query attends to, its own included."""
    sliding: tuple[bool, ...] = ()
    """True for layers with a sliding attention window, one entry per layer; empty: no layer."""
    sliding_rope_theta: Positive | None = None
    """RoPE base of sliding layers, never scaled (Gemma 3). None: the same RoPE as the other layers."""
    attention_scale: Positive | None = None
    """Factor of the attention scores. None: head_dim^-0.5."""
    attention_softcap: Positive | None = None
    """c: scores become c tanh(scores / c) (Gemma 2)."""
    logit_softcap: Positive | None = None
    """The same for the output logits (Gemma 2)."""
    norm_eps: Positive = 1e-6
    norm_plus_one: bool = False
    """RMSNorm multiplies by 1 + w (Gemma)."""
    sandwich_norms: bool = False
    """RMSNorm also after attention and MLP, before the residual addition (Gemma 2 and 3)."""
    scale_embedding: bool = False
    """Embeddings are multiplied by sqrt(D), rounded to the compute dtype (Gemma)."""
    qk_norm: bool = False
    """RMSNorm over the head dimension of queries and keys (Qwen3, Gemma 3)."""
    qkv_bias: bool = False
    """Bias on queries, keys and values (Qwen2)."""
    tied_head: bool = True
    """The output head is the embedding."""
    experts: Annotated[int, Ge(0)] = 0
    """E, experts per layer; 0: a dense MLP."""
    experts_per_token: Annotated[int, Ge(0)] = 0
    norm_top_k: bool = True
    """Normalize each token's expert weights to sum to 1 (Qwen3-MoE's norm_topk_prob)."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and policy parameters. Master parameters, norms, softmax, logits and log-probs are always f32."""

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    def slides(self, layer: int) -> bool:
        """True if the layer has a sliding attention window."""
        return bool(self.sliding) and self.sliding[layer]

    def problems(self, tensor: int, expert: int = 1) -> list[str]:
        """Error messages for inconsistent or indivisible sizes; `tensor` and `expert` are the sizes of those mesh axes."""
        found = []
        if self.heads % self.kv_heads:
            found.append(f"model.heads: got {self.heads}, want a multiple of model.kv_heads ({self.kv_heads})")
        if self.head_dim % 2:
            found.append(f"model.head_dim: got {self.head_dim}, want an even number (RoPE rotates pairs)")
        if self.sliding and len(self.sliding) != self.layers:
            found.append(f"model.sliding: got {len(self.sliding)} entries, want one per layer ({self.layers})")
        if any(self.sliding) and not self.window:
            found.append("model.window: got 0, want the number of keys that a sliding layer attends to")
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
    """Options of the forward pass over whole rows in training and scoring: `update.attention`, `update.remat`."""

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
    """A Hugging Face directory, or a hub name (needs internet access). All fields but `compute` come from its config.json."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    path: str
    compute: Literal["float32", "bfloat16"] = "bfloat16"

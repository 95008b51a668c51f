"""The numbers that make a decoder-only transformer: enough fields to spell Llama 3, Qwen2.5 and Qwen3."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt
from pydantic import ConfigDict

Count = Annotated[int, Gt(0)]
Positive = Annotated[float, Gt(0)]


@dataclass(frozen=True)
class ModelConfig:
    """RMSNorm, RoPE, grouped-query attention, SwiGLU; pre-norm residual blocks."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    vocab_size: Count = 16
    """V, rows of the embedding. At least the tokenizer's size; the surplus is never drawn."""
    layers: Count = 2
    d_model: Count = 64
    heads: Count = 4
    """N, query heads."""
    kv_heads: Count = 2
    """K; each serves N / K query heads."""
    head_dim: Count = 16
    d_mlp: Count = 256
    rope_theta: Positive = 10_000.0
    norm_eps: Positive = 1e-6
    qk_norm: bool = False
    """RMSNorm over the head dim of queries and keys (Qwen3)."""
    qkv_bias: bool = False
    """Bias on queries, keys and values (Qwen2)."""
    tied_head: bool = True
    """The output head is the embedding."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and of the policy's parameters. Masters, norms, softmax, head and log-probs are f32 always."""

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    def problems(self, tensor: int) -> list[str]:
        """What does not divide, in words; `tensor` is the size of that mesh axis."""
        found = []
        if self.heads % self.kv_heads:
            found.append(f"model.heads: got {self.heads}, want a multiple of model.kv_heads ({self.kv_heads})")
        if self.head_dim % 2:
            found.append(f"model.head_dim: got {self.head_dim}, want an even number (RoPE turns pairs)")
        for name in ("kv_heads", "d_mlp", "vocab_size"):
            size = getattr(self, name)
            if size % tensor:
                works = ", ".join(str(d) for d in range(1, size + 1) if size % d == 0)
                found.append(f"mesh.tensor: got {tensor}, want a divisor of model.{name} ({size}): {works}")
        return found

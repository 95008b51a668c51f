"""Supported architectures of config.json, with the defaults of transformers 5.23 for keys that a file leaves out."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Family:
    """One architecture: the `model_type` of its files, and defaults for keys that they may leave out."""

    architecture: str
    model_type: str
    defaults: Mapping[str, Any]
    gemma: bool = False
    """Norms multiply by 1 + w and also follow attention and MLP; embeddings are scaled; attention has a `query_pre_attn_scalar`."""
    qk_norm: bool = False
    qkv_bias: bool = False
    experts: bool = False


_COMMON = {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "max_position_embeddings": 32_768, "attention_bias": False}
_LLAMA = {
    **_COMMON,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
    "mlp_bias": False,
}
_MISTRAL = {
    **_COMMON,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "max_position_embeddings": 131_072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}
_QWEN = {
    **_COMMON,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_MOE = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_experts": 128,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": (),
}
_GEMMA = {
    **_COMMON,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "max_position_embeddings": 8192,
    "use_bidirectional_attention": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
_GEMMA3 = {
    **_GEMMA,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "sliding_window_pattern": 6,
    "max_position_embeddings": 131_072,
}

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.architecture: family
        for family in (
            Family("LlamaForCausalLM", "llama", _LLAMA),
            Family("MistralForCausalLM", "mistral", _MISTRAL),
            Family("Qwen2ForCausalLM", "qwen2", _QWEN, qkv_bias=True),
            Family("Qwen3ForCausalLM", "qwen3", {**_QWEN, "head_dim": 128}, qk_norm=True),
            Family("Qwen3MoeForCausalLM", "qwen3_moe", {**_QWEN, **_MOE}, qk_norm=True, experts=True),
            Family(
                "Gemma2ForCausalLM",
                "gemma2",
                {**_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
                gemma=True,
            ),
            Family("Gemma3ForCausalLM", "gemma3_text", _GEMMA3, gemma=True, qk_norm=True),
        )
    }
)

# Defaults of a multimodal Gemma 3, which leaves even the sizes out of its text_config.
GEMMA3_SIZES: Mapping[str, int] = MappingProxyType(
    {
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
    }
)

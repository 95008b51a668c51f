"""Write a ModelConfig as config.json: find its family, and write that family's keys."""

import dataclasses
import math
from typing import Any

from jaxrl_llm.errors import UserError
from jaxrl_llm.model.config import ModelConfig, RopeScaling
from jaxrl_llm.model.hf.config import ACTIVATIONS
from jaxrl_llm.model.hf.families import FAMILIES, Family


def write_config(cfg: ModelConfig, dtype: str, length: int) -> dict[str, Any]:
    """Return the config.json of the family of `cfg`, in a form that both transformers 4 and 5 read.

    `dtype` is that of the tensors, `length` becomes max_position_embeddings. Raises UserError if `cfg` belongs to no family, with
    the fields that differ from the closest one.
    """
    unfit = {name: _unfit(cfg, family) for name, family in FAMILIES.items()}
    name = min(unfit, key=lambda n: len(unfit[n]))
    if unfit[name]:
        lines = "\n".join(f"model.{line}" for line in unfit[name])
        raise UserError(f"model: got a configuration of no Hugging Face family, want one; for {name}:\n{lines}")
    family = FAMILIES[name]
    found = {
        "architectures": [name],
        "model_type": family.model_type,
        "dtype": dtype,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_mlp,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_dim,
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": _write_scaling(cfg.rope_scaling),
        "max_position_embeddings": length,
        "tie_word_embeddings": cfg.tied_head,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": None,
        "hidden_activation" if family.gemma else "hidden_act": {v: k for k, v in ACTIVATIONS.items()}[cfg.activation],
    }
    return found | _write_attention(cfg, family) | _write_experts(cfg)


def _write_attention(cfg: ModelConfig, family: Family) -> dict[str, Any]:
    slides = any(cfg.sliding)
    found: dict[str, Any] = (
        {"sliding_window": cfg.window if slides else None} if "sliding_window" in family.defaults else {}
    )
    if "use_sliding_window" in family.defaults:
        found["use_sliding_window"] = slides
    if family.gemma or ("max_window_layers" in family.defaults and not family.experts):
        kinds = [cfg.slides(i) for i in range(cfg.layers)]
        found["layer_types"] = ["sliding_attention" if kind else "full_attention" for kind in kinds]
    if family.gemma:
        found |= {
            "query_pre_attn_scalar": round(_query_scalar(cfg)),
            "attn_logit_softcapping": cfg.attention_softcap,
            "final_logit_softcapping": cfg.logit_softcap,
            # transformers wants a number even if no layer slides.
            "sliding_window": cfg.window or 4096,
        }
    if "rope_local_base_freq" in family.defaults:
        found["rope_local_base_freq"] = cfg.sliding_rope_theta or cfg.rope_theta
    return found


def _write_experts(cfg: ModelConfig) -> dict[str, Any]:
    if not cfg.experts:
        return {}
    return {
        "num_experts": cfg.experts,
        "num_experts_per_tok": cfg.experts_per_token,
        "moe_intermediate_size": cfg.d_mlp,
        "norm_topk_prob": cfg.norm_top_k,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _write_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    found = {key: value for key, value in dataclasses.asdict(scaling).items() if value is not None}
    found["rope_type"] = found.pop("kind")
    if "original_length" in found:
        found["original_max_position_embeddings"] = found.pop("original_length")
    return found


def _query_scalar(cfg: ModelConfig) -> float:
    """Gemma's query_pre_attn_scalar: attention scores are multiplied by its -0.5th power."""
    return cfg.head_dim if cfg.attention_scale is None else cfg.attention_scale**-2


def _unfit(cfg: ModelConfig, family: Family) -> list[str]:
    """Return the fields with which `cfg` cannot be written as this family: name, got, want."""
    sliding = {cfg.slides(i) for i in range(cfg.layers)}
    mixed = len(sliding) > 1
    plain_scale = cfg.attention_scale is None or math.isclose(cfg.attention_scale, cfg.head_dim**-0.5)
    scalar = _query_scalar(cfg)
    same_theta = cfg.sliding_rope_theta is None or True not in sliding
    wanted = [
        *((name, getattr(cfg, name), family.gemma) for name in ("norm_plus_one", "sandwich_norms", "scale_embedding")),
        ("qk_norm", cfg.qk_norm, family.qk_norm),
        ("qkv_bias", cfg.qkv_bias, family.qkv_bias),
    ]
    found = [f"{name}: got {got}, want {want}" for name, got, want in wanted if got != want]
    if bool(cfg.experts) != family.experts:
        found.append(f"experts: got {cfg.experts}, want {'some' if family.experts else 0}")
    caps = () if family.architecture == "Gemma2ForCausalLM" else ("attention_softcap",)
    caps = caps if family.gemma else (*caps, "logit_softcap")
    found += [f"{name}: got {getattr(cfg, name)}, want none" for name in caps if getattr(cfg, name) is not None]
    if not (plain_scale if not family.gemma else math.isclose(scalar, round(scalar), rel_tol=1e-6)):
        want = "the -0.5th power of a whole number" if family.gemma else f"none or {cfg.head_dim**-0.5}"
        found.append(f"attention_scale: got {cfg.attention_scale}, want {want}")
    if (
        family.architecture in ("LlamaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM")
        and cfg.d_model % cfg.heads
    ):
        found.append(f"d_model: got {cfg.d_model}, want a multiple of heads ({cfg.heads})")
    if True in sliding and "sliding_window" not in family.defaults:
        found.append("sliding: got layers with a sliding window, want none")
    if mixed and (family.experts or not (family.gemma or "max_window_layers" in family.defaults)):
        found.append("sliding: got some layers with a sliding window, want all or none")
    if "rope_local_base_freq" not in family.defaults and not same_theta:
        found.append(f"sliding_rope_theta: got {cfg.sliding_rope_theta}, want none")
    if "rope_local_base_freq" in family.defaults and same_theta and True in sliding and cfg.rope_scaling is not None:
        found.append(
            "sliding_rope_theta: got none beside rope_scaling, want a number: RoPE is never scaled in sliding layers"
        )
    return found

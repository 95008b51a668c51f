"""Read config.json into a ModelConfig.

Both forms are read: that of transformers 4 (rope_theta, rope_scaling) and that of 5 (rope_parameters, layer_types).
Nothing is guessed: every key with a value that the transformer does not support is refused by name, all in one message.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from jaxrl_llm.errors import UserError
from jaxrl_llm.model.config import LinearRope, Llama3Rope, ModelConfig, RopeScaling, YarnRope
from jaxrl_llm.model.hf.families import FAMILIES, GEMMA3_SIZES, Family

ACTIVATIONS: Mapping[str, Literal["silu", "gelu_tanh"]] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# Far above any model, and small enough that nothing computed from a wrong value takes long.
MAX_BY_KEY = {
    "num_hidden_layers": 10_000,
    "num_experts": 100_000,
    "max_position_embeddings": 2**40,
    "sliding_window": 2**40,
}
MAX_COUNT, MAX_EXPERTS, MAX_NUMBER = 2**26, 10**6, 1e30
MAX_JSON_BYTES = 2**28
# Multimodal Gemma 3: its text model is read, its vision tower ignored.
WITH_VISION = "Gemma3ForConditionalGeneration"


class _Keys:
    """Typed access to one JSON object; errors are collected in `problems`, each with the key's full name."""

    def __init__(self, values: Mapping[str, Any], prefix: str, problems: list[str]):
        self.values, self.prefix, self.problems = values, prefix, problems

    def refuse(self, key: str, want: str) -> None:
        got = json.dumps(self.values[key]) if key in self.values else "nothing"
        self.problems.append(f"{self.prefix}{key}: got {got[:80]}, want {want}")

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def count(self, key: str) -> int:
        """A positive integer; 1 if it is not one, so that reading continues."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.refuse(key, "a whole number of at least 1")
            return 1
        if value > (most := MAX_BY_KEY.get(key, MAX_COUNT)):
            self.refuse(key, f"{most:,} at most")
            return 1
        return value

    def count_or_zero(self, key: str) -> int:
        return 0 if self.get(key) == 0 and not isinstance(self.get(key), bool) else self.count(key)

    def positive(self, key: str) -> float:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_NUMBER:
            self.refuse(key, "a number above 0" + (f", {MAX_NUMBER:g} at most" if _is_large(value) else ""))
            return 1.0
        return float(value)

    def positive_or_none(self, key: str) -> float | None:
        return None if self.get(key) is None else self.positive(key)

    def positive_or(self, key: str, default: float) -> float:
        """A positive number; `default` for a missing key or 0, as in transformers."""
        return default if self.get(key) in (None, 0) else self.positive(key)

    def flag(self, key: str) -> bool:
        if not isinstance(self.get(key), bool):
            self.refuse(key, "true or false")
        return bool(self.get(key))

    def word(self, key: str, allowed: tuple[str, ...]) -> str:
        """One of `allowed`; the first if it is not one of them."""
        value = self.get(key)
        if not isinstance(value, str) or value not in allowed:
            self.refuse(key, f"one of {', '.join(allowed)}")
            return allowed[0]
        return value

    def only(self, key: str, allowed: tuple[Any, ...], why: str) -> None:
        """Refuse a key that is present with another value than `allowed`."""
        if key in self.values and self.values[key] not in allowed:
            self.refuse(key, f"{' or '.join(json.dumps(a) for a in allowed)}: {why}")


def _is_large(value: Any) -> bool:
    return isinstance(value, int | float) and value > MAX_NUMBER


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises UserError if the file is missing or holds anything else."""
    try:
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise UserError(f"{path}: got {size:,} bytes, want a JSON object of {MAX_JSON_BYTES:,} at most")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path.parent}: got a directory without {path.name}, want a Hugging Face model directory"
            if path.parent.is_dir()
            else f"{path.parent}: got a path that does not exist, want a Hugging Face model directory"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: got a file that cannot be read ({error}), want a JSON object") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: got {type(value).__name__}, want a JSON object")
    return value


def read_config(directory: str | Path, compute: Literal["float32", "bfloat16"] = "float32") -> ModelConfig:
    """Return the ModelConfig of a model directory's config.json, with the compute dtype `compute`.

    Raises:
        UserError: the file is missing, or the architecture unknown; or with every invalid or unsupported key in one message.
    """
    path = Path(directory) / "config.json"
    family, given = _family(read_json(path), path)
    problems: list[str] = []
    keys = _Keys({**family.defaults, **given}, f"{path}: ", problems)
    _refuse_unsupported(keys, family)
    heads, d_model, layers = (keys.count(k) for k in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    sliding = _sliding(keys, family, layers)
    theta, scaling, local_theta = _rope(keys, family)
    act = "hidden_activation" if family.gemma else "hidden_act"
    activation = keys.word(act, tuple(ACTIVATIONS))
    cfg = ModelConfig(
        vocab_size=keys.count("vocab_size"),
        layers=layers,
        d_model=d_model,
        heads=heads,
        kv_heads=heads if keys.get("num_key_value_heads") is None else keys.count("num_key_value_heads"),
        head_dim=max(d_model // heads, 1) if keys.get("head_dim") is None else keys.count("head_dim"),
        d_mlp=keys.count("moe_intermediate_size" if family.experts else "intermediate_size"),
        activation=ACTIVATIONS[activation],
        rope_theta=theta,
        rope_scaling=scaling,
        window=keys.count("sliding_window") if any(sliding) else 0,
        sliding=sliding,
        sliding_rope_theta=local_theta if any(sliding) else None,
        attention_scale=keys.positive("query_pre_attn_scalar") ** -0.5 if family.gemma else None,
        attention_softcap=keys.positive_or_none("attn_logit_softcapping") if family.gemma else None,
        logit_softcap=keys.positive_or_none("final_logit_softcapping") if family.gemma else None,
        norm_eps=keys.positive("rms_norm_eps"),
        norm_plus_one=family.gemma,
        sandwich_norms=family.gemma,
        scale_embedding=family.gemma,
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias,
        tied_head=keys.flag("tie_word_embeddings"),
        experts=keys.count("num_experts") if family.experts else 0,
        experts_per_token=keys.count("num_experts_per_tok") if family.experts else 0,
        norm_top_k=keys.flag("norm_topk_prob") if family.experts else True,
        compute=compute,
    )
    if cfg.layers * cfg.experts > MAX_EXPERTS:
        keys.refuse("num_experts", f"{MAX_EXPERTS:,} at most, all of {cfg.layers:,} layers together")
    problems += [f"{path}: {line}" for line in ([] if problems else cfg.problems(tensor=1))]
    if problems:
        raise UserError("\n".join(problems))
    return cfg


def _family(given: dict[str, Any], path: Path) -> tuple[Family, dict[str, Any]]:
    """Return the family, and the JSON object with its keys."""
    named = given.get("architectures")
    if not named:
        by_type = {family.model_type: name for name, family in FAMILIES.items()}
        kind = given.get("model_type")
        named = [by_type.get(str(kind), f"none (model_type {str(kind)[:80]!r})")]
    name = str(named[0] if isinstance(named, list) and len(named) == 1 else named)[:160]
    if name == WITH_VISION:
        if not isinstance(given.get("text_config"), dict):
            raise UserError(f"{path}: text_config: got no object, want the text model's keys")
        inside = {key: given[key] for key in ("tie_word_embeddings", "quantization_config") if key in given}
        return FAMILIES["Gemma3ForCausalLM"], {**GEMMA3_SIZES, **inside, **given["text_config"]}
    if name not in FAMILIES:
        code = "; code that comes with a model (auto_map) is never run" if "auto_map" in given else ""
        raise UserError(f"{path}: architectures: got {name}, want one of {', '.join((*FAMILIES, WITH_VISION))}{code}")
    if "num_local_experts" in given:
        given = {"num_experts": given["num_local_experts"], **given}
    return FAMILIES[name], given


def _refuse_unsupported(keys: _Keys, family: Family) -> None:
    if not family.qkv_bias:
        keys.only("attention_bias", (False, None), "attention has no bias")
    keys.only("mlp_bias", (False, None), "the MLP has no bias")
    keys.only("quantization_config", (None,), "pass a checkpoint that is not quantized")
    keys.only("use_bidirectional_attention", (False, None), "attention is causal")
    keys.only("partial_rotary_factor", (None, 1, 1.0), "all dimensions of a head are rotated")
    if family.gemma and family.qk_norm:
        keys.only("attn_logit_softcapping", (None,), "Gemma 3 has no soft cap, and transformers ignores this key")
    if family.experts:
        keys.only("decoder_sparse_step", (1,), "every layer has experts")
        if keys.get("mlp_only_layers"):
            keys.refuse("mlp_only_layers", "[]: every layer has experts")


def _sliding(keys: _Keys, family: Family, layers: int) -> tuple[bool, ...]:
    """Return, per layer, whether it has a sliding window; empty if no layer has."""
    window, types = keys.get("sliding_window"), keys.get("layer_types")
    if "use_sliding_window" in family.defaults and not keys.flag("use_sliding_window"):
        window = None
    uniform = family.experts or not (family.gemma or "max_window_layers" in family.defaults)
    if types is not None and not _are_layer_types(keys, types, layers, uniform):
        return ()
    if types is not None and not uniform:
        sliding = tuple(kind == "sliding_attention" for kind in types)
    elif "sliding_window_pattern" in family.defaults:
        pattern = keys.count("sliding_window_pattern")
        sliding = tuple((i + 1) % pattern != 0 for i in range(layers))
    elif family.gemma:
        sliding = tuple(i % 2 == 0 for i in range(layers))
    elif uniform:
        sliding = (window is not None and "sliding_window" in family.defaults,) * layers
    else:
        full = keys.count_or_zero("max_window_layers")
        sliding = tuple(window is not None and i >= full for i in range(layers))
    if any(sliding) and window is None:
        keys.refuse(
            "sliding_window",
            "a whole number of at least 1, for the layers with a sliding window (use_sliding_window true)",
        )
        return ()
    return sliding if any(sliding) else ()


def _are_layer_types(keys: _Keys, types: Any, layers: int, uniform: bool) -> bool:
    known = ("sliding_attention", "full_attention")
    if not isinstance(types, list) or len(types) != layers or not all(kind in known for kind in types):
        keys.refuse("layer_types", f"{' or '.join(known)} for each of {layers} layers")
    elif uniform and len(set(types)) > 1:
        keys.refuse("layer_types", "the same for all layers of this architecture")
    else:
        return True
    return False


def _rope(keys: _Keys, family: Family) -> tuple[float, RopeScaling | None, float | None]:
    """Return theta, the scaling, and the theta of sliding layers (None for families with a single theta)."""
    name = "rope_scaling" if keys.get("rope_scaling") else "rope_parameters"
    given = keys.get(name) or {}
    nested = isinstance(given, dict) and any(key in given for key in ("full_attention", "sliding_attention"))
    has_local_theta = "rope_local_base_freq" in family.defaults
    parts = [given.get(part) or {} for part in ("full_attention", "sliding_attention")] if nested else []
    if (
        not isinstance(given, dict)
        or (nested and not has_local_theta)
        or not all(isinstance(part, dict) for part in parts)
    ):
        keys.refuse(name, "one object for all layers")
        return 1.0, None, None
    full, local = parts if nested else (given, {})
    where = f"{keys.prefix}{name}.{'full_attention.' if nested else ''}"
    outer = {k: keys.get(k) for k in ("rope_theta", "max_position_embeddings", "original_max_position_embeddings")}
    scaling = _scaling(_Keys({**outer, **full}, where, keys.problems), outer["original_max_position_embeddings"])
    theta = _Keys({**outer, **full}, where, keys.problems).positive("rope_theta")
    if not has_local_theta:
        return theta, scaling, None
    inner = _Keys(
        {"rope_theta": keys.get("rope_local_base_freq"), **local},
        f"{keys.prefix}{name}.sliding_attention.",
        keys.problems,
    )
    inner.only("rope_type", ("default",), "RoPE is not scaled in sliding layers")
    return theta, scaling, inner.positive("rope_theta")


def _scaling(keys: _Keys, outer_original: Any) -> RopeScaling | None:
    keys.only("partial_rotary_factor", (None, 1, 1.0), "all dimensions of a head are rotated")
    name = "rope_type" if "rope_type" in keys.values else "type"
    kind = keys.word(name, ROPE_TYPES) if name in keys.values else "default"
    if kind == "default":
        return None
    # As in transformers: the outer key takes precedence; without either, the whole length.
    original = (
        outer_original or keys.values.get("original_max_position_embeddings") or keys.get("max_position_embeddings")
    )
    keys = _Keys({**keys.values, "original_max_position_embeddings": original}, keys.prefix, keys.problems)
    if kind == "linear":
        return LinearRope(keys.positive("factor"))
    length = keys.count("original_max_position_embeddings")
    if kind == "llama3":
        return Llama3Rope(
            keys.positive("factor"), length, keys.positive("low_freq_factor"), keys.positive("high_freq_factor")
        )
    if keys.get("factor") is None:
        keys = _Keys(
            {**keys.values, "factor": keys.count("max_position_embeddings") / length}, keys.prefix, keys.problems
        )
    factor = keys.positive("factor")
    return YarnRope(
        factor,
        length,
        beta_fast=keys.positive_or("beta_fast", 32.0),
        beta_slow=keys.positive_or("beta_slow", 1.0),
        attention_factor=_attention_factor(keys, factor),
        truncate=keys.get("truncate") is None or keys.flag("truncate"),
    )


def _attention_factor(keys: _Keys, factor: float) -> float | None:
    """Return the given factor, or the one of DeepSeek's two mscales; None: the default of YarnRope."""
    both = ("mscale", "mscale_all_dim")
    if keys.get("attention_factor") is not None or not all(map(keys.get, both)):
        return keys.positive_or_none("attention_factor")
    numerator, denominator = (0.1 * keys.positive(m) * math.log(max(factor, 1.0)) + 1.0 for m in both)
    return numerator / denominator

"""config.json: values read from each form, and keys refused by name."""

import json

import pytest

from jaxrl_llm.errors import UserError
from jaxrl_llm.model.config import LinearRope, Llama3Rope, ModelConfig, YarnRope
from jaxrl_llm.model.hf.config import read_config

SIZES = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


def read(tmp_path, architecture="LlamaForCausalLM", **given):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture], **SIZES, **given}))
    return read_config(tmp_path)


def test_llama_as_published(tmp_path):
    """The keys of Llama-3.2-1B, in the form of transformers 4."""
    scaling = {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    found = read(
        tmp_path,
        head_dim=64,
        hidden_act="silu",
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=scaling,
        tie_word_embeddings=True,
        torch_dtype="bfloat16",
        attention_bias=False,
        mlp_bias=False,
        pretraining_tp=1,
    )
    assert found == ModelConfig(
        vocab_size=128256,
        layers=3,
        d_model=2048,
        heads=32,
        kv_heads=8,
        head_dim=64,
        d_mlp=8192,
        rope_theta=500000.0,
        rope_scaling=Llama3Rope(32.0, 8192, 1.0, 4.0),
        norm_eps=1e-5,
    )


def test_both_forms_of_rope_read_the_same(tmp_path):
    old = read(tmp_path, rope_theta=7.0, rope_scaling={"type": "linear", "factor": 2})
    new = read(tmp_path, rope_parameters={"rope_theta": 7.0, "rope_type": "linear", "factor": 2.0})
    assert old == new and (old.rope_theta, old.rope_scaling) == (7.0, LinearRope(2.0))


def test_yarn_defaults_of_missing_keys(tmp_path):
    """The original length defaults to the whole length; two mscales give the attention factor."""
    plain = read(tmp_path, max_position_embeddings=64, rope_scaling={"rope_type": "yarn", "factor": 4.0})
    assert plain.rope_scaling == YarnRope(4.0, 64)
    both = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "mscale": 2.0,
        "mscale_all_dim": 1.0,
    }
    # (0.2 ln 4 + 1) / (0.1 ln 4 + 1)
    assert read(tmp_path, rope_scaling=both).rope_scaling.attention_factor == pytest.approx(1.2772589 / 1.1386294)


def test_family_defaults_of_missing_keys(tmp_path):
    """The defaults of transformers: old files leave out keys with these values."""
    assert read(tmp_path).head_dim == 64
    assert read(tmp_path, "Qwen3ForCausalLM").head_dim == 128
    assert not read(tmp_path, "Qwen2ForCausalLM").tied_head
    mistral = read(tmp_path, "MistralForCausalLM")
    assert (mistral.window, mistral.sliding) == (4096, (True, True, True))
    assert read(tmp_path, "MistralForCausalLM", sliding_window=None).sliding == ()
    gemma = read(tmp_path, "Gemma2ForCausalLM")
    assert gemma.tied_head and gemma.sliding == (True, False, True)
    assert (gemma.attention_softcap, gemma.logit_softcap, gemma.attention_scale) == (50.0, 30.0, 1 / 16)


def test_sliding_layers_in_every_form(tmp_path):
    qwen = {"architecture": "Qwen2ForCausalLM", "sliding_window": 8}
    assert read(tmp_path, **qwen, max_window_layers=1).sliding == ()
    assert read(tmp_path, **qwen, max_window_layers=1, use_sliding_window=True).sliding == (False, True, True)
    gemma3 = read(tmp_path, "Gemma3ForCausalLM", sliding_window_pattern=2, rope_local_base_freq=5.0)
    assert (gemma3.sliding, gemma3.rope_theta, gemma3.sliding_rope_theta) == ((True, False, True), 1e6, 5.0)


def test_the_text_model_of_multimodal_gemma_3(tmp_path):
    """As in google/gemma-3-4b-it, whose text_config leaves out keys with default values."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    scaling = {"factor": 8.0, "rope_type": "linear"}
    given = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {**text, "rope_scaling": scaling}}
    (tmp_path / "config.json").write_text(json.dumps(given))
    found = read_config(tmp_path)
    assert (found.vocab_size, found.heads, found.kv_heads, found.head_dim) == (262208, 8, 4, 256)
    assert (found.rope_scaling, found.sliding[:7]) == (LinearRope(8.0), (True,) * 5 + (False, True))


REFUSED = {
    "attention_bias": (True, "attention_bias: got true, want false or null: attention has no bias"),
    "mlp_bias": (True, "mlp_bias: got true, want false or null: the MLP has no bias"),
    "partial_rotary_factor": (
        0.5,
        "partial_rotary_factor: got 0.5, want null or 1 or 1.0: all dimensions of a head are rotated",
    ),
    "quantization_config": (
        {"bits": 4},
        'quantization_config: got {"bits": 4}, want null: pass a checkpoint that is not',
    ),
    "rope_scaling": (
        {"rope_type": "dynamic", "factor": 2.0},
        'rope_scaling.rope_type: got "dynamic", want one of default, linear, llama3, yarn',
    ),
    "hidden_act": ("relu", 'hidden_act: got "relu", want one of silu, gelu_pytorch_tanh'),
    "vocab_size": ("many", 'vocab_size: got "many", want a whole number of at least 1'),
    "num_key_value_heads": (5, "model.heads: got 32, want a multiple of model.kv_heads (5)"),
    "layer_types": (["full_attention"], "layer_types: got "),
}


@pytest.mark.parametrize("key", REFUSED)
def test_unsupported_keys_are_refused_by_name(key, tmp_path):
    value, message = REFUSED[key]
    with pytest.raises(UserError) as caught:
        read(tmp_path, **{key: value})
    assert str(caught.value).startswith(f"{tmp_path}/config.json: {message}") and "\n" not in str(caught.value)


def test_layers_that_differ_are_refused(tmp_path):
    with pytest.raises(UserError) as caught:
        read(tmp_path, "Qwen3MoeForCausalLM", mlp_only_layers=[0], decoder_sparse_step=2)
    assert str(caught.value).splitlines() == [
        f"{tmp_path}/config.json: decoder_sparse_step: got 2, want 1: every layer has experts",
        f"{tmp_path}/config.json: mlp_only_layers: got [0], want []: every layer has experts",
    ]


def test_gemma_3_with_a_soft_cap_on_scores_is_refused(tmp_path):
    """Ambiguous: transformers keeps the number and never applies it."""
    with pytest.raises(UserError, match=r"attn_logit_softcapping: got 50.0, want null: Gemma 3 has no soft cap"):
        read(tmp_path, "Gemma3ForCausalLM", attn_logit_softcapping=50.0)


def test_an_unknown_architecture_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(UserError) as caught:
        read(tmp_path, "Phi3ForCausalLM", auto_map={"AutoModelForCausalLM": "modeling.Evil"})
    assert str(caught.value) == (
        f"{tmp_path}/config.json: architectures: got Phi3ForCausalLM, want one of LlamaForCausalLM, MistralForCausalLM, "
        "Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM, Gemma2ForCausalLM, Gemma3ForCausalLM, "
        "Gemma3ForConditionalGeneration; code that comes with a model (auto_map) is never run"
    )

"""Untrusted files: any config.json or safetensors header is read, or refused at once with a line that names file and key."""

import json
import math
import struct
import time

import pytest
from hf_cases import case, load_model
from setups import layouts

from jaxrl_llm.errors import UserError
from jaxrl_llm.model.hf.config import read_config
from jaxrl_llm.model.hf.families import FAMILIES

SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32}
WRONG = [None, True, 0, -1, 1.5, 1e308, math.nan, 10**30, 10**400, "x", [1], [[1]], {"a": 1}, {"full_attention": 3}]
KEYS = {key for family in FAMILIES.values() for key in family.defaults} | set(SIZES) | {
    "architectures", "model_type", "head_dim", "layer_types", "rope_scaling", "rope_parameters", "quantization_config",
    "partial_rotary_factor", "num_local_experts", "original_max_position_embeddings",
}  # fmt: skip
ROPE = (
    "rope_type", "type", "factor", "rope_theta", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor",
    "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate", "partial_rotary_factor",
)  # fmt: skip


def message(directory, values) -> str:
    """The message of the refusal; "" if the values are read."""
    path = directory / "config.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    try:
        found = read_config(directory)
    except UserError as error:
        assert all(line.startswith(f"{directory}") for line in str(error).splitlines()) and len(str(error)) < 3000
        return str(error).removeprefix(f"{path}: ")
    assert 1 <= found.layers <= 10_000 and found.rope_theta <= 1e30
    return ""


@pytest.mark.parametrize("name", ["Qwen3MoeForCausalLM", "Gemma3ForCausalLM"])
def test_any_value_of_any_key_is_read_or_refused_by_name(tmp_path, name):
    start, model = time.monotonic(), {"architectures": [name], **SIZES}
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}
    for value in WRONG:
        for key in sorted(KEYS):
            message(tmp_path, {**model, key: value})
        for key in ROPE:
            message(tmp_path, {**model, "rope_scaling": {**yarn, key: value}})
    assert time.monotonic() - start < 60


LLAMA = {"architectures": ["LlamaForCausalLM"], **SIZES}
BY_HAND = [
    ({"num_hidden_layers": 10**9}, "num_hidden_layers: got 1000000000, want 10,000 at most"),
    ({"num_hidden_layers": [3]}, "num_hidden_layers: got [3], want a whole number of at least 1"),
    ({"num_hidden_layers": 3.0}, "num_hidden_layers: got 3.0, want a whole number of at least 1"),
    ({"vocab_size": True}, "vocab_size: got true, want a whole number of at least 1"),
    ({"head_dim": 10**12}, "head_dim: got 1000000000000, want 67,108,864 at most"),
    ({"hidden_act": ["silu"]}, 'hidden_act: got ["silu"], want one of silu, gelu_pytorch_tanh'),
    ({"rope_theta": math.nan}, "rope_parameters.rope_theta: got NaN, want a number above 0"),
    ({"rope_theta": 10**400}, f"rope_parameters.rope_theta: got 1{'0' * 79}, want a number above 0, 1e+30 at most"),
    ({"rope_scaling": [1]}, "rope_scaling: got [1], want one object for all layers"),
    ({"rope_scaling": {"rope_type": ["yarn"]}}, 'rope_scaling.rope_type: got ["yarn"], want one of default, linear, llama3, yarn'),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "mscale": "1", "mscale_all_dim": 1}},
     'rope_scaling.mscale: got "1", want a number above 0'),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "truncate": "no"}}, 'rope_scaling.truncate: got "no", want true or false'),
    ({"tie_word_embeddings": "false"}, 'tie_word_embeddings: got "false", want true or false'),
    ({"architectures": [["LlamaForCausalLM"]]}, "architectures: got ['LlamaForCausalLM'], want one of "),
    ({"architectures": None, "model_type": ["llama"]}, """architectures: got none (model_type "['llama']"), want one of """),
    ({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": 1}, "text_config: got no object, want the text"),
    ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "max_window_layers": [1]},
     "max_window_layers: got [1], want a whole number of at least 1"),
    ({"architectures": ["Gemma3ForCausalLM"], "rope_parameters": {"full_attention": 3}},
     'rope_parameters: got {"full_attention": 3}, want one object for all layers'),
    ({"architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 10_000, "num_experts": 100_000},
     "num_experts: got 100000, want 1,000,000 at most, all of 10,000 layers together"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "want"), BY_HAND, ids=lambda value: str(value)[:30])
def test_wrong_types_by_hand(tmp_path, change, want):
    assert message(tmp_path, {**LLAMA, **change}).startswith(want)


def test_a_file_without_a_json_object(tmp_path):
    for text in ("[" * 100_000, '{"a":' * 100_000, "", "[]", "null", "\x00", '{"vocab_size": ' + "9" * 5000 + "}"):
        assert "want a JSON object" in message(tmp_path, text)


def test_a_model_beside_a_config_that_is_wrong(tmp_path):
    """As seen by the command line."""
    from test_bad_input import jaxrl

    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": 10**9}))
    words = jaxrl("train", "configs/arithmetic.yaml", "--run-dir", tmp_path / "run", "--model.path", tmp_path)
    assert f"{tmp_path}/config.json: num_hidden_layers: got 1000000000, want 10,000 at most" in words


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = case("llama_1").write(tmp_path_factory.mktemp("model"))
    raw = (directory / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return directory, json.loads(raw[8 : 8 + length]), raw[8 + length :]


def refused(directory, header, body, length=None) -> str:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = directory / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    with pytest.raises(UserError) as caught:
        load_model(directory, layouts()[0])
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


NORM = "model.norm.weight"
CANNOT = "got a file whose header cannot be read, want safetensors ("


@pytest.mark.parametrize(
    ("change", "want"),
    [
        ({"shape": [1.5]}, f"{NORM}: shape: got [1.5], want whole numbers"),
        ({"shape": [-1]}, f"{NORM}: shape: got [-1], want whole numbers"),
        ({"shape": "x"}, f'{NORM}: shape: got "x", want whole numbers'),
        ({"shape": [2**62] * 4}, f"{NORM}: data_offsets: got "),
        ({"shape": [True]}, f"{NORM}: shape: got [true], want whole numbers"),
        ({"dtype": 7}, f"{NORM}: dtype: got 7, want a name"),
        ({"dtype": ["F32"]}, f'{NORM}: dtype: got ["F32"], want a name'),
        ({"dtype": "F64"}, f"{NORM}: data_offsets: got "),
        ({"data_offsets": [0]}, f"{NORM}: data_offsets: got [0], want [begin, end]"),
        ({"data_offsets": [8, 4]}, f"{NORM}: data_offsets: got [8, 4], want [begin, end]"),
        ({"data_offsets": [-8, 4]}, f"{NORM}: data_offsets: got [-8, 4], want [begin, end]"),
        ({"data_offsets": None}, f"{NORM}: data_offsets: got null, want [begin, end]"),
        ({"data_offsets": [0.0, 1e99]}, f"{NORM}: data_offsets: got [0.0, 1e+99], want [begin, end]"),
    ],
    ids=str,
)
def test_a_header_with_wrong_types(model, change, want):
    directory, header, body = model
    assert CANNOT + want in refused(directory, {**header, NORM: {**header[NORM], **change}}, body)


def test_a_header_of_wrong_length(model):
    directory, header, body = model
    first, last = header[NORM]["data_offsets"]
    width = last - first
    moved = {**header, NORM: {**header[NORM], "data_offsets": [first + 10**15, last + 10**15]}}
    assert f"got {NORM} at byte " in refused(directory, moved, body)
    shared = {**header, "again": header[NORM]}
    assert ", where the tensor before it ends" in refused(directory, shared, body)
    assert CANNOT + "it claims" in refused(directory, header, body, 2**63)
    assert CANNOT + "it claims" in refused(directory, b"", b"", 0)
    for text in (b"[]", b"{" * 60_000, b'{"a": 1}', b'{"a": []}', b"\xff\xfe{}"):
        assert CANNOT in refused(directory, text, b"\0" * width)


def test_an_index_that_leaves_its_directory(model, tmp_path):
    directory, _, _ = model
    index = directory / "model.safetensors.index.json"
    for files in ("../../etc/passwd", "/etc/passwd", 3, None, ["a"], "a/b"):
        index.write_text(json.dumps({"weight_map": {NORM: files}}))
        with pytest.raises(UserError, match=r"weight_map: got no table of tensors and file names, want one"):
            load_model(directory, layouts()[0])
    for files in ("..", ".", "", "a\0b", "x" * 300):
        index.write_text(json.dumps({"weight_map": {NORM: files}}))
        with pytest.raises(UserError):
            load_model(directory, layouts()[0])
    index.unlink()

"""Bad directories, each with one message; other forms of the same weights; and the memory that loading takes."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from hf_cases import case, equal, load_model, write_tensors
from setups import layouts

from jaxrl_llm.errors import UserError
from jaxrl_llm.model.hf import checkpoint
from jaxrl_llm.model.hf import load as loading
from jaxrl_llm.model.hf.source import resolve

LLAMA = "llama_1"
NORM = "model.norm.weight"


def message(directory):
    with pytest.raises(UserError) as caught:
        load_model(directory, layouts()[0])
    return str(caught.value)


def changed(tmp_path, change, max_bytes=10**9):
    """The model directory after `change(weights)`."""
    weights = case(LLAMA).weights
    change(weights)
    return case(LLAMA).write(tmp_path / "model", max_bytes, weights)


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(
        UserError, match=r"nowhere: got a path that does not exist, want a Hugging Face model directory"
    ):
        resolve(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: got a file, want a Hugging Face model directory"):
        resolve(tmp_path / "file")


def test_a_directory_without_config(tmp_path):
    want = f"{tmp_path}: got a directory without config.json, want a Hugging Face model directory"
    with pytest.raises(UserError) as caught:
        resolve(tmp_path)
    assert str(caught.value) == want == message(tmp_path)


def test_a_hub_name_that_cannot_be_downloaded(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(UserError, match=r"some/model: got neither .*no route.*pass the path of a local directory"):
        resolve("some/model")


def test_pickles_are_refused_with_the_reason(tmp_path):
    directory = case(LLAMA).write(tmp_path)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    assert "got pickle files (pytorch_model.bin), want safetensors: opening a pickle runs any code" in message(
        directory
    )


def test_a_directory_without_weights(tmp_path):
    directory = case(LLAMA).write(tmp_path)
    (directory / "model.safetensors").unlink()
    assert (
        message(directory)
        == f"{directory}: got neither model.safetensors nor model.safetensors.index.json, want one of them"
    )


def test_a_truncated_file_is_named_with_its_bytes(tmp_path):
    directory = case(LLAMA).write(tmp_path, 10_000)
    last = sorted(directory.glob("*.safetensors"))[-1]
    size = last.stat().st_size
    last.write_bytes(last.read_bytes()[:-8])
    assert message(directory) == (
        f"{last}: got {size - 8} bytes, want {size} by its header; it was cut short, copy or download it again"
    )
    last.write_bytes(b"\x40\x00\x00\x00\x00\x00\x00\x00{")
    assert message(directory).startswith(f"{last}: got a file whose header cannot be read, want safetensors (")


def test_a_listed_file_that_is_not_there(tmp_path):
    directory = case(LLAMA).write(tmp_path, 10_000)
    last = sorted(directory.glob("*.safetensors"))[-1]
    last.unlink()
    assert message(directory) == f"{last}: got no such file, want it: model.safetensors.index.json lists tensors in it"


def test_an_index_that_points_out_of_the_directory(tmp_path):
    directory = case(LLAMA).write(tmp_path, 10_000)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NORM: "../model.safetensors"}}))
    assert "weight_map: got no table of tensors and file names, want one" in message(directory)


def test_missing_unexpected_and_misshapen_tensors_all_at_once(tmp_path):
    def change(weights):
        weights["model.layers.0.mlp.extra.weight"] = weights.pop(NORM)
        weights["model.layers.1.self_attn.k_proj.weight"] = np.zeros((30, 29), np.float32)
        weights["model.layers.1.input_layernorm.weight"] = np.zeros(30, np.int32)

    directory = changed(tmp_path, change)
    assert message(directory).splitlines() == [
        f"{directory}: tensors missing: {NORM}",
        f"{directory}: tensors that the model of config.json does not have: model.layers.0.mlp.extra.weight (model.safetensors)",
        f"{directory}: tensors of another shape than by config.json: "
        "model.layers.1.self_attn.k_proj.weight (model.safetensors): got [30, 29], want [30, 30]",
        f"{directory}: tensors of a dtype other than F32, BF16, F16: "
        "model.layers.1.input_layernorm.weight (model.safetensors): got I32",
    ]


def test_harmless_extra_tensors_are_ignored(tmp_path):
    """Rotary buffers of old files; and a saved tied head, if it has the embedding's shape."""
    tied = case(LLAMA).weights["model.embed_tokens.weight"]

    def change(weights):
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(5, np.float32)
        weights["lm_head.weight"] = tied

    _, params = load_model(changed(tmp_path, change), layouts()[0])
    assert "head" not in params
    shutil.rmtree(tmp_path / "model")
    directory = changed(tmp_path, lambda weights: weights.update({"lm_head.weight": tied[1:]}))
    assert (
        message(directory)
        == f"{directory}: tensors that the model of config.json does not have: lm_head.weight (model.safetensors)"
    )


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_different_head_in_a_tied_model_is_refused(tmp_path, monkeypatch, dtype):
    """One number of 899 differs, in the last chunk that is compared."""
    monkeypatch.setattr(checkpoint, "COMPARE_CHUNK", 100)
    tied = case(LLAMA).weights["model.embed_tokens.weight"].astype(ml_dtypes.bfloat16)
    head = tied.astype(dtype)
    embed = {"model.embed_tokens.weight": tied}
    _, params = load_model(changed(tmp_path, lambda w: w.update(embed | {"lm_head.weight": head})), layouts()[0])
    assert "head" not in params
    shutil.rmtree(tmp_path / "model")
    other = head.copy()
    other[-1, -1] += 0.125
    directory = changed(tmp_path, lambda w: w.update(embed | {"lm_head.weight": other}))
    assert message(directory) == (
        f"{directory}/config.json: tie_word_embeddings: got true beside lm_head.weight (model.safetensors), which is no copy of "
        "the embedding, want false, for a model with that head, or files without it"
    )
    config = json.loads((directory / "config.json").read_text()) | {"tie_word_embeddings": False}
    (directory / "config.json").write_text(json.dumps(config))
    _, params = load_model(directory, layouts()[0])
    np.testing.assert_array_equal(params["head"], other.astype(np.float32))


def test_vision_tensors_are_ignored_only_in_a_multimodal_model(tmp_path):
    directory = changed(tmp_path, lambda w: w.update({"vision_tower.x.weight": np.zeros(3, np.float32)}))
    assert message(directory) == (
        f"{directory}: tensors that the model of config.json does not have: vision_tower.x.weight (model.safetensors)"
    )


def test_one_file_beside_an_index_of_others(tmp_path):
    """transformers would read the single file, we the others."""
    directory = case(LLAMA).write(tmp_path, 10_000)
    (directory / "model.safetensors").write_bytes(b"")
    assert message(directory) == (
        f"{directory}: got model.safetensors and model.safetensors.index.json, which does not name it, want one of them: they are "
        "two models"
    )


def test_experts_in_one_tensor_are_the_same_model(tmp_path):
    """As transformers 5 holds them: [E, 2 F, D], gate before up."""
    there, layout = case("qwen3_moe_0"), layouts((2, 2, 2))[0]
    _, want = load_model(there.write(tmp_path / "apart"), layout)
    weights = there.weights
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            np.stack([weights.pop(f"{name}.{e}.{matrix}_proj.weight") for e in range(4)])
            for matrix in ("gate", "up", "down")
        )
        weights[f"{name}.gate_up_proj"], weights[f"{name}.down_proj"] = np.concatenate([gate, up], axis=1), down
    _, found = load_model(there.write(tmp_path / "fused", weights=weights), layout)
    assert equal(found, want)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_the_text_model_beside_a_vision_tower(prefix, tmp_path):
    there = case("gemma3_text_0")
    _, want = load_model(there.write(tmp_path / "text"), layouts()[0])
    weights = {name.replace("model.", prefix, 1): x for name, x in there.weights.items()}
    vision = "vision_tower.x.weight" if prefix.startswith("language") else "model.vision_tower.x.weight"
    directory = tmp_path / "multimodal"
    directory.mkdir()
    text = {"rope_theta": 1e6, **there.golden["config"]}
    given = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    (directory / "config.json").write_text(json.dumps(given))
    write_tensors(directory, weights | {vision: np.zeros(3, np.float32)}, 10**9)
    assert equal(load_model(directory, layouts()[0])[1], want)


@pytest.fixture
def reads(monkeypatch):
    """Path and shape of every array that loading fills on the host."""
    found, whole = [], loading._read

    def counted(leaf, stored, box, dtype):
        numbers = whole(leaf, stored, box, dtype)
        found.append((leaf.path, numbers))
        return numbers

    monkeypatch.setattr(loading, "_read", counted)
    return found


def test_blocks_larger_than_a_chunk_go_to_the_device_a_few_layers_at_a_time(tmp_path, monkeypatch, reads):
    """A device's block of gate_up is 2 layers of 3072 bytes, of qkv 2 of 2048: the host reads at most one layer at a time."""
    layout = layouts((2, 2, 2))[0]
    directory = case("llama_0").write(tmp_path, 10_000)
    _, want = load_model(directory, layout)
    assert max(x.nbytes for _, x in reads) == 2 * 3072
    reads.clear()
    monkeypatch.setattr(loading, "CHUNK_BYTES", 3500)
    monkeypatch.setattr(loading, "MAX_MAPPED_BYTES", 1000)
    _, found = load_model(directory, layout)
    assert equal(found, want)
    assert [x.sharding for x in jax.tree.leaves(found)] == [x.sharding for x in jax.tree.leaves(want)]
    assert max(x.nbytes for _, x in reads) == 3072


def test_each_host_reads_only_what_its_devices_hold(tmp_path, reads):
    """Split four ways, with two copies: every number is read once, not once per device. An unsplit leaf: once for all eight."""
    _, params = load_model(case("llama_0").write(tmp_path), layouts((2, 2, 2))[0])
    sizes = {path: sum(x.size for at, x in reads if at == path) for path, _ in reads}
    assert sizes == {
        ("embed",): params["embed"].size,
        ("head",): params["head"].size,
        ("final_norm",): params["final_norm"].size,
        **{("layers", name): x.size for name, x in params["layers"].items()},
    }


def test_experts_are_split_by_their_mesh_axis(tmp_path):
    """Two shards of experts beside fsdp 2 and tensor 2: the same numbers, halved along each of the three."""
    directory = case("qwen3_moe_0").write(tmp_path, 20_000)
    _, want = load_model(directory, layouts()[0])
    _, found = load_model(directory, layouts((1, 2, 2, 2))[0])
    assert equal(found, want)
    # [L 2, gate and up 2, E 4, D 32, F 24], split 2 ways along E, D and F.
    assert found["layers"]["gate_up"].addressable_shards[0].data.shape == (2, 2, 2, 16, 12)

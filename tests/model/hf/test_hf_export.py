"""Load, export, load gives the same numbers for every mesh, number of files and form of the tree; the export is complete."""

import json
import resource

import jax
import ml_dtypes
import numpy as np
import pytest
from hf_cases import CASES, FAMILIES, case, equal, load_model
from safetensors.numpy import load_file
from setups import SMALL, layouts, make_params
from tokenizer_setup import save_tokenizer

from jaxrl_llm.errors import UserError
from jaxrl_llm.model import params as model_params
from jaxrl_llm.model.config import ModelConfig, YarnRope
from jaxrl_llm.model.hf.config import read_config
from jaxrl_llm.model.hf.export import ConfigFiles, export
from jaxrl_llm.model.hf.load import load
from jaxrl_llm.model.hf.written_config import write_config

# Small enough that every model here needs several files.
SEVERAL = 20_000


def files(directory):
    """Every tensor of a model directory."""
    return {name: x for path in directory.glob("*.safetensors") for name, x in load_file(path).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_load_export_load_is_bit_exact(family, tmp_path):
    there, (train, _) = case(f"{family}_0"), layouts((2, 2, 2))
    source = there.write(tmp_path / "source", SEVERAL)
    cfg, params = load_model(source, train)
    export(params, cfg, tmp_path / "out", "float32", ConfigFiles(source), max_shard_bytes=SEVERAL)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    back, again = load_model(tmp_path / "out", train)
    assert back == cfg and equal(params, again)
    # The same bits as in the files, under the same names.
    written, given = files(tmp_path / "out"), there.weights
    assert written.keys() == given.keys()
    assert all(np.array_equal(written[name], given[name]) for name in given)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_a_model_without_source_is_exported_as_its_family(family, tmp_path):
    """config.json is created, and reads back as the same configuration."""
    train, _ = layouts()
    cfg, params = load_model(case(f"{family}_0").write(tmp_path / "source"), train)
    export(params, cfg, tmp_path / "out", "float32", ConfigFiles(length=99, eos=(3, 5), pad=0))
    assert read_config(tmp_path / "out") == cfg
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    given = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (config["max_position_embeddings"], config["eos_token_id"], given["eos_token_id"]) == (99, [3, 5], [3, 5])
    assert (config["dtype"], given["pad_token_id"]) == ("float32", 0)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (8, 1, 1), (1, 8, 1), (1, 1, 8)], ids=str)
def test_every_mesh_and_both_forms_of_the_tree_load_and_export_the_same(sizes, tmp_path):
    """bfloat16 in the files and in the policy; the training parameters are the same numbers in f32."""
    one, (train, decode) = layouts()[0], layouts(sizes)
    params = make_params(SMALL, one)
    export(params, SMALL, tmp_path / "source", "bfloat16", max_shard_bytes=SEVERAL)
    specs = model_params.specs(SMALL)
    masters = load(tmp_path / "source", specs, train, np.float32)
    assert [x.sharding for x in jax.tree.leaves(masters)] == jax.tree.leaves(model_params.shardings(specs, train))
    assert equal(masters, jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float32), params))
    by_layer = model_params.unstack(specs, SMALL.layers)
    policy = load(tmp_path / "source", by_layer, decode, ml_dtypes.bfloat16)
    assert [x.sharding for x in jax.tree.leaves(policy)] == jax.tree.leaves(model_params.shardings(by_layer, decode))
    assert equal(
        model_params.unstack(jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), masters), 2), policy
    )
    export(policy, SMALL, tmp_path / "out", "bfloat16")
    got, want = files(tmp_path / "out"), files(tmp_path / "source")
    assert got.keys() == want.keys() and all(np.array_equal(got[n], want[n]) for n in want)


def test_a_tensor_is_its_block_of_the_leaf(tmp_path):
    """Written out by hand for one layer: rows of q_proj are (k g h), its columns d; o_proj is the transpose of that."""
    params = make_params(SMALL, layouts()[0])
    export(params, SMALL, tmp_path / "out", "float32")
    found, qkv = files(tmp_path / "out"), np.asarray(params["layers"]["qkv"])[1]
    attention = "model.layers.1.self_attn."
    # SMALL: D 32, K 8, G 2, H 8. Head 5 of the queries belongs to key/value head 2, and is its second.
    assert np.array_equal(found[f"{attention}q_proj.weight"][40:48], qkv[:, 2, 1].T)
    assert np.array_equal(found[f"{attention}k_proj.weight"][16:24], qkv[:, 2, 2].T)
    assert np.array_equal(found[f"{attention}v_proj.weight"][16:24], qkv[:, 2, 3].T)
    assert np.array_equal(found[f"{attention}o_proj.weight"][:, 40:48], np.asarray(params["layers"]["out"])[1, 2, 1].T)
    gate_up = np.asarray(params["layers"]["gate_up"])[1]
    assert np.array_equal(found["model.layers.1.mlp.gate_proj.weight"], gate_up[0].T)
    assert np.array_equal(found["model.layers.1.mlp.up_proj.weight"], gate_up[1].T)
    assert "lm_head.weight" not in found


def test_export_is_atomic(tmp_path):
    params = make_params(SMALL, layouts()[0])

    def fails(directory):
        (directory / "tokenizer.json").write_text("{}")
        raise RuntimeError("no space")

    with pytest.raises(UserError, match="out: the tokenizer cannot be written: no space"):
        export(params, SMALL, tmp_path / "out", "float32", save_tokenizer=fails)
    assert list(tmp_path.iterdir()) == []
    export(params, SMALL, tmp_path / "out", "float32", save_tokenizer=lambda d: (d / "tokenizer.json").write_text("{}"))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    with pytest.raises(
        UserError, match=r"out: got a file or a directory that is not empty, want a new or an empty directory"
    ):
        export(params, SMALL, tmp_path / "out", "float32")


@pytest.mark.parametrize(
    ("most", "what"),
    [(10, "File too large"), (5_000, "the tokenizer cannot be written: "), (30_000, "the tensors cannot be written: ")],
)
def test_a_file_that_cannot_be_written_is_reported_and_leaves_nothing(tmp_path, most, what):
    """With a limit on the size of files: enough bytes for config.json, for the tokenizer too, but never for the model."""
    params = make_params(SMALL, layouts()[0])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        with pytest.raises(UserError, match=f"{tmp_path}/out: {what}"):
            export(params, SMALL, tmp_path / "out", "float32", save_tokenizer=save_tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_of_no_family_is_refused_by_field(tmp_path):
    cfg = ModelConfig(qk_norm=True, qkv_bias=True)
    with pytest.raises(UserError) as caught:
        export({}, cfg, tmp_path / "out", "float32")
    assert str(caught.value) == (
        "model: got a configuration of no Hugging Face family, want one; for Qwen2ForCausalLM:\n"
        "model.qk_norm: got True, want False"
    )


def test_a_source_of_another_model_is_refused_by_field(tmp_path):
    source = case("qwen3_0").write(tmp_path / "source")
    cfg = ModelConfig(**{**read_config(source).__dict__, "rope_theta": 5.0})
    with pytest.raises(UserError, match=r"model.rope_theta: got 5.0, want 10000.0"):
        export({}, cfg, tmp_path / "out", "float32", ConfigFiles(source))


OURS = [
    ModelConfig(qk_norm=False, d_model=64),
    ModelConfig(d_model=66, window=3, sliding=(True, True), rope_scaling=YarnRope(4.0, 16)),
    ModelConfig(qkv_bias=True, window=3, sliding=(True, False)),
    ModelConfig(qk_norm=True, tied_head=False, activation="gelu_tanh"),
    ModelConfig(qk_norm=True, experts=8, experts_per_token=2, norm_top_k=False),
]


@pytest.mark.parametrize("cfg", OURS, ids=range(len(OURS)))
def test_a_written_configuration_reads_back(cfg, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(write_config(cfg, "float32", 64)))
    assert read_config(tmp_path) == cfg


@pytest.mark.parametrize("name", CASES)
def test_every_family_is_written_as_itself(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(case(name).golden["config"]))
    cfg = read_config(tmp_path)
    written = write_config(cfg, "float32", 128)
    (tmp_path / "config.json").write_text(json.dumps(written))
    again = read_config(tmp_path)
    assert written["model_type"] == case(name).golden["config"]["model_type"]
    # 24^-0.5 is written as 24 and read back, so nothing is lost.
    assert again == cfg

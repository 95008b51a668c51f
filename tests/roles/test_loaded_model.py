"""`load_model`: a Hugging Face directory, or a config and a seed, on a mesh."""

import dataclasses

import jax
import numpy as np
import pytest
from fakes import MODEL, blueprint
from hf_cases import case, equal
from hf_cases import load_model as load_stored
from tokenizer_setup import save_tokenizer

from jaxrl_llm.errors import UserError
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.parallel.mesh import make_mesh
from jaxrl_llm.roles.build import make_keys
from jaxrl_llm.roles.loaded_model import load_model, save_model
from jaxrl_llm.roles.start_or_restore import start_params
from jaxrl_llm.tasks.config import CharacterTokenizer

ONE = make_mesh(devices=jax.devices()[:1])
CFG = ModelConfig(**MODEL)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Weights of a small Llama, with a tokenizer of 302 tokens."""
    place = tmp_path_factory.mktemp("model")
    return save_tokenizer(case("llama_0").write(place))


def test_a_config_and_a_seed_give_what_a_run_starts_from():
    model = load_model(CFG, ONE, seed=3)
    assert equal(model.params, start_params(blueprint(), make_keys(3).train))
    assert (model.vocab.size, model.vocab.pad, model.vocab.eos) == (16, 0, (15,))
    assert model.config == CFG and model.decode.rules["embed"] is None and model.train.rules["embed"] == "fsdp"
    num = sum(x.size for x in jax.tree.leaves(model.params))
    assert repr(model).startswith(f"Model({num:,} parameters, 2 layers, 16 tokens, mesh")


def test_a_directory_gives_its_parameters_and_its_tokenizer(directory):
    """The stored vocabulary is too small for this tokenizer; a character tokenizer of 16 fits."""
    with pytest.raises(UserError, match=r"model.vocab_size: got .*, want at least the tokenizer's 302"):
        load_model(directory, ONE)
    model = load_model(str(directory), ONE, tokenizer=CharacterTokenizer(), compute="float32")
    config, params = load_stored(directory, model.train)
    assert model.config == config and equal(model.params, params)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(model.params))
    assert load_model(directory, ONE, tokenizer=CharacterTokenizer()).config.compute == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"source": "no/such/directory/at/all"}, "got a path that does not exist, want a Hugging Face model directory"),
        (
            {"source": dataclasses.replace(CFG, vocab_size=8)},
            "model.vocab_size: got 8, want at least the tokenizer's 16",
        ),
        ({"mesh": make_mesh(tensor=4, fsdp=2)}, "mesh.tensor: got 4, want a divisor of model.kv_heads (2): 1, 2"),
        ({"compute": "bfloat16"}, "compute: got 'bfloat16', want 'float32', that of the config, or nothing"),
    ],
)
def test_what_does_not_fit_is_refused(changes, words):
    with pytest.raises(UserError) as error:
        load_model(**({"source": CFG, "mesh": ONE} | changes))
    assert words in str(error.value)


def test_a_model_of_characters_is_saved_with_them(tmp_path):
    """transformers would make the end character special, and leave it out of every completion."""
    model = load_model(dataclasses.replace(CFG, qk_norm=True), ONE, tokenizer=CharacterTokenizer("<>abcd#"))
    save_model(model, model.params, tmp_path / "saved")
    again = load_model(tmp_path / "saved", ONE, compute="float32")
    assert again.tokenizer.encode("<ab>#") == model.tokenizer.encode("<ab>#")
    assert again.tokenizer.decode([3, 4, 7]) == "ab#"

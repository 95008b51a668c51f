"""A model for a notebook: config, parameters, tokenizer and layouts in one value."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Key

from jaxrl_llm.config.options import with_options
from jaxrl_llm.distribution.score import Scoring
from jaxrl_llm.errors import UserError
from jaxrl_llm.model import params as model_params
from jaxrl_llm.model.config import ForwardOptions, ModelConfig, PretrainedModel
from jaxrl_llm.model.hf.config import read_config
from jaxrl_llm.model.hf.export import ConfigFiles, export
from jaxrl_llm.model.hf.load import load
from jaxrl_llm.model.hf.source import resolve
from jaxrl_llm.parallel import hosts
from jaxrl_llm.parallel.layout import TRAIN, Layout
from jaxrl_llm.parallel.mesh import make_mesh
from jaxrl_llm.roles.build import make_keys
from jaxrl_llm.roles.inputs import vocabulary_problems
from jaxrl_llm.rollout.sample import Vocabulary
from jaxrl_llm.tasks.config import CharacterTokenizer, PretrainedTokenizer
from jaxrl_llm.tasks.tokenizer import Tokenizer, load_tokenizer, saved_characters
from jaxrl_llm.types import PyTree


@dataclass(frozen=True, eq=False)
class Model:
    """A model on a mesh. `load_model` makes it; `Engine`, `make_update`, `make_publish` and `make_score` read it."""

    config: ModelConfig
    params: PyTree
    """f32 master parameters in the TRAIN layout, layers stacked: the start of training."""
    tokenizer: Tokenizer
    train: Layout
    decode: Layout
    """Layout of the policy, for sampling."""
    directory: Path | None = None
    """Hugging Face directory that it was loaded from."""

    @property
    def vocab(self) -> Vocabulary:
        return Vocabulary(self.tokenizer.size, self.tokenizer.pad, self.tokenizer.eos)

    @property
    def scoring(self) -> Scoring:
        """Static settings of programs that score tokens."""
        return Scoring(self.config, self.train, self.vocab.size, ForwardOptions(remat="auto"))

    def __repr__(self) -> str:
        num, axes = model_params.count(model_params.specs(self.config)), dict(self.train.mesh.shape)
        return f"Model({num:,} parameters, {self.config.layers} layers, {self.vocab.size} tokens, mesh {axes})"


def load_model(
    source: str | Path | ModelConfig,
    mesh: Mesh | None = None,
    tokenizer: Tokenizer | CharacterTokenizer | PretrainedTokenizer | None = None,
    compute: str = "",
    seed: int = 0,
) -> Model:
    """Load a model onto a mesh, or make one from a config.

        model = rl.load_model("Qwen/Qwen2.5-0.5B-Instruct", rl.make_mesh(fsdp=-1))
        small = rl.load_model(rl.ModelConfig(layers=2, d_model=64))          # untrained, with the arithmetic task's characters

    Args:
        source: a Hugging Face directory, a hub name (needs internet access), or the config of a model with random parameters.
        mesh: from `make_mesh`; None: all devices on the axis fsdp.
        tokenizer: None: the model's own, with its chat template; for a config, the characters of the arithmetic task. A
            `PretrainedTokenizer` without path changes how the model's own is used, `CharacterTokenizer("abc#")` has an alphabet of
            yours, whose last character ends a response.
        compute: dtype of activations and of the policy, "float32" or "bfloat16"; "": bfloat16, or what the config says.
        seed: of random parameters, those of `jaxrl train` with this seed.

    Raises:
        UserError: everything that does not fit: files, sizes and mesh, vocabulary and tokenizer.
    """
    directory = None
    if isinstance(source, ModelConfig):
        config, default = with_options(source, {}), CharacterTokenizer()
    else:
        directory = resolve(source)
        config = read_config(directory, compute or PretrainedModel.compute)
        default = saved_characters(directory) or PretrainedTokenizer(str(directory))
    if compute not in ("", config.compute):
        raise UserError(f"compute: got {compute!r}, want {config.compute!r}, that of the config, or nothing")
    tokenizer = default if tokenizer is None else tokenizer
    if isinstance(tokenizer, PretrainedTokenizer) and not tokenizer.path and directory:
        tokenizer = dataclasses.replace(tokenizer, path=str(directory))
    tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
    train = Layout(make_mesh() if mesh is None else mesh, TRAIN)
    wrong = config.problems(train.mesh.shape["tensor"], train.mesh.shape["expert"])
    if wrong := [*wrong, *vocabulary_problems(config, tokenizer.size)]:
        raise UserError("\n".join(wrong))
    params = load_params(source, model_params.specs(config), train, make_keys(seed).train)
    return Model(config, params, tokenizer, train, train.for_decode("replicated"), directory)


def save_model(model: Model, params: PyTree, directory: str | Path) -> None:
    """Write a Hugging Face directory in the model's compute dtype, which `load_model` and transformers read.

        rl.save_model(model, state.params, "mine-trained")

    `directory`: new or empty. Raises UserError if it is neither, or the model belongs to no family of Hugging Face.
    """
    hosts.check_alive("params", params)
    files = ConfigFiles(model.directory, eos=model.vocab.eos, pad=model.vocab.pad)
    export(params, model.config, directory, model.config.compute, files, save_tokenizer=model.tokenizer.save)


def load_params(
    source: str | Path | ModelConfig, specs: PyTree, layout: Layout, key: Key[Array, ""], dtype: str = "float32"
) -> PyTree:
    """Load master parameters of a Hugging Face model, or initialize those of a config.

    Args:
        source: as in `load_model`.
        specs: of the parameters.
        layout: TRAIN.
        key: of the run; for random parameters.
        dtype: of pretrained parameters; random ones are f32.
    """
    if isinstance(source, ModelConfig):
        return model_params.init(specs, jax.random.fold_in(key, 2**31 - 1), layout)
    return load(resolve(source), specs, layout, jnp.dtype(dtype))

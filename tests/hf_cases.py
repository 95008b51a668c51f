"""The goldens of tests/golden/hf as model directories: files created from a seed, for the real loading code."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from golden.hf_weights import draw_all
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.numpy import save_file

from jaxrl_llm.model import params as model_params
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.hf.config import read_config
from jaxrl_llm.model.hf.load import load
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.types import PyTree

GOLDEN = Path(__file__).parent / "golden" / "hf"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text")
CASES = [f"{family}_{number}" for family in FAMILIES for number in range(3)]


@dataclass(frozen=True)
class Case:
    """The results of transformers for one model; see golden/make_hf.py."""

    name: str
    golden: dict[str, Any]

    @property
    def weights(self) -> dict[str, np.ndarray]:
        return draw_all(self.golden["tensors"], self.golden["seed"], self.name.startswith("gemma"))

    def write(self, directory: Path, max_bytes: int = 10**9, weights: dict[str, np.ndarray] | None = None) -> Path:
        """Write the model directory, in files of at most `max_bytes`."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.golden["config"]))
        write_tensors(directory, self.weights if weights is None else weights, max_bytes)
        return directory


@cache
def case(name: str) -> Case:
    return Case(name, json.loads((GOLDEN / f"{name}.json").read_text()))


def write_tensors(directory: Path, weights: dict[str, np.ndarray], max_bytes: int) -> None:
    plan = split_state_dict_into_shards_factory(
        weights,
        get_storage_size=lambda x: x.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_bytes,
    )
    for file, names in plan.filename_to_tensors.items():
        save_file({name: weights[name] for name in names}, directory / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def load_model(directory: Path, layout: Layout, stacked: bool = True) -> tuple[ModelConfig, PyTree]:
    """Return the configuration and the f32 parameters, with one entry per layer if not stacked."""
    cfg = read_config(directory)
    specs = model_params.specs(cfg)
    return cfg, load(directory, specs if stacked else model_params.unstack(specs, cfg.layers), layout, np.float32)


def equal(a: PyTree, b: PyTree) -> bool:
    """Return whether two trees are equal to the bit."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    same = [x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs]
    return jax.tree.structure(a) == jax.tree.structure(b) and all(same)

"""The model directory that every peer reads: random f32 weights of `benchmarks.models`, one safetensors file per size."""

from pathlib import Path

import jax

from benchmarks.models import SIZES, layouts
from jaxrl_llm.model import params as model_params
from jaxrl_llm.model.hf.export import export
from jaxrl_llm.types import PyTree

HERE = Path(__file__).parent / ".weights"


def directory(size: str) -> Path:
    """Return the directory of size `size`; it is written if it does not exist."""
    path = HERE / size
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        export(weights(size), SIZES[size], path, "float32")
    return path


def weights(size: str) -> PyTree:
    """Return initial weights, without norms of all ones or zero biases: a peer that ignored one would return other tokens."""
    tree, key = model_params.specs(SIZES[size]), jax.random.key(0)
    found = model_params.init(tree, key, layouts()[0])

    def shaken(spec: model_params.ParamSpec, x: jax.Array, key: jax.Array) -> jax.Array:
        return x if spec.std else x + 0.1 * jax.random.normal(key, x.shape)

    described, treedef = jax.tree.flatten(tree, is_leaf=model_params.is_spec)
    keys = jax.random.split(jax.random.fold_in(key, 1), len(described))
    return treedef.unflatten(
        [shaken(*each) for each in zip(described, treedef.flatten_up_to(found), keys, strict=True)]
    )

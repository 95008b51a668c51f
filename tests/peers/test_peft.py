"""Live comparison with PEFT: it loads the adapters that we export, with the same logits.

JAXRL_PEFT_PYTHON names the Python of an environment with torch, transformers and peft, which are no dependencies of ours.
"""

import json
import os
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from hf_cases import case, load_model
from setups import layouts

from jaxrl_llm.model import lora
from jaxrl_llm.model import params as model_params
from jaxrl_llm.model.config import LoraConfig
from jaxrl_llm.model.hf.export import export
from jaxrl_llm.model.hf.peft import export_adapter
from jaxrl_llm.model.transformer import hidden, logits

PYTHON = os.environ.get("JAXRL_PEFT_PYTHON")
pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(
        PYTHON is None, reason="JAXRL_PEFT_PYTHON: not set, want the Python of an environment with peft"
    ),
]
# f32 in both, sums in a different order; relative to the largest logit.
TOLERANCE = 1e-4


@pytest.mark.parametrize(
    "family, targets",
    [("qwen3", lora.MODULES), ("llama", ("q", "v")), ("gemma2", lora.MODULES), ("qwen3_moe", ("q", "k", "v", "o"))],
    ids=["qwen3", "llama, q and v", "gemma2", "qwen3_moe"],
)
def test_peft_loads_our_adapters_with_the_same_logits(family, targets, tmp_path):
    (train, _), given = layouts(), LoraConfig(rank=4, alpha=6.0, targets=tuple(targets))
    cfg, params = load_model(case(f"{family}_0").write(tmp_path / "source"), train)
    params = random_adapters(params, lora.adapted_specs(model_params.specs(cfg), cfg, given))
    export(lora.without_adapters(params), cfg, tmp_path / "base", "float32")
    export_adapter(params, given, tmp_path / "base", tmp_path / "adapter")
    tokens = np.random.default_rng(7).integers(0, cfg.vocab_size, (2, 20), dtype=np.int32)
    position = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    until = np.full_like(position, tokens.shape[1])
    run = jax.jit(lambda p, t: logits(p, hidden(p, t, position, until, cfg, train), cfg))
    want = run_peft(tmp_path / "base", tmp_path / "adapter", tokens, tmp_path / "peft.npz")
    for name, weights in (("base", lora.without_adapters(params)), ("adapted", params)):
        ours = np.asarray(run(weights, tokens))
        assert np.abs(want[name] - ours).max() <= TOLERANCE * np.abs(ours).max()
    assert np.abs(want["adapted"] - want["base"]).max() > 0.1 * np.abs(want["base"]).max()


def random_adapters(params, specs):
    rng, (trained, frozen) = np.random.default_rng(3), lora.split(specs)
    adapters = model_params.map_specs(lambda s: 0.2 * rng.standard_normal(s.shape).astype(np.float32), trained)
    structure = jax.tree.structure(frozen, is_leaf=model_params.is_spec)
    return lora.join(adapters, structure.unflatten(jax.tree.leaves(params)))


def run_peft(base, adapter, tokens, to):
    script = Path(__file__).parent / "peft_reference.py"
    args = [PYTHON, script, base, adapter, json.dumps(tokens.tolist()), to]
    done = subprocess.run(args, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return np.load(to)

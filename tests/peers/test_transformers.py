"""Live comparison with transformers: we load models that it creates, and it loads models that we export.

JAXRL_TORCH_PYTHON names the Python of an environment with torch and transformers, which are no dependencies of ours.
"""

import json
import os
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from hf_cases import FAMILIES, case, load_model
from setups import layouts

from jaxrl_llm.model.hf.export import export
from jaxrl_llm.model.transformer import hidden, logits

PYTHON = os.environ.get("JAXRL_TORCH_PYTHON")
pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(
        PYTHON is None, reason="JAXRL_TORCH_PYTHON: not set, want the Python of an environment with torch"
    ),
]
# As in tests/model/hf/test_hf_parity.py.
TOLERANCE = 2e-4


def run_transformers(jobs, directory):
    (directory / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).parent / "transformers_reference.py"
    done = subprocess.run([PYTHON, script, directory / "jobs.json"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stderr


def ours(directory, tokens):
    layout, _ = layouts()
    cfg, params = load_model(directory, layout)
    position = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    until = np.full_like(position, tokens.shape[1])
    run = jax.jit(lambda p, t: logits(p, hidden(p, t, position, until, cfg, layout), cfg))
    return cfg, params, np.asarray(run(params, tokens))


def assert_close(found, want):
    assert np.abs(found - want).max() <= TOLERANCE * np.abs(want).max()
    assert (found.argmax(-1) == want.argmax(-1)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_transformers_through_load_and_export(family, tmp_path):
    """New weights from transformers' classes: the same logits from us, and, to the bit, from transformers for our export."""
    config = {key: value for key, value in case(f"{family}_0").golden["config"].items() if key != "architectures"}
    tokens = np.random.default_rng(7).integers(0, config["vocab_size"], (2, 50), dtype=np.int32)
    theirs, exported = tmp_path / "theirs", tmp_path / "exported"
    read = {"read": str(theirs), "tokens": tokens.tolist(), "to": str(tmp_path / "theirs.npz")}
    run_transformers([{"make": config, "seed": 11, "to": str(theirs)}, read], tmp_path)
    cfg, params, found = ours(theirs, tokens)
    want = np.load(tmp_path / "theirs.npz")
    assert_close(found, want["logits"])
    export(params, cfg, exported, "float32", max_shard_bytes=40_000)
    log = run_transformers([read | {"read": str(exported), "to": str(tmp_path / "ours.npz")}], tmp_path)
    again = np.load(tmp_path / "ours.npz")
    assert np.array_equal(again["logits"], want["logits"]) and np.array_equal(again["greedy"], want["greedy"])
    assert not any(word in log.lower() for word in ("missing", "unexpected", "not initialized")), log

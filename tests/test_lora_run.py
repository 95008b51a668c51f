"""A run with adapters: a warm start of all parameters, RL of adapters and a critic, resumed, and exported."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrl_llm.commands.export import export_run
from jaxrl_llm.config import loading
from jaxrl_llm.errors import UserError
from jaxrl_llm.model import lora
from jaxrl_llm.model.lora import Adapted
from jaxrl_llm.train import open_run, resume, train

CONFIG = """
steps: 2
model: {vocab_size: 16, layers: 1, d_model: 32, heads: 8, kv_heads: 8, head_dim: 8, d_mlp: 64}
lora: {rank: 2, alpha: 8}
mesh: {data: 1, fsdp: 4, tensor: 2}
warm_start: {steps: 2, rows: 16}
rollout: {prompts: 8, samples: 4, max_new_tokens: 4}
task: {kind: arithmetic, terms: 2, held_out: 16}
reward: {graders: [{grader: length, options: {target: 3}}], workers: 1}
objective: {preset: paper:ppo, loss: {kl: {weight: 0.01}}}
update: {optimizer: {lr: 1.0e-2}}
evaluation: {every: 5}
checkpoint: {every: 1}
metrics: {tensorboard: false, samples_every: 0}
"""
PROJECTIONS = {f"self_attn.{name}_proj" for name in "qkvo"} | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The config, trained for two steps of RL. The reward is the length: no sum is right this early."""
    place = tmp_path_factory.mktemp("lora")
    (place / "lora.yaml").write_text(CONFIG)
    cfg = dataclasses.replace(loading.load(place / "lora.yaml"), run_dir=str(place / "run"))
    train(cfg)
    return cfg


@pytest.mark.slow
def test_only_adapters_and_critic_are_trained(trained):
    with open_run(trained, must_resume=True, given=None, ends_process=False) as run:
        state = resume(run)
    moments = sum(x.size for x in jax.tree.leaves(state.train.opt_state) if x.ndim)
    learned, _ = lora.split(state.train.params)
    assert moments == 2 * sum(x.size for x in jax.tree.leaves(learned) if x.ndim)
    assert state.step == 4 and np.any(np.asarray(learned["value"]["kernel"]))
    adapters = [x for x in learned["layers"].values() if isinstance(x, Adapted)]
    assert len(adapters) == 4 and all(np.any(np.asarray(x)) for x in jax.tree.leaves(adapters))
    # The reference is the base: its adapters add nothing.
    pairs = [p for w in state.reference["layers"].values() if w is not None for p in w.pairs.values()]
    assert len(pairs) == 7 and not any(np.any(np.asarray(pair.b)) for pair in pairs)
    assert len(jax.tree.leaves(state.reference)) == 14


@pytest.mark.slow
def test_exported_adapters_are_the_difference_between_the_run_and_its_base(trained, tmp_path):
    """From the files: merged = base + alpha / rank B A, as in PEFT."""
    merged = load_file(export_run(trained, tmp_path / "merged", "float32") / "model.safetensors")
    out = export_run(trained, tmp_path / "adapter", "float32", adapter=True)
    base, adapters = load_file(out / "base" / "model.safetensors"), load_file(out / "adapter_model.safetensors")
    assert merged.keys() == base.keys()
    seen = set()
    for name, want in merged.items():
        module = name.removeprefix("model.layers.0.").removesuffix(".weight")
        if module not in PROJECTIONS:
            np.testing.assert_array_equal(want, base[name])
            continue
        prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        a, b = adapters.pop(f"{prefix}A.weight"), adapters.pop(f"{prefix}B.weight")
        assert a.shape == (2, want.shape[1]) and b.shape == (want.shape[0], 2)
        np.testing.assert_allclose(want, base[name] + 4 * b @ a, atol=1e-6)
        assert np.abs(want - base[name]).max() > 1e-3
        seen.add(module)
    assert seen == PROJECTIONS and not adapters
    written = json.loads((out / "adapter_config.json").read_text())
    assert (
        written["r"] == 2
        and written["lora_alpha"] == 8.0
        and set(written["target_modules"]) == {module.split(".")[1] for module in PROJECTIONS}
    )
    assert written["base_model_name_or_path"] == str(out.resolve() / "base")


@pytest.mark.slow
def test_a_directory_that_is_not_empty_is_left_alone(trained, tmp_path):
    (tmp_path / "something").touch()
    with pytest.raises(
        UserError, match="got a file or a directory that is not empty, want a new or an empty directory"
    ):
        export_run(trained, tmp_path, None, adapter=True)
    assert [path.name for path in tmp_path.iterdir()] == ["something"]

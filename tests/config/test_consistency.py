"""Settings that do not fit together or not on the mesh are reported before anything compiles."""

import dataclasses
from pathlib import Path

import pytest

from jaxrl_llm.config.consistency import problems, training_problems
from jaxrl_llm.config.loading import load
from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.hf.config import read_config as read_model_config
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.loss_config import CrossEntropy
from jaxrl_llm.parallel.config import MeshConfig
from jaxrl_llm.rollout.config import EngineConfig, RolloutConfig
from jaxrl_llm.update.config import UpdateConfig, WarmStartConfig

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


# Number of chips in the header of a config, and the sizes of its model, which the checkpoint would provide.
HARDWARE_AND_SIZES = {
    "qwen2.5-0.5b_gsm8k": (1, "Qwen2.5-0.5B"),
    "qwen3-1.7b_gsm8k": (8, "Qwen3-1.7B"),
    "llama3.1-8b_gsm8k": (8, "Llama-3.1-8B"),
    "qwen3-8b_gsm8k": (64, "Qwen3-8B"),
    "qwen3-30b-a3b_gsm8k": (32, "Qwen3-30B-A3B"),
    "llama3-70b_gsm8k": (512, "Llama-3-70B"),
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configs_of_the_repository_fit_their_hardware(path):
    cfg = load(path)
    devices, shape = HARDWARE_AND_SIZES.get(path.stem, (1, None))
    model = read_model_config(ROOT / "benchmarks/shapes" / shape) if shape else cfg.model
    assert problems(dataclasses.replace(cfg, model=model), devices) + training_problems(cfg) == []
    assert load(path) == cfg and path.read_text().startswith("#")


def test_there_are_configs():
    assert CONFIGS


def test_defaults_alone_work():
    assert problems(RunConfig(), 1) == problems(RunConfig(), 8) == []


def test_all_errors_of_an_impossible_mesh_are_listed():
    """8 devices cannot be 3 x 2 x 5; 5 divides no size of the model; 3 * 2 = 6 row shards divide no batch."""
    cfg = RunConfig(
        mesh=MeshConfig(3, 2, 5),
        model=ModelConfig(heads=3, kv_heads=2, head_dim=7, d_mlp=9, vocab_size=16),
        rollout=RolloutConfig(prompts=4),
        warm_start=WarmStartConfig(rows=8),
        update=UpdateConfig(minibatches=3),
    )
    assert problems(cfg, 8) == [
        "mesh: asked for data 3, fsdp 2, tensor 5, expert 1 (a product of 30), found 8 devices; "
        "the product must be 8, sizes that work on an axis: 1, 2, 4, 8",
        "model.heads: got 3, want a multiple of model.kv_heads (2)",
        "model.head_dim: got 7, want an even number (RoPE rotates pairs)",
        "mesh.tensor: got 5, want a divisor of model.kv_heads (2): 1, 2",
        "mesh.tensor: got 5, want a divisor of model.d_mlp (9): 1, 3, 9",
        "mesh.tensor: got 5, want a divisor of model.vocab_size (16): 1, 2, 4, 8, 16",
        "rollout.prompts: got 4, want a multiple of mesh.data * mesh.fsdp * mesh.expert (6); 4 allows 1, 2, 4",
        "warm_start.rows: got 8, want a multiple of mesh.data * mesh.fsdp * mesh.expert (6); 8 allows 1, 2, 4, 8",
        "update.minibatches: got 3, want a divisor of rollout.prompts (4): 1, 2, 4",
    ]


def test_settings_that_sampling_can_use_and_training_cannot():
    assert training_problems(RunConfig()) == []
    cfg = RunConfig(rollout=RolloutConfig(samples=1, temperature=0), objective=ObjectiveConfig(loss=CrossEntropy()))
    assert problems(cfg, 1) == []
    assert training_problems(cfg) == [
        "rollout.temperature: got 0, want more: a policy that never explores learns nothing",
        "objective.advantage.kind: got grpo with rollout.samples 1, want 2 or more samples: a group of one has no mean of others",
        "objective.loss.kind: got cross_entropy, want one for RL: it uses no reward; warm_start is supervised",
    ]


def test_each_micro_batch_has_a_row_per_shard():
    """32 prompts of 8 in 4 minibatches: 64 rows. 8 shards leave 8 rows each."""
    cfg = RunConfig(update=UpdateConfig(minibatches=4, micro_batches=9))
    assert problems(cfg, 8) == [
        "update.micro_batches: got 9, want 8 at most: a minibatch has 64 rows, and each micro-batch takes at least one on each "
        "of 8 shards of mesh.data * mesh.fsdp * mesh.expert"
    ]
    assert problems(dataclasses.replace(cfg, update=UpdateConfig(minibatches=4, micro_batches=8)), 8) == []


def test_engine_settings_fit_the_mesh_and_the_groups():
    """2 kv heads over 2 * 4 shards, a group of 8 in threes, and a layout for another number of devices."""
    cfg = RunConfig(mesh=MeshConfig(fsdp=4, tensor=2), model=ModelConfig(kv_heads=2, d_mlp=64))
    of = lambda **engine: problems(  # noqa: E731
        dataclasses.replace(cfg, rollout=RolloutConfig(engine=EngineConfig(**engine))), 8
    )
    assert of(layout=MeshConfig(fsdp=8)) == of(rows_per_prompt_cache=4) == of() == []
    assert of(layout="wide") == [
        "rollout.engine.layout: mesh.tensor: got 8, want a divisor of model.kv_heads (2): 1, 2"
    ]
    assert of(rows_per_prompt_cache=3) == [
        "rollout.engine.rows_per_prompt_cache: got 3, want a divisor of rollout.samples (8): 1, 2, 4, 8"
    ]
    (text,) = of(layout=MeshConfig(data=3, fsdp=1))
    assert text.startswith("rollout.engine.layout: mesh: asked for data 3") and "found 8 devices" in text


def test_top_k_fits_into_the_recorded_kept_tokens():
    cfg = dataclasses.replace(RunConfig(), rollout=RolloutConfig(top_k=200, min_new_tokens=9))
    assert problems(cfg, 1) == [
        "rollout.top_k: got 200, want at most rollout.max_kept_tokens (128)",
        "rollout.min_new_tokens: got 9, want at most rollout.max_new_tokens (8)",
    ]

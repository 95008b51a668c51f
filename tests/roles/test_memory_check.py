"""Memory that a run needs at least, by hand, and the message for a run that does not fit."""

import jax
import pytest

from jaxrl_llm.config.loading import validate
from jaxrl_llm.errors import UserError
from jaxrl_llm.perf import chips
from jaxrl_llm.roles import memory_check
from jaxrl_llm.roles.abstract_run import AbstractRun, make_abstract_run, with_micro_batches
from jaxrl_llm.roles.blueprint import Blueprint, make_blueprint
from jaxrl_llm.rollout.sample import Vocabulary

# Embedding 32 x 16; per layer qkv 16 x 2 x 4 x 8, out 2 x 2 x 8 x 16, gate and up 2 x 16 x 64, down 64 x 16, two norms.
PARAMS = 512 + 2 * (1024 + 512 + 2048 + 1024 + 32) + 16
VALUES = {
    "model": {"vocab_size": 32, "layers": 2, "d_model": 16, "heads": 4, "kv_heads": 2, "head_dim": 8, "d_mlp": 64},
    "rollout": {"prompts": 8, "samples": 4, "max_new_tokens": 6},
    "update": {"minibatches": 2, "micro_batches": 2},
}


@pytest.fixture(scope="module")
def blueprint() -> Blueprint:
    cfg = validate(VALUES, "test")
    return make_blueprint(cfg, cfg.model, Vocabulary(16, pad=0, eos=(15,)), 7, jax.devices()[:1])


@pytest.fixture(scope="module")
def run(blueprint) -> AbstractRun:
    return make_abstract_run(blueprint)


def test_resident_bytes_by_hand(run):
    """f32 policy and state; caches of 8 prompts of 7 slots and 32 rows of 6; keys and values, 2 layers, 2 heads of 8 numbers."""
    slot = 4 * 2 * 2 * 2 * 8
    policy, prompts, rows = 4 * PARAMS, 8 * 7 * slot, 32 * 6 * slot
    found = memory_check.resident_bytes(run)
    assert found["decode_chunk"].program == {
        memory_check.POLICY: policy,
        memory_check.PROMPTS: prompts,
        memory_check.ROWS: rows,
    }
    assert found["publish"].program == {memory_check.POLICY: policy, memory_check.MASTERS: 4 * PARAMS}
    assert 8 * PARAMS <= found["decode_chunk"].other[memory_check.OPTIMIZER] <= 8 * PARAMS + 16
    assert run.capacity == (8, 8, 6) and not run.queues_prompts
    assert memory_check.gradients(run) == 4 * PARAMS


def test_fewer_rows_at_a_time_keep_fewer_layer_inputs(run):
    """16 rows of 13 slots in 2 micro-batches, 2 layers of 16 f32 numbers; then in 4."""
    of = lambda run: next(p for p in memory_check.minimum(run, 1, True, 0) if p.name == "update").parts  # noqa: E731
    assert of(run)[memory_check.LAYER_INPUTS] == 8 * 13 * 2 * 16 * 4
    assert of(with_micro_batches(run, 4))[memory_check.LAYER_INPUTS] == 4 * 13 * 2 * 16 * 4


def test_a_run_that_only_samples_needs_no_training_state(run):
    phases = memory_check.minimum(run, 1, False, 0)
    assert {phase.name for phase in phases} == {"host", "prefill", "decode_chunk"}
    assert all(memory_check.OPTIMIZER not in phase.parts for phase in phases)


def test_a_run_that_does_not_fit_is_refused(blueprint, monkeypatch):
    memory_check.check(blueprint, held_out=1)
    monkeypatch.setattr(chips, "host_memory", lambda: 8 * 3.0 * 4 * PARAMS)
    with pytest.raises(
        UserError, match=r"^model: got 9,808 parameters, want fewer, .* needs at least 0.0 GB on each device"
    ):
        memory_check.check(blueprint, held_out=1)

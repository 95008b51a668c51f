"""Bytes of decoding, added up by hand."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxrl_llm.model import params
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.parallel.layout import DECODE, Layout
from jaxrl_llm.parallel.mesh import make_mesh
from jaxrl_llm.plan import decode_memory
from jaxrl_llm.rollout.config import EngineConfig, RolloutConfig
from jaxrl_llm.rollout.engine import Engine, EngineModel
from jaxrl_llm.rollout.sample import Vocabulary

CFG = ModelConfig(
    vocab_size=64, layers=2, d_model=32, heads=4, kv_heads=2, head_dim=8, d_mlp=48, tied_head=False,
    sliding=(True, False), window=4,
)  # fmt: skip
P, G, S, C = 4, 3, 16, 32


def estimate(sizes: tuple[int, ...], cfg: ModelConfig = CFG) -> decode_memory.DecodeMemory:
    layout = Layout(make_mesh(*sizes, devices=jax.devices()[: sizes[0] * sizes[1] * sizes[2]]), DECODE)
    rollout = RolloutConfig(prompts=P, samples=G, max_new_tokens=C, engine=EngineConfig(decode_chunk=8))
    programs = Engine(EngineModel(cfg, layout, Vocabulary(size=64, pad=0, eos=(1,))), rollout, S).programs
    policy = params.abstract(params.unstack(params.specs(cfg), cfg.layers), layout, jnp.float32)
    return decode_memory.decode_memory(programs, policy, P, C)


def test_on_one_device():
    found = estimate((1, 1, 1))
    norms, qkv, out, mlp = 2 * 32, 32 * 2 * 4 * 8, 4 * 8 * 32, 3 * 32 * 48
    assert found.policy == 4 * (2 * (norms + qkv + out + mlp) + 2 * 64 * 32 + 32)
    # One layer keeps 4 slots, the other all; keys and values, f32.
    assert found.prompt == 2 * 4 * P * 2 * 8 * (4 + S)
    assert found.suffix == 2 * 4 * P * G * 2 * 8 * (4 + C)
    # Token, whether it was sampled, log-prob and entropy of each row and step, in the loop and as it comes back.
    assert found.chunk == 2 * 8 * P * G * (4 + 1 + 4 + 4)
    # Attention scores of 4 heads are larger than 64 logits or 96 numbers of gate and up.
    assert found.working == 4 * P * G * 4 * (S + C) + 4 * 2 * qkv
    assert found.total == sum(found)


def test_rows_heads_and_vocabulary_are_split_and_recorded_columns_are_replicated():
    one, split = estimate((1, 1, 1)), estimate((1, 4, 2))
    assert (split.prompt, split.suffix) == (one.prompt // 8, one.suffix // 8)
    assert split.chunk == 8 * P * G * 13 + 8 * P * G * 13 // 4
    assert split.working == 4 * P * G // 4 * 2 * (S + C) + 4 * 32 * 4 * 8 * 2
    norms = 2 * 2 * 32 + 32
    assert split.policy == (one.policy - 4 * norms) // 2 + 4 * norms


def test_experts_not_a_multiple_of_the_tile_width_are_held_twice():
    """48 of 128 columns; 256 are two whole tiles."""
    experts = dataclasses.replace(CFG, experts=4, experts_per_token=1)
    once = 4 * P * G * 4 * (S + C) + 4 * 2 * 32 * 2 * 4 * 8
    assert estimate((1, 1, 1), experts).working == once + 4 * 2 * (2 * 4 * 32 * 128)
    wide = dataclasses.replace(experts, d_mlp=256)
    rows = 4 * P * G * 2 * 256
    assert estimate((1, 1, 1), wide).working == rows + 4 * 2 * 32 * 2 * 4 * 8

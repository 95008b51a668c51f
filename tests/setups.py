"""Small models, layouts and prompts shared by many tests."""

from dataclasses import replace
from functools import cache
from typing import NamedTuple

import jax
import numpy as np
import pytest

from jaxrl_llm.model import params as model_params
from jaxrl_llm.model.config import LinearRope, Llama3Rope, ModelConfig, YarnRope
from jaxrl_llm.model.publish import jit_publish, make_empty_policy
from jaxrl_llm.parallel import hosts
from jaxrl_llm.parallel.layout import DECODE, TRAIN, Layout
from jaxrl_llm.parallel.mesh import make_mesh
from jaxrl_llm.rollout.config import EngineConfig, RolloutConfig
from jaxrl_llm.rollout.engine import Engine, EngineModel
from jaxrl_llm.rollout.sample import Vocabulary
from jaxrl_llm.types import Batch, Credit, Experience, Policy, Prompts, PyTree, Rollouts, Scores, number_rows
from jaxrl_llm.update.batch import fill_batch, ungraded
from jaxrl_llm.update.packing import batch_shape, equal_groups

# Eight heads over eight key/value heads, so that every mesh below divides them; sharp logits, so that an error shows.
SMALL = ModelConfig(vocab_size=16, layers=2, d_model=32, heads=16, kv_heads=8, head_dim=8, d_mlp=64, qk_norm=True)
TINY = ModelConfig(vocab_size=16, layers=2, d_model=16, heads=4, kv_heads=2, head_dim=8, d_mlp=16)
# One config per family (SMALL is Qwen3's), every feature strong enough to matter; for prompts of 7 slots and completions of 6.
FAMILIES = {
    "llama3": replace(TINY, layers=1, rope_theta=100.0, rope_scaling=Llama3Rope(factor=8.0, original_length=8)),
    "mistral, window 3": replace(TINY, window=3, sliding=(True, True), tied_head=False),
    "qwen2, yarn": replace(TINY, layers=1, qkv_bias=True, rope_scaling=YarnRope(factor=4.0, original_length=16)),
    "qwen3-moe": replace(TINY, qk_norm=True, experts=4, experts_per_token=2, tied_head=False),
    "gemma2, window 5": replace(
        TINY, window=5, sliding=(True, False), activation="gelu_tanh", norm_plus_one=True, sandwich_norms=True,
        scale_embedding=True, attention_scale=0.3, attention_softcap=2.0, logit_softcap=3.0,
    ),
    "gemma3, window 9": replace(
        TINY, window=9, sliding=(True, False), activation="gelu_tanh", norm_plus_one=True, sandwich_norms=True,
        scale_embedding=True, attention_scale=0.3, qk_norm=True, rope_theta=1e6, sliding_rope_theta=100.0,
        rope_scaling=LinearRope(factor=8.0),
    ),
}  # fmt: skip
MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2)]
# To compare with one device: with one axis alone in the long run.
EACH_MESH = [pytest.param(sizes, marks=[pytest.mark.soak] if 8 in sizes else []) for sizes in MESHES[1:]]
VOCAB = Vocabulary(size=16, pad=0, eos=(15,))


@cache
def layouts(sizes: tuple[int, ...] = (1, 1, 1)) -> tuple[Layout, Layout]:
    mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    return Layout(mesh, TRAIN), Layout(mesh, DECODE)


def make_params(cfg: ModelConfig, train: Layout, seed: int = 0, sharpness: float = 1.5, noise: float = 0.0) -> PyTree:
    """Random parameters, with the embedding (also the head) scaled up so that the logits are far from uniform.

    `noise` is added everywhere, so that norms and biases, initially 1 and 0, matter too.
    From NumPy: compiling `model_params.init` takes seconds, and its own test does it once.
    """
    rng, specs = np.random.default_rng(seed), model_params.specs(cfg)
    params = model_params.map_specs(
        lambda s: (
            np.ones(s.shape, np.float32) if s.std is None else (s.std * rng.standard_normal(s.shape)).astype(np.float32)
        ),
        specs,
    )
    params["embed"] *= sharpness
    params = jax.tree.map(lambda x: x + noise * rng.standard_normal(x.shape).astype(np.float32), params)
    return hosts.put(params, model_params.shardings(specs, train))


@cache
def publisher(cfg: ModelConfig, train: Layout, decode: Layout):
    return jit_publish(cfg, train, decode), make_empty_policy(cfg, decode)


def make_policy(cfg: ModelConfig, params: PyTree, train: Layout, decode: Layout, version: int = 3) -> Policy:
    publish, blank = publisher(cfg, train, decode)
    return publish(params, np.int32(version), blank())


@cache
def engine(cfg: ModelConfig, decode: Layout, vocab: Vocabulary = VOCAB, slots: int = 7, **rollout) -> Engine:
    """An engine, shared by all tests with the same arguments. `slots`: slots per prompt."""
    shards = decode.size("rows")
    rollout = {"prompts": shards, "engine": EngineConfig(), **rollout}
    return Engine(EngineModel(cfg, decode, vocab), RolloutConfig(**rollout), slots)


@cache
def generator(samples: int, slots: int, cfg: ModelConfig, decode: Layout, vocab: Vocabulary = VOCAB, prompts: int = 8):
    """Return `generate(policy, prompts, key, temperature) -> Rollouts` for batches of `prompts` prompts."""
    sampler = engine(cfg, decode, vocab, prompts=prompts, samples=samples, max_new_tokens=slots)

    def generate(policy: Policy, prompts: Prompts, key: jax.Array, temperature: float | np.ndarray) -> Rollouts:
        controls = sampler.controls(len(prompts.length))
        each = np.broadcast_to(np.asarray(temperature, np.float32), controls.temperature.shape)
        return sampler.generate(policy, prompts, key, controls.replace(temperature=each))

    return generate


def make_prompts(num: int, slots: int = 7, seed: int = 0, vocab: int = 15) -> Prompts:
    """Ragged prompts of 1 to `slots` tokens, uids far apart."""
    rng = np.random.default_rng(seed)
    length = rng.integers(1, slots + 1, num).astype(np.int32)
    length[0], length[-1] = 1, slots
    tokens = rng.integers(1, vocab, (num, slots)).astype(np.int32)
    tokens[np.arange(slots) >= length[:, None]] = 0
    return Prompts(
        tokens=tokens, length=length, uid=np.arange(num, dtype=np.int32) * 1000 + 7, row=np.arange(num, dtype=np.int32)
    )


def until_of(length: np.ndarray, slots: int) -> np.ndarray:
    """`Batch.until` for rows of one sequence each, from slot 0 on."""
    slot = np.arange(slots)
    return np.where(slot < np.asarray(length)[:, None], np.asarray(length)[:, None], slot).astype(np.int32)


class Sequences(NamedTuple):
    """Prompts and completions row by row, with everything the loss uses: an `Experience` in a form convenient for tests."""

    prompt: np.ndarray
    prompt_length: np.ndarray
    tokens: np.ndarray
    length: np.ndarray
    group: np.ndarray
    loss_mask: np.ndarray
    temperature: np.ndarray
    behavior_logprobs: np.ndarray
    advantage: np.ndarray
    reference_logprobs: np.ndarray | None = None
    proximal_logprobs: np.ndarray | None = None
    values: np.ndarray | None = None
    returns: np.ndarray | None = None

    @property
    def experience(self) -> Experience:
        q, first = self, np.flatnonzero(np.diff(self.group, prepend=-1))
        number = np.arange(len(first), dtype=np.int32)
        prompt, sample = number_rows(np.diff(np.append(first, len(q.group))))
        rollouts = Rollouts(
            prompts=Prompts(q.prompt[first], q.prompt_length[first], number, number),
            prompt=prompt, sample=sample,
            tokens=q.tokens, length=q.length, sampled=q.loss_mask, behavior_logprobs=q.behavior_logprobs,
            entropy=np.zeros(q.tokens.shape, np.float32), temperature=q.temperature,
            version=np.zeros(q.tokens.shape, np.int32), finish=np.zeros(len(q.length), np.int32),
        )  # fmt: skip
        scores = Scores(q.reference_logprobs, q.proximal_logprobs, q.values)
        return Experience(ungraded(rollouts), scores, Credit(q.advantage, q.returns))


def to_experience(rollouts: Rollouts, advantage: np.ndarray | float = 0.0) -> Experience:
    """One advantage per row; every row is kept."""
    each = np.broadcast_to(advantage, rollouts.length.shape)[:, None]
    credit = Credit(np.where(rollouts.sampled, each, 0).astype(np.float32))
    return Experience(ungraded(rollouts), Scores(), credit)


def to_batch(
    experience: Experience, kind: str = "none", slots: int = 0, parts: int = 1, shards: int = 1, aggregation: str = "token",
    length: int = 1,
) -> Batch:  # fmt: skip
    """A batch of all rows, of the smallest shape that holds the longest possible sequences."""
    rollouts, groups = experience.groups.rollouts, len(experience.groups.failure)
    sizes = rollouts.prompts.tokens.shape[1], rollouts.tokens.shape[1]
    shape = batch_shape(kind, equal_groups(groups, len(rollouts.length) // groups), sizes, slots, parts, shards)
    return fill_batch(experience, shape, VOCAB.pad, aggregation, length)[0]

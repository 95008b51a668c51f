"""Workloads of the benchmarks: models and batches.

Dimensions as in `jaxrl_llm.types`. A multiply and an add count as two FLOPs.
"""

import dataclasses
from dataclasses import dataclass

import jax
import numpy as np

from jaxrl_llm.model import params as model_params
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.parallel.layout import DECODE, TRAIN, Layout
from jaxrl_llm.parallel.mesh import make_mesh
from jaxrl_llm.rollout.sample import Vocabulary
from jaxrl_llm.types import Prompts, PyTree

QWEN2 = {"qkv_bias": True, "tied_head": True, "head_dim": 64}
SIZES = {
    "S": ModelConfig(vocab_size=512, layers=4, d_model=256, heads=4, kv_heads=2, d_mlp=1024, **QWEN2),
    "M": ModelConfig(vocab_size=4096, layers=8, d_model=512, heads=8, kv_heads=4, d_mlp=2048, **QWEN2),
    # The shape of Qwen2.5-0.5B.
    "L": ModelConfig(vocab_size=151936, layers=24, d_model=896, heads=14, kv_heads=2, d_mlp=4864, **QWEN2),
    # The shape of Qwen3-1.7B.
    "XL": ModelConfig(
        vocab_size=151936,
        layers=28,
        d_model=2048,
        heads=16,
        kv_heads=8,
        head_dim=128,
        d_mlp=6144,
        qk_norm=True,
        tied_head=True,
    ),
}
DTYPES = ("float32", "bfloat16")
SAMPLES = 8
PROMPT_SLOTS = 64
NEW_TOKENS = 128


@dataclass(frozen=True)
class Workload:
    """One model at one batch: `rows` samples in groups of 8, prompts of 64 tokens, 128 new tokens each, none ended early."""

    size: str
    rows: int
    compute: str
    prompt: int = PROMPT_SLOTS

    @property
    def name(self) -> str:
        return f"{self.size} {self.rows} rows {self.compute}"

    @property
    def cfg(self) -> ModelConfig:
        return dataclasses.replace(SIZES[self.size], compute=self.compute)

    @property
    def prompts(self) -> int:
        return self.rows // SAMPLES

    @property
    def itemsize(self) -> int:
        return 4 if self.compute == "float32" else 2

    @property
    def vocabulary(self) -> Vocabulary:
        """A vocabulary without an end token."""
        return Vocabulary(size=self.cfg.vocab_size, pad=0, eos=(-1,))

    def num_params(self) -> int:
        return model_params.count(model_params.specs(self.cfg))

    def make_prompts(self) -> Prompts:
        rng = np.random.default_rng(0)
        count = np.arange(self.prompts, dtype=np.int32)
        tokens = rng.integers(0, self.cfg.vocab_size, (self.prompts, self.prompt)).astype(np.int32)
        return Prompts(tokens=tokens, length=np.full(self.prompts, self.prompt, np.int32), uid=count, row=count)


def make_params(size: str) -> PyTree:
    """Return random f32 parameters, the same for every program and dtype."""
    return model_params.init(model_params.specs(SIZES[size]), jax.random.key(0), layouts()[0])


def layouts() -> tuple[Layout, Layout]:
    """Return the TRAIN and DECODE layouts of one device: these benchmarks measure a single chip."""
    mesh = make_mesh(devices=jax.devices()[:1])
    return Layout(mesh, TRAIN), Layout(mesh, DECODE)

"""The programs of a 1-billion-parameter run on 16 chips, lowered from shapes alone, and what the TPU compiler makes of them."""

import dataclasses
import os
import time
from collections.abc import Callable
from functools import cached_property

import hlo
import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.model import params as model_params
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.experts import mixture
from jaxrl_llm.parallel.layout import DECODE, TRAIN, Layout
from jaxrl_llm.parallel.mesh import make_mesh
from jaxrl_llm.publish import abstract_policy, make_publish
from jaxrl_llm.rollout.decode import Vocabulary, make_generate
from jaxrl_llm.types import Batch, Prompts, TrainState
from jaxrl_llm.update.config import ClippedLoss, OptimizerConfig
from jaxrl_llm.update.step import make_optimizer, make_update, state_shardings

# Llama-3.2-1B.
ONE_BILLION = ModelConfig(
    vocab_size=128256, layers=16, d_model=2048, heads=32, kv_heads=8, head_dim=64, d_mlp=8192,
    rope_theta=5e5, norm_eps=1e-5, compute="bfloat16",
)  # fmt: skip
# Decode is unrolled, and 16 layers compile for minutes; what is asserted is said per layer. Training scans: all 16.
DECODE_LAYERS = int(os.environ.get("AOT_DECODE_LAYERS", "4"))
MESH = (1, 4, 4)
P, S, G, C = 32, 512, 8, 256
ROWS, SLOTS, PARTS = 64, 1024, 4
# Narrow, to compile in seconds. Layers of both kinds.
SLIDING = dataclasses.replace(ONE_BILLION, vocab_size=4096, d_mlp=2048, layers=2, sliding=(True, False), window=64)
EXPERTS = ModelConfig(
    vocab_size=4096, layers=1, d_model=1024, heads=16, kv_heads=4, head_dim=64, d_mlp=512, qk_norm=True,
    experts=16, experts_per_token=4, compute="bfloat16",
)  # fmt: skip
EXPERT_MESH = (1, 2, 2, 4)


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler made of a program: text, and sizes in bytes per chip."""

    cfg: ModelConfig
    text: str = dataclasses.field(repr=False)
    argument: int
    output: int
    temp: int
    alias: int
    seconds: float

    @cached_property
    def hlo(self) -> hlo.Module:
        return hlo.Module(self.text)

    @property
    def chip(self) -> int:
        """Bytes a chip holds while the program runs."""
        return self.argument + self.temp + self.output - self.alias


def compile_program(cfg: ModelConfig, lower: Callable[[], jax.stages.Lowered]) -> Program:
    start = time.monotonic()
    compiled = lower().compile()
    memory = compiled.memory_analysis()
    return Program(
        cfg=cfg,
        text=compiled.as_text(),
        argument=memory.argument_size_in_bytes,
        output=memory.output_size_in_bytes,
        temp=memory.temp_size_in_bytes,
        alias=memory.alias_size_in_bytes,
        seconds=time.monotonic() - start,
    )


def layouts(topology, sizes: tuple[int, ...] = MESH) -> tuple[Layout, Layout]:
    mesh = make_mesh(sizes, topology.devices)
    return Layout(mesh, TRAIN), Layout(mesh, DECODE)


def array(layout: Layout, shape: tuple[int, ...], dtype, *axes: str | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(axes))


def lower_generate(cfg: ModelConfig, decode: Layout, weights: str = "compute") -> jax.stages.Lowered:
    numbers = [array(decode, (P,), jnp.int32, "rows") for _ in range(3)]
    prompts = Prompts(array(decode, (P, S), jnp.int32, "rows", None), *numbers)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=decode.replicated)
    generate = make_generate(G, C, Vocabulary(size=cfg.vocab_size, pad=0, eos=(1,)), cfg, decode)
    temperature = array(decode, (P,), jnp.float32, "rows")
    return generate.lower(abstract_policy(cfg, decode, weights), prompts, key, temperature)


def lower_publish(cfg: ModelConfig, train: Layout, decode: Layout, weights: str = "compute") -> jax.stages.Lowered:
    params = model_params.abstract(model_params.specs(cfg), train)
    publish, old = make_publish(cfg, train, decode, weights), abstract_policy(cfg, decode, weights)
    return publish.lower(params, array(decode, (), jnp.int32), old)


def lower_update(cfg: ModelConfig, train: Layout) -> jax.stages.Lowered:
    specs, optimizer = model_params.specs(cfg), make_optimizer(OptimizerConfig())
    params = model_params.abstract(specs, train)
    shapes = jax.eval_shape(lambda p: TrainState(p, optimizer.init(p), np.zeros((), np.int32)), params)
    where = state_shardings(specs, optimizer, train)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)
    dtypes = [jnp.int32] * 3 + [bool] + [jnp.float32] * 3
    batch = Batch(*(array(train, (ROWS, SLOTS), dtype, "rows", None) for dtype in dtypes))
    update = make_update(
        specs, ClippedLoss(), OptimizerConfig(), normalize="token", length=C,
        micro_batches=PARTS, num_tokens=cfg.vocab_size, cfg=cfg, layout=train,
    )  # fmt: skip
    return update.lower(state, batch)


def lower_experts(cfg: ModelConfig, train: Layout) -> jax.stages.Lowered:
    """Gradients of one layer's experts alone: masters and rows."""
    layer = model_params.abstract(model_params.unstack(model_params.specs(cfg), cfg.layers)["layers"][0], train)
    layer = {name: layer[name] for name in ("router", "gate_up", "down")}
    h = array(train, (ROWS // PARTS, SLOTS, cfg.d_model), cfg.compute, "rows", None, None)
    loss = jax.checkpoint(lambda layer, h: jnp.sum(mixture(layer, h, cfg, train).astype(jnp.float32) ** 2))
    where = jax.tree.map(lambda x: x.sharding, (layer, h))
    return jax.jit(jax.grad(loss, argnums=(0, 1)), out_shardings=where).lower(layer, h)

"""Programs of runs on 16 chips, lowered from shapes alone and compiled by the real compilers."""

import dataclasses
import math
import os
import time
from collections.abc import Callable
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.distribution.score import Scoring
from jaxrl_llm.model import params as model_params
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.experts import mixture
from jaxrl_llm.model.params import ParamSpec
from jaxrl_llm.model.publish import abstract_policy, jit_publish
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.losses import make_loss
from jaxrl_llm.parallel.layout import DECODE, TRAIN, Layout
from jaxrl_llm.parallel.mesh import make_mesh
from jaxrl_llm.perf import hlo
from jaxrl_llm.rollout.config import EngineConfig, RolloutConfig
from jaxrl_llm.rollout.engine import Engine, EngineModel
from jaxrl_llm.rollout.programs import Programs
from jaxrl_llm.rollout.sample import Vocabulary
from jaxrl_llm.types import Batch, TrainState
from jaxrl_llm.update.optimizer.config import AdamW
from jaxrl_llm.update.optimizer.state import state_shardings
from jaxrl_llm.update.optimizer.transform import make_optimizer
from jaxrl_llm.update.step import jit_update

# Llama-3.2-1B.
ONE_BILLION = ModelConfig(
    vocab_size=128256, layers=16, d_model=2048, heads=32, kv_heads=8, head_dim=64, d_mlp=8192,
    rope_theta=5e5, norm_eps=1e-5, compute="bfloat16",
)  # fmt: skip
# Qwen3-8B with 2 of its 36 layers.
EIGHT_BILLION = ModelConfig(
    vocab_size=151936, layers=2, d_model=4096, heads=32, kv_heads=8, head_dim=128, d_mlp=12288,
    rope_theta=1e6, norm_eps=1e-6, qk_norm=True, tied_head=False, compute="bfloat16",
)  # fmt: skip
# Decode is unrolled, and 16 layers compile for minutes; assertions are per layer. Training scans over layers: all 16.
DECODE_LAYERS = int(os.environ.get("AOT_DECODE_LAYERS", "2"))
MESH = (1, 4, 4)
_, FSDP, TENSOR = MESH
SPLIT = {"heads": TENSOR, "mlp": TENSOR, "vocab": TENSOR}
P, S, G, C = 32, 512, 8, 256
STEPS = 128
# Steps of a chunk as long as the output of a reasoning model, and its window, in whole tiles.
LONG, LONG_WINDOW = 2000, 2048
ROWS, SLOTS, PARTS = 64, 1024, 4
# Narrow, to compile in seconds. Layers of both kinds.
SLIDING = dataclasses.replace(ONE_BILLION, vocab_size=4096, d_mlp=2048, layers=2, sliding=(True, False), window=128)
EXPERTS = ModelConfig(
    vocab_size=4096, layers=1, d_model=1024, heads=16, kv_heads=4, head_dim=64, d_mlp=512, qk_norm=True,
    experts=16, experts_per_token=4, compute="bfloat16",
)  # fmt: skip
EXPERT_MESH = (1, 2, 2, 4)
EXPERT_SPLIT = dict(zip(("data", "embed", "mlp", "expert"), EXPERT_MESH, strict=True))
EXPERT_SPLIT |= {"heads": EXPERT_SPLIT["mlp"], "vocab": EXPERT_SPLIT["mlp"]}
V5E_BYTES = 16e9
COMPILERS = {"tpu": pytest.mark.tpu_aot, "gpu": pytest.mark.gpu_aot}
only_tpu, only_gpu = (
    pytest.mark.parametrize("topology", [pytest.param(of, marks=mark)], indirect=True) for of, mark in COMPILERS.items()
)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program: HLO text, and sizes in bytes per chip."""

    of: str
    """The compiler: tpu or gpu."""
    cfg: ModelConfig
    text: str = dataclasses.field(repr=False)
    argument: int
    output: int
    temp: int
    alias: int
    seconds: float

    @cached_property
    def hlo(self) -> hlo.HloModule:
        return hlo.HloModule(self.text)

    @property
    def chip(self) -> int:
        """Bytes per chip while the program runs."""
        return self.argument + self.temp + self.output - self.alias


def local(spec: ParamSpec, axes: dict[str, int]) -> tuple[int, ...]:
    """The shape of a parameter's shard, given the split of each logical axis."""
    return tuple(n // axes.get(a, 1) for n, a in zip(spec.shape, spec.axes, strict=True))


def matrices(cfg: ModelConfig, axes: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Shard shapes of one layer's matrices in training, and of the tables."""
    specs = model_params.specs(cfg)
    layer = {name: ParamSpec(s.shape[1:], s.axes[1:], s.std) for name, s in specs["layers"].items()}
    return _matrices(layer, specs, axes)


def policy_matrices(cfg: ModelConfig, axes: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Shard shapes of one layer's matrices in a policy, and of the tables."""
    specs = model_params.unstack(model_params.specs(cfg), cfg.layers)
    return _matrices(specs["layers"][0], specs, axes)


def _matrices(layer: dict[str, ParamSpec], specs: dict, axes: dict[str, int]) -> dict[str, tuple[int, ...]]:
    leaves = {**layer, **{name: specs[name] for name in ("embed", "head") if name in specs}}
    return {name: local(spec, axes) for name, spec in leaves.items() if len(spec.shape) > 1}


def same_dims(array: hlo.ArrayShape, dims: tuple[int, ...]) -> bool:
    """True if equal up to order and dimensions of size 1."""
    return sorted(n for n in array.dims if n > 1) == sorted(n for n in dims if n > 1)


def compile_program(topology, cfg: ModelConfig, lower: Callable[[], jax.stages.Lowered]) -> Program:
    start = time.monotonic()
    compiled = lower().compile()
    memory = compiled.memory_analysis()
    return Program(
        of=topology.of,
        cfg=cfg,
        text=compiled.as_text(),
        argument=memory.argument_size_in_bytes,
        output=memory.output_size_in_bytes,
        temp=memory.temp_size_in_bytes,
        alias=memory.alias_size_in_bytes,
        seconds=time.monotonic() - start,
    )


def layouts(topology, sizes: tuple[int, ...] = MESH) -> tuple[Layout, Layout]:
    mesh = make_mesh(*sizes, devices=topology.devices[: math.prod(sizes)])
    return Layout(mesh, TRAIN), Layout(mesh, DECODE)


def array(layout: Layout, shape: tuple[int, ...], dtype, *axes: str | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(axes))


def rollout_programs(cfg: ModelConfig, decode: Layout, steps: int = STEPS, window: int = C) -> Programs:
    """Programs of an engine for P prompts of S slots, G samples each, in chunks of `steps` steps."""
    rollout = RolloutConfig(prompts=P, samples=G, max_new_tokens=window, engine=EngineConfig(decode_chunk=steps))
    return Engine(EngineModel(cfg, decode, Vocabulary(size=cfg.vocab_size, pad=0, eos=(1,))), rollout, S).programs


def lower_rollout(
    cfg: ModelConfig, decode: Layout, *name: str | int, steps: int = STEPS, weights: str = "compute"
) -> jax.stages.Lowered:
    """Lower one of these programs by its name in `Programs`."""
    window = name[2] if name[0] == "decode_chunk" else C
    return rollout_programs(cfg, decode, steps, window).lower(abstract_policy(cfg, decode, weights).params, *name)


def lower_publish(cfg: ModelConfig, train: Layout, decode: Layout, weights: str = "compute") -> jax.stages.Lowered:
    params = model_params.abstract(model_params.specs(cfg), train)
    publish, old = jit_publish(cfg, train, decode, weights), abstract_policy(cfg, decode, weights)
    return publish.lower(params, array(decode, (), jnp.int32), old)


def lower_update(cfg: ModelConfig, train: Layout) -> jax.stages.Lowered:
    specs, optimizer = model_params.specs(cfg), make_optimizer(AdamW())
    params = model_params.abstract(specs, train)
    shapes = jax.eval_shape(lambda p: TrainState(p, optimizer.init(p), np.zeros((), np.int32)), params)
    where = state_shardings(specs, optimizer, train)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)
    of = lambda dtype: array(train, (ROWS, SLOTS), dtype, "rows", None)  # noqa: E731
    batch = Batch(
        **dict.fromkeys(("tokens", "position", "until", "before", "segment", "group"), of(jnp.int32)),
        loss_mask=of(bool),
        **dict.fromkeys(("weight", "behavior_logprobs", "advantage", "temperature"), of(jnp.float32)),
    )
    update = jit_update(
        specs, make_loss(ObjectiveConfig()), optimizer, Scoring(cfg, train, cfg.vocab_size), micro_batches=PARTS
    )
    return update.lower(state, batch)


def lower_experts(cfg: ModelConfig, train: Layout) -> jax.stages.Lowered:
    """Lower the gradients of one layer's experts: of masters and rows."""
    layer = model_params.abstract(model_params.unstack(model_params.specs(cfg), cfg.layers)["layers"][0], train)
    layer = {name: layer[name] for name in ("router", "gate_up", "down")}
    h = array(train, (ROWS // PARTS, SLOTS, cfg.d_model), cfg.compute, "rows", None, None)
    loss = jax.checkpoint(lambda layer, h: jnp.sum(mixture(layer, h, cfg, train).astype(jnp.float32) ** 2))
    where = jax.tree.map(lambda x: x.sharding, (layer, h))
    return jax.jit(jax.grad(loss, argnums=(0, 1)), out_shardings=where).lower(layer, h)

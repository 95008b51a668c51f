"""`python -m benchmarks.memory CONFIG --shape DIR [--topology v5e:2x4] [--section.field value ...]`: bytes a chip of a config.

`prefill`, `grow`, `segment`, `publish` and `update` are compiled ahead of time from shapes alone, for a TPU topology with the real
TPU compiler, which needs no TPU. Chips are all of the topology; the mesh, batch and lengths are those of the config; the longest
prompt is taken to be task.max_prompt_tokens. Rollouts are looked at where they hold most: all prompts in flight, in the widest
window. Prints one JSON object: bytes a chip of each program's arguments, outputs and temporaries, less what is aliased, and
`step_peak`, the most that a chip holds in a step, with what lives on beside a program: TrainState, policy and caches.

--shape  directory whose config.json says how large the model is: the config's own model may not be on this machine
--chips  how many of the topology's chips (default: all); 1 stands for a single GPU, whose compiler is another
"""

import argparse
import dataclasses
import datetime
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

# Before libtpu loads: no questions to a metadata server, and no lock against other compilations.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from benchmarks.aot import bytes_of
from jaxrl_llm import config as run_config
from jaxrl_llm.cli import read_config
from jaxrl_llm.config import RunConfig
from jaxrl_llm.model import params as model_params
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.hf.config import read_config as read_model_config
from jaxrl_llm.parallel.config import resolve
from jaxrl_llm.parallel.layout import TRAIN, Layout
from jaxrl_llm.parallel.mesh import make_mesh
from jaxrl_llm.publish import abstract_policy, make_publish
from jaxrl_llm.rollout.engine import Engine
from jaxrl_llm.rollout.sample import Vocabulary
from jaxrl_llm.types import Batch, TrainState
from jaxrl_llm.update.step import make_optimizer, make_update, state_shardings

Lower = Callable[[], jax.stages.Lowered]


def array(layout: Layout, shape: tuple[int, ...], dtype: jnp.dtype, *axes: str | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(axes))


def programs(cfg: RunConfig, model: ModelConfig, train: Layout) -> dict[str, Lower]:
    """The programs of a step, each a function that traces it."""
    specs, rollout = model_params.specs(model), cfg.rollout
    decode = train.for_decode(rollout.engine.layout)
    params = model_params.abstract(specs, train)
    policy = abstract_policy(model, decode, rollout.engine.weights)
    slots = cfg.task.max_prompt_tokens
    engine = Engine(rollout, slots, Vocabulary(size=model.vocab_size, pad=0, eos=(1,)), model, decode)
    prompts, window = engine.sizes.prompts[0], engine.sizes.windows[-1]
    units = engine.sizes.units(prompts)

    optimizer = make_optimizer(cfg.update.optimizer)
    shapes = jax.eval_shape(lambda p: TrainState(p, optimizer.init(p), np.zeros((), np.int32)), params)
    where = state_shardings(specs, optimizer, train)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)
    rows = rollout.prompts * rollout.samples // cfg.update.minibatches
    dtypes = [jnp.int32] * 3 + [bool] + [jnp.float32] * 3
    batch = Batch(*(array(train, (rows, slots + rollout.max_new_tokens), dtype, "rows", None) for dtype in dtypes))
    update = make_update(
        specs, cfg.update.loss, cfg.update.optimizer, normalize=cfg.update.normalize, length=rollout.max_new_tokens,
        micro_batches=cfg.update.micro_batches, num_tokens=model.vocab_size, cfg=model, layout=train,
    )  # fmt: skip
    of_rollouts = {"prefill": (prompts, slots), "segment": (units, window)}
    if len(engine.sizes.windows) > 1:
        of_rollouts["grow"] = (units, *engine.sizes.windows[-2:])
    lower = {name: partial(engine.programs.lower, policy.params, name, *sizes) for name, sizes in of_rollouts.items()}
    publish = make_publish(model, train, decode, rollout.engine.weights)
    return lower | {
        "publish": lambda: publish.lower(params, policy.version, policy),
        "update": lambda: update.lower(state, batch),
    }


def measure(lower: Lower) -> dict[str, float]:
    start = time.monotonic()
    parts = bytes_of(lower().compile())
    return {"peak": parts.pop("chip"), **parts, "compile_seconds": round(time.monotonic() - start, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--shape", type=Path, required=True)
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--chips", type=int)
    args, overrides = parser.parse_known_args()
    cfg = read_config(str(args.config), overrides)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices[: args.chips]
    model = read_model_config(args.shape, cfg.model.compute)
    if problems := run_config.problems(dataclasses.replace(cfg, model=model), len(devices)):
        parser.error("\n".join(problems))
    mesh = make_mesh(resolve(cfg.mesh, len(devices))[0], devices)
    train = Layout(mesh, TRAIN)
    found = {name: measure(lower) for name, lower in programs(cfg, model, train).items()}
    # Moments and master, three of the four f32 copies of an update; the policy is what publish writes.
    state, policy = found["update"]["aliased"], found["publish"]["outputs"]
    # A segment's arguments, beside a few numbers: the policy and both caches, of which the rows' own is donated.
    rows = found["segment"]["aliased"]
    prompts = found["segment"]["arguments"] - policy - rows
    step_peak = state + max(
        found["prefill"]["peak"] + rows,
        found["grow"]["peak"] + policy + prompts if "grow" in found else 0,
        found["segment"]["peak"],
        found["publish"]["peak"] - state // 3,
        found["update"]["peak"] + policy - state,
    )
    report = {
        "config": " ".join([args.config.name, *overrides]), "topology": args.topology, "chips": len(devices),
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "parameters": model_params.count(model_params.specs(model)),
        "step_peak": step_peak, "train_state": state, "policy": policy, "programs": found,
    }  # fmt: skip
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

"""`python -m benchmarks.quantized [--sizes S,M] [--rows 8,64] ...`: decoding with int8 weights, compared with bf16 and f32.

All variants of one model and number of rows are timed alternately. Two numbers each: new tokens per second of whole
`generate` calls, and seconds of the matrix products of a decode step alone, each matrix of each layer once.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.clock import alternate
from benchmarks.generate import make_engine
from benchmarks.models import NEW_TOKENS, Workload, layouts, make_params
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.linear import contract
from jaxrl_llm.model.publish import jit_publish, make_empty_policy
from jaxrl_llm.model.transformer import logits
from jaxrl_llm.types import Policy, PyTree

VARIANTS = {"f32": ("float32", "compute"), "bf16": ("bfloat16", "compute"), "int8": ("bfloat16", "int8")}
"""Compute dtype, and dtype of the weights, by name."""


def products(policy: Policy, rows: int, cfg: ModelConfig) -> Callable[[], object]:
    """The matrix products of one decode step only, each layer on the same activations."""

    def step(params: PyTree, h: jax.Array, heads: jax.Array, mlp: jax.Array) -> list[jax.Array]:
        found = []
        for layer in params["layers"]:
            found += [contract(h, layer["qkv"]), contract(heads, layer["out"], 3)]
            found += [contract(h, layer["gate"]), contract(h, layer["up"]), contract(mlp, layer["down"])]
        return [jnp.sum(x) for x in (*found, logits(params, h, cfg))]

    rng = np.random.default_rng(0)
    shapes = (cfg.d_model,), (cfg.kv_heads, cfg.group, cfg.head_dim), (cfg.d_mlp,)
    inputs = [jnp.asarray(rng.normal(size=(rows, *shape)), cfg.compute) for shape in shapes]
    compiled = jax.jit(step)
    return lambda: compiled(policy.params, *inputs)


def calls(work: Workload, params: PyTree) -> dict[str, Callable[[], object]]:
    (train, decode), prompts, found = layouts(), work.make_prompts(), {}
    for name, (compute, weights) in VARIANTS.items():
        variant = dataclasses.replace(work, compute=compute)
        publish, empty = (
            jit_publish(variant.cfg, train, decode, weights),
            make_empty_policy(variant.cfg, decode, weights),
        )
        engine, policy = make_engine(variant, weights=weights), publish(params, np.int32(0), empty())
        found[f"generate {name}"] = lambda e=engine, p=policy: e.generate(p, prompts, jax.random.key(1))
        found[f"products {name}"] = products(policy, work.rows, variant.cfg)
    return found


def measure(size: str, rows: int, seconds: float) -> dict:
    work = Workload(size, rows, "float32")
    times = alternate(calls(work, make_params(size)), seconds)
    found = {"size": size, "rows": rows}
    for name in VARIANTS:
        found[name] = {
            "tokens_per_s": rows * NEW_TOKENS / times[f"generate {name}"].median,
            "step_s": times[f"generate {name}"].median / NEW_TOKENS,
            "products_s": times[f"products {name}"].median,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantized", description=__doc__.split("\n\n")[1])
    parser.add_argument("--sizes", default="S,M")
    parser.add_argument("--rows", default="8,64")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    todo = [(size, int(rows)) for size in given.sizes.split(",") for rows in given.rows.split(",")]
    results = []
    for size, rows in todo:
        results.append(measure(size, rows, given.seconds / len(todo)))
        print(json.dumps(results[-1]), flush=True)
    if given.out:
        given.out.write_text(json.dumps({"device": jax.devices()[0].device_kind, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

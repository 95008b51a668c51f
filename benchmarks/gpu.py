"""`python -m benchmarks.gpu [--seconds 500] [--small] [--out FILE.json]`: what to measure when a GPU is at hand, in one process.

    agreement   a model of f32 numbers on this device and on the CPU: tokens that are equal, the largest difference of their
                log-probs, and the relative difference of the gradients
    generate    decode steps of 0.5 and 1.7 billion parameters in bf16, 8 to 512 rows behind prompts of 1,024 and 8,192, each
                compared with the bytes and FLOPs that it needs at measured rates (`benchmarks.generate`)
    update      an optimizer step on about 16,000 tokens: MFU, and the fraction of the rate of its own products
    publish     compared with a copy of as many bytes
    step        a whole GRPO step of configs/arithmetic.yaml by stage

What matters most comes first: after `--seconds` nothing new starts, and the file names what was left out. `--small` runs all parts
with small models, on any device, to check the script itself.
"""

import argparse
import dataclasses
import datetime
import gc
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import generate, publish, step, update
from benchmarks.clock import alternate
from benchmarks.machine import HERE, file_name, machine
from benchmarks.models import SAMPLES, Workload, make_params
from jaxrl_llm.distribution.score import Scoring, score_tokens
from jaxrl_llm.model import params as model_params
from jaxrl_llm.model.publish import publisher
from jaxrl_llm.parallel.layout import DECODE, TRAIN, Layout
from jaxrl_llm.parallel.mesh import make_mesh
from jaxrl_llm.perf import ceilings, chips
from jaxrl_llm.rollout.config import RolloutConfig
from jaxrl_llm.rollout.engine import Engine, EngineModel

# Size, rows and prompt, most important first.
DECODE_CASES = (
    ("L", 64, 1024), ("XL", 64, 1024), ("L", 512, 1024), ("L", 8, 1024), ("L", 64, 8192), ("XL", 256, 1024), ("XL", 8, 1024),
    ("L", 256, 1024), ("XL", 64, 8192), ("XL", 512, 1024), ("L", 256, 8192),
)  # fmt: skip
# Rows of 64 + 128 tokens, a prompt of each eight once: 17,408 tokens.
UPDATE_CASES = (("L", 128), ("XL", 128))
SMALL_DECODE, SMALL_UPDATE = (("S", 16, 64), ("S", 8, 128)), (("S", 16),)
# Fraction of the device's memory that parameters and caches may take.
MOST_MEMORY = 0.7


def agreement(size: str = "S") -> dict:
    """Compare this device with the CPU. Products of f32 numbers are those of f32, not of TF32."""
    work, found = Workload(size, 16, "float32"), []
    with jax.default_matmul_precision("highest"):
        for device in (jax.devices("cpu")[0], jax.devices()[0]):
            mesh = make_mesh(devices=[device])
            train, decode = Layout(mesh, TRAIN), Layout(mesh, DECODE)
            params = jax.device_put(model_params.init(model_params.specs(work.cfg), jax.random.key(0), train), device)
            policy = publisher(work.cfg, train, decode)(params, np.int32(0), None)
            rollout = RolloutConfig(prompts=work.prompts, samples=SAMPLES, max_new_tokens=32)
            engine = Engine(EngineModel(work.cfg, decode, work.vocabulary), rollout, work.prompt)
            rollouts = engine.generate(policy, work.make_prompts(), jax.random.key(1))
            batch = jax.device_put(update.Case(work, "shared_prefix").batch(), train.replicated)
            scoring = Scoring(work.cfg, train, work.cfg.vocab_size)

            def loss(params, batch, scoring=scoring):
                return jnp.sum(batch.weight * score_tokens(params, batch, scoring).logprobs)

            gradient = jax.tree.leaves(jax.device_get(jax.jit(jax.grad(loss))(params, batch)))
            found.append((rollouts, np.concatenate([g.ravel() for g in gradient])))
    (own, on_cpu), (others, on_device) = found
    same = np.cumprod(own.tokens == others.tokens, axis=1).astype(bool)
    return {
        "device": jax.devices()[0].device_kind,
        "equal_tokens": float(same.mean()),
        "max_abs_dlogprob": float(np.abs(own.behavior_logprobs - others.behavior_logprobs)[same].max()),
        "gradient_relative_difference": float(np.linalg.norm(on_device - on_cpu) / np.linalg.norm(on_cpu)),
    }


def fits(work: Workload) -> bool:
    """Whether the f32 parameters, the policy and the caches fit into the device."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit") or chips.host_memory()
    cfg = work.cfg
    slots = work.prompts * work.prompt + work.rows * 2 * generate.NEW_TOKENS
    caches = 2 * work.itemsize * cfg.layers * cfg.kv_heads * cfg.head_dim * slots
    return work.num_params() * (4 + work.itemsize) + caches <= MOST_MEMORY * limit


def measure(size: str, works: list[Workload], rows: list[int], seconds: float, deadline: float) -> dict:
    """Measure one size: its decode steps, updates and publish, in turns.

    Args:
        size: of the model.
        works: decode steps.
        rows: of the updates.
        seconds: for repetitions.
        deadline: no call starts after this time of `time.monotonic`.
    """
    params, results = make_params(size), []
    square = ceilings.matmul_rate([("forward", 4096, 4096, 4096)], "bfloat16", 0.3)
    left = []
    for work in works:
        if time.monotonic() > deadline:
            left.append(f"{work.name} prompt {work.prompt}")
            continue
        limit = generate.ceiling(work, 0.2)
        times = alternate(generate.calls(work, params), seconds, deadline)
        if len(times) == 2:
            results.append(generate.result(work, times, limit))
        gc.collect()
    for number in rows:
        work = Workload(size, number, "bfloat16")
        if time.monotonic() > deadline:
            left.append(f"update {work.name}")
            continue
        case = update.Case(work, "shared_prefix")
        times = alternate({case.name: case.call(params)} | publish.calls(work, params), seconds, deadline)
        if case.name in times:
            found = case.result(times[case.name], square, update.own_rates(work, 0.2))
            chip = chips.lookup(jax.devices()[0].device_kind)
            results.append(found | ({"mfu": found["flops_per_s"] / chip.flops} if chip else {}))
        if f"publish {work.name}" in times:
            results.append(publish.result(work, times, publish.ceiling(work, 0.2)))
        gc.collect()
    return {"results": results, "left_out": left}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if jax.default_backend() != "gpu" and not args.small:
        parser.error(f"got {jax.devices()[0].device_kind}, want an NVIDIA GPU, or --small")
    start, date = time.monotonic(), datetime.date.today().isoformat()
    deadline = start + args.seconds
    decode, updates = (SMALL_DECODE, SMALL_UPDATE) if args.small else (DECODE_CASES, UPDATE_CASES)
    result = {
        "date": date,
        "command": f"python -m benchmarks.gpu {' '.join(sys.argv[1:])}".strip(),
        "machine": machine(),
    }
    out = args.out or HERE / "results" / f"gpu-{file_name(result['machine'])}-{date}.json"
    result |= {"agreement": agreement(), "results": [], "left_out": []}
    sizes = list(dict.fromkeys(size for size, *_ in decode))
    for size in sizes:
        works = [
            dataclasses.replace(Workload(s, rows, "bfloat16"), prompt=prompt) for s, rows, prompt in decode if s == size
        ]
        result["left_out"] += [f"{w.name} prompt {w.prompt}: memory" for w in works if not fits(w)]
        # Half of what is left for all sizes but the last.
        until = deadline if size == sizes[-1] else (time.monotonic() + deadline) / 2
        rows = [rows for s, rows in updates if s == size]
        found = measure(size, [w for w in works if fits(w)], rows, 1.0 if args.small else 3.0, until)
        result["results"] += found["results"]
        result["left_out"] += found["left_out"]
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if time.monotonic() < deadline:
        result["step"] = step.measure(steps=3 if args.small else 15)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for r in result["results"]:
        part = r.get("fraction_of_ceiling", 0.0)
        print(f"{r['program']:9} {r['size']:3} {r['shapes']}: {part:.2f} of the ceiling")
    print(f"{result['agreement']}\nleft out: {', '.join(result['left_out']) or 'nothing'}\n{out}")


if __name__ == "__main__":
    main()

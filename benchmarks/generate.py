"""`generate`: new tokens per second, and a decode step compared with its least possible time.

    tokens per second B C / t of one whole call: prefill and C = 128 steps; nothing compiles in it, no row ends early
    step              (t_call - t_prefill) / C, prefill timed as a separate program, alternating with the call

Minimum work of a decode step, averaged over the C steps, with b bytes per number of the compute dtype:

    bytes   b N                            every parameter once (tied head: the embedding, read as head)
          + 2 b L K H P S                  the prompts' keys and values, once per prompt, not per sample
          + 2 b L K H B (C + 1) / 2        the completions' keys and values so far
          + 2 b L K H B                    keys and values written
    FLOPs   2 N_mat B + 4 L N_heads H B (S + (C + 1) / 2)      weight products, head included; q k' and weights v

    ceiling of a step = max(bytes / bandwidth, FLOPs / rate)

`bandwidth` is that of copying an array of as many bytes as the step moves (so a model that fits the caches is compared with them),
`rate` that of matrix products at the step's shapes, [B k] x [k n]. Sampling is not in the ceiling: its cost is part of the gap.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from benchmarks.clock import Timing
from benchmarks.models import NEW_TOKENS, SAMPLES, Workload, layouts
from jaxrl_llm.model.publish import jit_publish, make_empty_policy
from jaxrl_llm.perf.ceilings import copy_bandwidth, matmul_rate
from jaxrl_llm.perf.work import Work, decode_step, weight_products
from jaxrl_llm.rollout.config import EngineConfig, RolloutConfig
from jaxrl_llm.rollout.engine import Engine, EngineModel
from jaxrl_llm.types import Policy, PyTree


def step_work(work: Workload) -> Work:
    """Bytes and FLOPs of a step in the middle of the call."""
    length, age = np.full(work.prompts, work.prompt - 1), np.full(work.prompts, NEW_TOKENS // 2)
    step = decode_step(work.cfg, length, age, SAMPLES, work.itemsize)
    return Work(step.bytes + work.itemsize * work.num_params(), step.flops)


def ceiling(work: Workload, seconds: float) -> dict[str, float]:
    """Ceiling of one decode step: its bytes and FLOPs, the measured rates, and the resulting seconds."""
    moved, flops = step_work(work)
    bandwidth = copy_bandwidth(int(moved), seconds)
    shapes = [("forward", work.rows, k, n) for k, n, often in weight_products(work.cfg) for _ in range(min(often, 2))]
    rate = matmul_rate(shapes, work.compute, seconds)
    return {
        "bytes": moved,
        "flops": flops,
        "bytes_per_s": bandwidth,
        "flops_per_s": rate,
        "step_s": max(moved / bandwidth, flops / rate),
        "bound": "bytes" if moved / bandwidth > flops / rate else "flops",
    }


def make_engine(work: Workload, prompts: int = 0, **changes: object) -> Engine:
    """Engine for calls of `prompts` prompts (by default the workload's), with `changes` to its config."""
    rollout = RolloutConfig(
        prompts=prompts or work.prompts, samples=SAMPLES, max_new_tokens=NEW_TOKENS,
        engine=dataclasses.replace(EngineConfig(), **changes),
    )  # fmt: skip
    return Engine(EngineModel(work.cfg, layouts()[1], work.vocabulary), rollout, work.prompt)


def make_policy(work: Workload, params: PyTree) -> Policy:
    cfg, (train, decode) = work.cfg, layouts()
    return jit_publish(cfg, train, decode)(params, np.int32(0), make_empty_policy(cfg, decode)())


def calls(work: Workload, params: PyTree) -> dict[str, Callable[[], object]]:
    """Programs to time: the whole call, and its prefill alone."""
    engine, policy, prompts = make_engine(work), make_policy(work, params), work.make_prompts()
    length = prompts.length - 1
    return {
        f"generate {work.name}": lambda: engine.generate(policy, prompts, jax.random.key(1)),
        f"prefill {work.name}": lambda: engine.programs(
            policy.params, "prefill", work.prompts, engine.sizes.prompt_slots[-1]
        )(policy.params, prompts.tokens, length),
    }


def result(work: Workload, times: dict[str, Timing], limit: dict[str, float]) -> dict:
    call, fill = times[f"generate {work.name}"], times[f"prefill {work.name}"]
    step = (call.median - fill.median) / NEW_TOKENS
    tokens = work.rows * NEW_TOKENS
    return {
        "program": "generate",
        "size": work.size,
        "compute": work.compute,
        "shapes": {"rows": work.rows, "samples": SAMPLES, "prompt": work.prompt, "new_tokens": NEW_TOKENS},
        "time": call.as_dict(),
        "prefill_s": fill.median,
        "tokens_per_s": tokens / call.median,
        "step_s": step,
        "ceiling": limit,
        "fraction_of_ceiling": limit["step_s"] / step,
    }

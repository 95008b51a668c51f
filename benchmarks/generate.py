"""`generate`: new tokens a second, and a decode step beside the least time it can take.

    tokens a second   B C / t of one whole call: prefill and C = 128 steps; nothing compiles in it, no row ends early
    step              (t_call - t_prefill) / C, prefill timed as a program of its own, in turns with the call

The least a decode step must do, on the average over the C steps, b bytes an entry of the compute dtype:

    bytes   b N                            every parameter once (tied head: the embedding, read as head)
          + 2 b L K H P S                  the prompts' keys and values, once a prompt, not once a sample
          + 2 b L K H B (C + 1) / 2        the rows' own keys and values so far
          + 2 b L K H B                    those written
    FLOPs   2 N_mat B + 4 L N_heads H B (S + (C + 1) / 2)      weight products, head included; q k' and weights v

    ceiling of a step = max(bytes / bandwidth, FLOPs / rate)

`bandwidth` is a copy's over an array of as many bytes as the step moves (so a model that fits the caches is held to the caches),
`rate` the products' at the step's own shapes, [B k] x [k n]. Sampling is in no ceiling: what it costs shows as the gap.
"""

from collections.abc import Callable

import jax
import numpy as np

from benchmarks.ceilings import copy_bandwidth, matmul_rate
from benchmarks.clock import Timing
from benchmarks.models import NEW_TOKENS, PROMPT_SLOTS, SAMPLES, Workload, layouts, matmul_params, weight_products
from jaxrl_llm.model.transformer import prefill
from jaxrl_llm.publish import make_blank, make_publish
from jaxrl_llm.rollout.decode import make_generate
from jaxrl_llm.types import PyTree


def step_bytes(work: Workload) -> float:
    cfg = work.cfg
    entry = 2 * work.itemsize * cfg.layers * cfg.kv_heads * cfg.head_dim
    own = work.rows * (NEW_TOKENS + 1) / 2
    return work.itemsize * work.num_params() + entry * (work.prompts * PROMPT_SLOTS + own + work.rows)


def step_flops(work: Workload) -> float:
    cfg = work.cfg
    seen = PROMPT_SLOTS + (NEW_TOKENS + 1) / 2
    return 2 * matmul_params(cfg) * work.rows + 4 * cfg.layers * cfg.heads * cfg.head_dim * work.rows * seen


def ceiling(work: Workload, seconds: float) -> dict[str, float]:
    """Of one decode step: what it moves and computes, at which measured rates, and the seconds that follow."""
    moved, flops = step_bytes(work), step_flops(work)
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


def calls(work: Workload, params: PyTree) -> dict[str, Callable[[], object]]:
    """The programs to time: the whole call, and its prefill alone."""
    cfg, (train, decode) = work.cfg, layouts()
    policy = make_publish(cfg, train, decode)(params, np.int32(0), make_blank(cfg, decode)())
    prompts, key = jax.device_put(work.make_prompts(), decode.replicated), jax.random.key(1)
    temperature = jax.device_put(np.ones(work.prompts, np.float32), decode.replicated)
    generate = make_generate(SAMPLES, NEW_TOKENS, work.vocabulary, cfg, decode)
    fill = jax.jit(lambda params, tokens, length: prefill(params, tokens, length, cfg, decode))
    return {
        f"generate {work.name}": lambda: generate(policy, prompts, key, temperature),
        f"prefill {work.name}": lambda: fill(policy.params, prompts.tokens, prompts.length),
    }


def result(work: Workload, times: dict[str, Timing], limit: dict[str, float]) -> dict:
    call, fill = times[f"generate {work.name}"], times[f"prefill {work.name}"]
    step = (call.median - fill.median) / NEW_TOKENS
    tokens = work.rows * NEW_TOKENS
    return {
        "program": "generate",
        "size": work.size,
        "compute": work.compute,
        "shapes": {"rows": work.rows, "samples": SAMPLES, "prompt": PROMPT_SLOTS, "new_tokens": NEW_TOKENS},
        "time": call.as_dict(),
        "prefill_s": fill.median,
        "tokens_per_s": tokens / call.median,
        "step_s": step,
        "ceiling": limit,
        "fraction_of_ceiling": limit["step_s"] / step,
    }

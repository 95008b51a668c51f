"""`update`: tokens a second of one optimizer step, and its FLOPs beside the measured matmul ceiling.

    tokens a second   R T / t, with R rows of T = 64 + 128 slots, all of them real tokens
    FLOPs             6 N_mat R T + 6 L N_heads H R T^2

N_mat are the entries of all weight matrices, the head included and the look-up of the embedding not; two FLOPs forward and four
backward for each and each token. Attention is counted causal (half of the square): q k' and weights v are 2 * 2 * R T^2 / 2 * L N H
FLOPs forward, twice that backward. What remat computes again (about a third on top) is not counted: this is model FLOPs
utilisation against a measured peak, not against a data sheet's.

    fraction            FLOPs / t / rate of a large square product in the compute dtype
    own-shape fraction  FLOPs / t / rate over this step's own weight products: forward, dx = g w', dw = x' g

Rows beyond 64 go in micro-batches of 64.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.clock import Timing
from benchmarks.models import NEW_TOKENS, PROMPT_SLOTS, Workload, layouts
from jaxrl_llm.ceilings import Product, matmul_rate
from jaxrl_llm.model import params as model_params
from jaxrl_llm.model.work import matmul_params, weight_products
from jaxrl_llm.types import Batch, PyTree
from jaxrl_llm.update.config import ClippedLoss, OptimizerConfig
from jaxrl_llm.update.step import make_optimizer, make_start, make_update

SLOTS = PROMPT_SLOTS + NEW_TOKENS
MICRO_ROWS = 64


def step_flops(work: Workload) -> float:
    cfg, tokens = work.cfg, work.rows * SLOTS
    return 6 * matmul_params(cfg) * tokens + 6 * cfg.layers * cfg.heads * cfg.head_dim * tokens * SLOTS


def own_products(work: Workload) -> list[Product]:
    """One layer's and the head's; the head's rows are a quarter, and its size at most 2^15, to bound memory."""
    tokens = min(work.rows, MICRO_ROWS) * SLOTS
    shapes = [(tokens if often > 1 else tokens // 4, k, min(n, 2**15)) for k, n, often in weight_products(work.cfg)]
    return [(form, *shape) for shape in shapes for form in ("forward", "dx", "dw")]


def make_batch(work: Workload) -> Batch:
    """Random tokens; advantages of both signs; behaviour log-probs of a uniform policy, so that ratios are near 1."""
    rng = np.random.default_rng(0)
    shape = (work.rows, SLOTS)
    learn = np.broadcast_to(np.arange(SLOTS) >= PROMPT_SLOTS, shape)
    return Batch(
        tokens=rng.integers(0, work.cfg.vocab_size, shape).astype(np.int32),
        segment=np.ones(shape, np.int32),
        position=np.broadcast_to(np.arange(SLOTS, dtype=np.int32), shape).copy(),
        loss_mask=learn.copy(),
        behavior_logprobs=np.where(learn, -np.log(work.cfg.vocab_size), 0).astype(np.float32),
        advantage=np.where(learn, rng.standard_normal((work.rows, 1)), 0).astype(np.float32),
        temperature=np.ones(shape, np.float32),
    )


def calls(work: Workload, params: PyTree) -> dict[str, Callable[[], object]]:
    """The program to time. Its state is donated, so each call goes on from the one before."""
    cfg, (train, _) = work.cfg, layouts()
    specs, optimizer = model_params.specs(cfg), OptimizerConfig(lr=1e-6)
    update = make_update(
        specs, ClippedLoss(), optimizer, normalize="token", length=NEW_TOKENS,
        micro_batches=max(1, work.rows // MICRO_ROWS), num_tokens=cfg.vocab_size, cfg=cfg, layout=train,
    )  # fmt: skip
    batch = jax.device_put(make_batch(work), train.replicated)
    state = make_start(specs, make_optimizer(optimizer), train)(jax.tree.map(jnp.copy, params), np.int32(0))

    def call() -> object:
        nonlocal state
        state, metrics = update(state, batch)
        return state, metrics

    return {f"update {work.name}": call}


def result(work: Workload, times: dict[str, Timing], square_rate: float, own_rate: float) -> dict:
    time, flops = times[f"update {work.name}"], step_flops(work)
    rate = flops / time.median
    return {
        "program": "update",
        "size": work.size,
        "compute": work.compute,
        "shapes": {"rows": work.rows, "slots": SLOTS, "micro_batches": max(1, work.rows // MICRO_ROWS)},
        "time": time.as_dict(),
        "tokens_per_s": work.rows * SLOTS / time.median,
        "flops": flops,
        "flops_per_s": rate,
        "ceiling": {"flops_per_s": square_rate, "own_shapes_flops_per_s": own_rate},
        "fraction_of_ceiling": rate / square_rate,
        "fraction_of_own_shapes": rate / own_rate,
    }


def own_rate(work: Workload, seconds: float) -> float:
    """FLOPs a second over `own_products`."""
    return matmul_rate(own_products(work), work.compute, seconds)

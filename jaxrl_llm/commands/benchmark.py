"""`jaxrl sample --benchmark`: speed of a config's own rollouts, beside the measured ceiling of the machine."""

import time

import numpy as np

from jaxrl_llm.commands.loaded_policy import load_policy, prepare_sampling
from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.model.params import count
from jaxrl_llm.roles import memory_check
from jaxrl_llm.roles.build import make_keys, order_of
from jaxrl_llm.roles.rates import sampler_rates
from jaxrl_llm.tasks.stream import completion_limits, make_prompts


def benchmark_rollouts(cfg: RunConfig, calls: int = 5) -> None:
    """Print tokens per second, active rows per step, wasted row-steps, and the fraction of the machine's ceiling.

    Args:
        calls: number of timed batches of rollouts; the median is printed.
    """
    setup = prepare_sampling(cfg)
    blueprint, engine, train_rows = setup.blueprint, setup.engine, setup.task.train
    memory_check.check(blueprint, len(setup.task.held_out), trains=False)
    loaded, key = load_policy(setup), make_keys(cfg.seed).train
    order, places = order_of(setup.task, cfg.seed), np.arange(cfg.rollout.prompts)
    prompts = make_prompts(setup.task, train_rows, np.array([order(p) for p in places]), places)
    limit = completion_limits(train_rows, prompts.row, cfg.rollout.max_new_tokens)
    start = time.perf_counter()
    engine.warm(loaded.policy, cfg.rollout.prompts)
    engine.generate(loaded.policy, prompts, key, limit=limit)
    first, rates, measured = time.perf_counter() - start, sampler_rates(engine), []
    for _ in range(calls):
        session = engine.session(loaded.policy, key)
        session.add(prompts, limit=limit)
        while session.pending:
            session.advance()
        measured.append(session.stats)
    stats = sorted(measured, key=lambda stats: stats.seconds)[calls // 2]
    gb, gflop, least = stats.work.bytes / 1e9, stats.work.flops / 1e9, stats.least_seconds(*rates)
    lines = [
        ("policy", f"{loaded.name}, {count(blueprint.specs):,} parameters, {blueprint.model.compute}"),
        ("rollouts", f"{cfg.rollout.prompts} prompts x {cfg.rollout.samples} samples, up to {cfg.rollout.max_new_tokens} tokens"),
        ("first call", f"{first:.2f} s, compiling included"),
        ("call", f"{stats.seconds:.3f} s, the median of {calls}; {stats.steps} steps in {stats.chunks} chunks"),
        ("tokens", f"{stats.tokens / stats.seconds:,.0f} per second, {stats.tokens:,} in all"),
        ("active rows", f"{stats.tokens / stats.steps:.1f} per step; {1 - stats.tokens / stats.row_steps:.1%} of row-steps wasted"),
        ("one step", f"moves {gb / stats.steps * 1e3:,.1f} MB, computes {gflop / stats.steps:,.2f} GFLOP per device, on average"),
        ("this machine", f"{rates.bytes_per_s / 1e9:,.1f} GB/s and {rates.flops_per_s / 1e9:,.1f} GFLOP/s per device"),
        ("of the ceiling", f"{least / stats.seconds:.0%}: {least:.3f} s at those rates, of {stats.seconds:.3f} s"),
    ]  # fmt: skip
    for name, text in lines:
        print(f"{name:15s}{text}")

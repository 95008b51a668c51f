"""Time of one complete GRPO step of a config, by stage, from the `step` of the training loop and its timers.

Seconds of generate, reward, update and publish as logged by a run, wall-clock seconds of the whole step, and their difference
`other`: prompts, filter, advantage, replay and summaries of rollouts. The policy is untrained (no warm start); the step has no
evaluation, checkpoint or recorded rollouts. `update` includes all epochs x minibatches.
"""

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from jaxrl_llm.config import loading
from jaxrl_llm.metrics.config import MetricsConfig
from jaxrl_llm.roles.start_or_restore import start_params, start_rl
from jaxrl_llm.train import first_policy, open_run, step, summary
from jaxrl_llm.update.config import WarmStartConfig

CONFIG = Path(__file__).parent.parent / "configs" / "arithmetic.yaml"


def measure(steps: int = 15, warm: int = 2) -> dict:
    """Return median seconds of each stage over `steps` steps, after `warm` steps that compile."""
    with tempfile.TemporaryDirectory() as directory:
        quiet = MetricsConfig(samples_every=0, rollouts_every=0, tensorboard=False)
        cfg = dataclasses.replace(loading.load(CONFIG), run_dir=directory, warm_start=WarmStartConfig(), metrics=quiet)
        with open_run(cfg, must_resume=False, given=None, ends_process=False) as run:
            params, seen = start_params(run.blueprint, run.keys.train), []
            state = start_rl(run.blueprint, run.learner, run.source.state, params, run.keys.train)
            policy = first_policy(run, state.train)
            for number in range(warm + steps):
                start = time.perf_counter()
                done = step(run.learner, run.source, state, policy, np.random.default_rng((cfg.seed, number)))
                summary(run, done)
                state, policy = done.state, done.policy
                whole = time.perf_counter() - start
                stages = {name.removeprefix("time/"): s for name, s in run.context.timers.take().items()}
                seen.append({**stages, "other": whole - sum(stages.values()), "whole": whole})
    seen = seen[warm:]
    return {
        "config": f"configs/{CONFIG.name}",
        "steps": steps,
        "updates_a_step": cfg.update.epochs * cfg.update.minibatches,
        "median_s": {name: statistics.median(s[name] for s in seen) for name in seen[0]},
        "low_s": {name: min(s[name] for s in seen) for name in seen[0]},
        "high_s": {name: max(s[name] for s in seen) for name in seen[0]},
    }

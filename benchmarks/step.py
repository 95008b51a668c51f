"""One whole GRPO step of a config, stage by stage, through the training loop's own `rl_step` and its timers.

Seconds of generate, reward, update and publish as a run logs them, the whole step by the wall, and `other`, the difference:
prompts, filter, advantage, replay, and the describing of rollouts. The policy is the untrained one: no warm start, and no
evaluation, checkpoint or record of rollouts is in the step. `update` holds all epochs x minibatches.
"""

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

from jaxrl_llm import config as run_config
from jaxrl_llm.life import begin, fresh_state
from jaxrl_llm.metrics import MetricsConfig
from jaxrl_llm.run import build, publish
from jaxrl_llm.train import open_shell, rl_step
from jaxrl_llm.update.config import WarmStartConfig

CONFIG = Path(__file__).parent.parent / "configs" / "arithmetic.yaml"


def measure(steps: int = 15, warm: int = 2) -> dict:
    """Median seconds of each stage over `steps` steps after `warm` that compile."""
    with tempfile.TemporaryDirectory() as directory:
        quiet = MetricsConfig(samples_every=0, rollouts_every=0, tensorboard=False)
        cfg = dataclasses.replace(
            run_config.load(CONFIG), run_dir=directory, warm_start=WarmStartConfig(), metrics=quiet
        )
        run = build(cfg)
        with open_shell(cfg) as shell:
            life, seen = begin(run), []
            life = dataclasses.replace(life, began=True, state=fresh_state(run, life.state.params, 0, began=True))
            policy = publish(run, life.state, None)
            for _ in range(warm + steps):
                start = time.perf_counter()
                life, policy, *_ = rl_step(run, shell, life, policy)
                whole = time.perf_counter() - start
                stages = {name.removeprefix("time/"): s for name, s in shell.timers.take().items()}
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

"""Our trainer through `jaxrl_llm.train.step`, the step of `jaxrl train`, with grader processes and metrics.

    shared   a prompt and its 8 completions in one row (update.packing shared_prefix)
    apart    one sequence per row, as in the other trainers

No end token is sampled (`rollout.min_new_tokens`). With beta: KL to a copy of the weights, k3 times the ratio as in TRL.
"""

import atexit
import contextlib
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.peers.serve import Step, serve_steps, versions
from jaxrl_llm.config import loading, run_config
from jaxrl_llm.roles.start_or_restore import start_params, start_rl
from jaxrl_llm.run_context import with_rates
from jaxrl_llm.train import Run, first_policy, open_run, step, summary

GROUPS, SAMPLES, NEW_TOKENS = 8, 8, 128
PACKINGS = {"shared": "shared_prefix", "apart": "none"}


def config(directory: str, words: str, compute: str, variant: str, beta: float, run_dir: str) -> run_config.RunConfig:
    """Return the config as loaded from a YAML file."""
    values = {
        "run_dir": run_dir,
        "model": {"path": directory, "compute": compute},
        "tokenizer": {"path": words, "chat": False},
        "task": {"kind": "file", "path": str(Path(words) / "prompts.jsonl"), "answer": "", "held_out": 8},
        "rollout": {
            "prompts": GROUPS,
            "samples": SAMPLES,
            "max_new_tokens": NEW_TOKENS,
            "min_new_tokens": NEW_TOKENS,
        },
        "reward": "benchmarks.peers.reward:grade",
        "objective": {"preset": "trl:grpo", "loss": {"kl": {"kind": "k3", "weight": beta, "times": "ratio"}}},
        # One group per micro-batch: its activations are small and need no recomputation.
        "update": {"packing": {"kind": PACKINGS[variant]}, "micro_batches": GROUPS, "optimizer": {"lr": 1e-6}},
        "metrics": {"samples_every": 0, "rollouts_every": 0, "tensorboard": False},
    }
    return loading.validate(values, "ours_step")


def load(directory: str, words: str, compute: str, variant: str, beta: float) -> tuple[Step, dict]:
    cfg = config(directory, words, compute, variant, beta, tempfile.mkdtemp())
    stack = contextlib.ExitStack()
    run = stack.enter_context(open_run(cfg, must_resume=False, given=None, ends_process=False))
    atexit.register(stack.close)
    run.learner.compile()
    # The start of `train`, without its evaluation: the other trainers have none.
    params = start_params(run.blueprint, run.keys.train)
    state = start_rl(run.blueprint, run.learner, run.source.state, params, run.keys.train)
    held = [state, first_policy(run, state.train)]

    def one_step() -> dict:
        state, policy = held
        rng = np.random.default_rng((cfg.seed, int(state.step)))
        done = step(run.learner, run.source, state, policy, rng)
        held[:] = done.state, done.policy
        metrics = with_rates(summary(run, done), run.context)
        return {
            "rollout_s": metrics["time/generate"],
            "tokens": int(metrics["completions/tokens"]),
            "updates": int(done.state.train.step),
            "stages": {name: metrics[name] for name in metrics if name.startswith("time/")},
            "gradient_norm": metrics["grad_norm"],
        }

    return one_step, facts(run)


def facts(run: Run) -> dict:
    cfg = run.blueprint.cfg
    return {
        "versions": versions("jax", "jaxlib", "flax", "optax"),
        "threads": "XLA: one per core",
        "packing": cfg.update.packing.kind,
        "remat": cfg.update.remat,
        "attention": cfg.update.attention,
        "dtype": "float32",
        "compute": run.blueprint.model.compute,
        "optimizer": "optax adamw",
    }


if __name__ == "__main__":
    serve_steps(load)

"""A budget and a selection rule of one's own, named in a config as "custom_budget:Harder" and "custom_budget:short_and_mixed".

    python examples/custom_budget.py

The budget gives prompts that were answered wrong more often more samples. Twenty seconds on two CPU cores.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import jaxrl_llm as rl

CONFIG = """
steps: 12
task: {kind: arithmetic, terms: 2, held_out: 20}
model: {vocab_size: 16, layers: 1, d_model: 32, heads: 2, kv_heads: 2, head_dim: 16, d_mlp: 64}
warm_start: {steps: 80, rows: 64, noise: 0.5, optimizer: {lr: 3.0e-3}}
rollout: {prompts: 16, samples: 8, max_new_tokens: 4}
reward: {grader: exact_match, workers: 1}
experience:
  budget: {function: "custom_budget:Harder", options: {memory: 0.5}}
  filter: [success, "custom_budget:short_and_mixed"]
metrics: {console_every: 1000, samples_every: 0, tensorboard: false}
"""


class Harder:
    """Samples in proportion to how often a prompt was answered wrong so far, two at least."""

    def __init__(self, memory: float):
        self.memory = memory

    def init(self, num_rows: int) -> np.ndarray:
        return np.full(num_rows, 0.5)

    def allocate(
        self, wrong: np.ndarray, row: np.ndarray, seen: rl.Groups | None, left: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the next state, and samples [n] of the prompts `row`. Asked again with what was `seen`, it has nothing to add."""
        if seen is not None:
            return wrong, np.zeros(len(row), int)
        share = np.maximum(wrong[row], 0.05)
        return wrong, 2 + np.floor((left - 2 * len(row)) * share / share.sum()).astype(int)

    def observe(self, wrong: np.ndarray, groups: rl.Groups) -> np.ndarray:
        success, prompt, wrong = groups.measure("success"), groups.rollouts.prompt, wrong.copy()
        for p, row in enumerate(groups.rollouts.prompts.row):
            if not groups.failure[p]:
                wrong[row] = self.memory * wrong[row] + (1 - self.memory) * (1 - success[prompt == p].mean())
        return wrong


def short_and_mixed(groups: rl.Groups) -> np.ndarray:
    """True for responses [B] no longer than the average one of the step."""
    length = groups.rollouts.length
    return length <= length[groups.keep].mean() if groups.keep.any() else groups.keep


def main() -> list[dict]:
    """Train, print and return the metrics of each step of RL."""
    with TemporaryDirectory() as directory:
        path = Path(directory) / "config.yaml"
        path.write_text(CONFIG)
        rl.train.train(rl.load_config(path, ["--run_dir", f"{directory}/run"]))
        lines = (Path(directory) / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [row for row in map(json.loads, lines) if row["phase"] == "rl" and "reward" in row]
    for row in steps:
        print(
            f"{row['step']} reward {row['reward']:.3f} samples {row['rollout/samples']:.0f} kept {row['kept/rows']:.0f}"
        )
    return steps


if __name__ == "__main__":
    main()

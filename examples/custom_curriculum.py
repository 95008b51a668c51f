"""A curriculum with a state and a draw rule of the replay of one's own, named in a config as "custom_curriculum:LongestAgo" and
"custom_curriculum:half_right".

    python examples/custom_curriculum.py

The curriculum takes the prompts that were not answered right for the longest time. Twenty seconds on two CPU cores.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import jaxrl_llm as rl
from jaxrl_llm.experience.draws import Candidates

CONFIG = """
steps: 12
task: {kind: arithmetic, terms: 2, held_out: 20}
model: {vocab_size: 16, layers: 1, d_model: 32, heads: 2, kv_heads: 2, head_dim: 16, d_mlp: 64}
warm_start: {steps: 80, rows: 64, noise: 0.5, optimizer: {lr: 3.0e-3}}
rollout: {prompts: 16, samples: 8, max_new_tokens: 4}
reward: {grader: exact_match, workers: 1}
experience:
  curriculum: {function: "custom_curriculum:LongestAgo", options: {right: 0.5}}
  filter: success
  replay: {capacity: 64, max_uses: 3, draw: "custom_curriculum:half_right"}
metrics: {console_every: 1000, samples_every: 0, tensorboard: false}
"""


class LongestAgo:
    """Rows of the task whose last good visit is longest ago, by chance among equals: `right` is the share of right responses that
    makes a visit a good one."""

    def __init__(self, right: float):
        self.right = right

    def init(self, num_rows: int) -> dict[str, np.ndarray]:
        return {"step": np.array(0), "good": np.zeros(num_rows, int)}

    def choose(self, state: dict, rng: np.random.Generator, n: int) -> tuple[dict, np.ndarray]:
        """Return the next state, and the n rows of the task that are sampled next."""
        good = state["good"]
        return state, np.lexsort((rng.random(len(good)), good))[:n]

    def observe(self, state: dict, groups: rl.Groups) -> dict:
        """Return the state after a step's graded groups, those that the filter dropped too."""
        step, good = state["step"] + 1, state["good"].copy()
        success, prompt = groups.measure("success"), groups.rollouts.prompt
        for p, row in enumerate(groups.rollouts.prompts.row):
            if not groups.failure[p] and success[prompt == p].mean() >= self.right:
                good[row] = step
        return {"step": step, "good": good}

    def describe(self, state: dict, rows: np.ndarray) -> dict[str, float]:
        """Return metrics of the choice of `rows`: optional, logged as curriculum/never_good."""
        return {"never_good": float(np.mean(state["good"] == 0))}


def half_right(groups: Candidates) -> np.ndarray:
    """Weight of each stored group: largest if half of its responses are right, halved with each update of its age."""
    return groups.success * (1 - groups.success) * 0.5**groups.age


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
            f"{row['step']} reward {row['reward']:.3f} replayed {row['groups/replayed']:.0f} "
            f"rows never right {row['curriculum/never_good']:.3f}"
        )
    return steps


if __name__ == "__main__":
    main()

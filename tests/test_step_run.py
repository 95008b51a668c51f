"""A whole run with a grader of steps: what it learned from, recomputed from the sampled tokens."""

import dataclasses
from statistics import fmean, stdev

import numpy as np
import pytest

from jaxrl_llm import train
from jaxrl_llm.config import loading
from jaxrl_llm.metrics.json_lines import read_jsonl
from jaxrl_llm.roles import build

CONFIG = """
steps: 3
model: {vocab_size: 16, layers: 1, d_model: 32, heads: 8, kv_heads: 8, head_dim: 8, d_mlp: 64}
rollout: {prompts: 8, samples: 4, max_new_tokens: 8}
task: {kind: arithmetic, terms: 2, held_out: 16}
reward:
  workers: 1
  graders:
    - {grader: "row_graders:even_steps", weight: 2, step_end: "1"}
    - {grader: "row_graders:odd", weight: 0.5}
objective: {advantage: {kind: grpo_steps}}
update: {optimizer: {lr: 1.0e-3}}
mesh: {fsdp: 4, tensor: 2}
metrics: {rollout_groups: -1, tensorboard: false, samples_every: 0}
"""
TEXTS = ["<pad>", *"0123456789+<> #"]


def steps_by_hand(tokens: list[int]) -> list[tuple[int, float]]:
    """Last token and reward of each step, from the tokens: of even_steps twice, and of odd half at the last one."""
    found, step = [], ""
    for t, token in enumerate(tokens):
        step += TEXTS[token]
        if TEXTS[token] == "1" or t == len(tokens) - 1:
            found.append((t, 2.0 * (len(step) % 2 == 0)))
            step = ""
    odd = sum(ord(c) for token in tokens for c in TEXTS[token]) % 2
    return [*found[:-1], (found[-1][0], found[-1][1] + 0.5 * odd)]


def advantages_by_hand(rows: list[list[int]], slots: int) -> np.ndarray:
    """One group's, [G C]: the normalized rewards of a row's steps that end at a token or behind it."""
    steps = [steps_by_hand(tokens) for tokens in rows]
    values = [reward for row in steps for _, reward in row]
    mean, std = fmean(values), stdev(values)
    found = np.zeros((len(rows), slots))
    for b, row in enumerate(steps):
        for end, reward in row:
            found[b, : end + 1] += (reward - mean) / (std + 1e-4)
    return found


EXPERIENCES = {
    "replay": "{filter: none, replay: {capacity: 12}}",
    "refill": "{filter: none, refill: {filter: {kind: signal, by: odd}, attempts: 3}}",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIENCES)
def test_a_run_credits_each_step_with_its_own_reward(name, tmp_path, monkeypatch):
    """A third of the groups cannot be graded: older ones or those of other prompts take their places."""
    seen, make_advantage = [], build.make_advantage

    def recording(*args):
        advantage = make_advantage(*args)

        def recorded(groups, scores):
            seen.append((groups, credit := advantage(groups, scores)))
            return credit

        return recorded

    monkeypatch.setattr(build, "make_advantage", recording)
    (tmp_path / "steps.yaml").write_text(f"{CONFIG}experience: {EXPERIENCES[name]}\n")
    cfg = loading.load(tmp_path / "steps.yaml")
    train.train(dataclasses.replace(cfg, run_dir=str(tmp_path / "run")))

    differs = replayed = 0
    for groups, credit in seen:
        rollouts = groups.rollouts
        for p in range(len(groups.failure)):
            rows = np.flatnonzero(rollouts.prompt == p)
            if groups.failure[p] or not groups.keep[rows].any():
                assert not credit.advantage[rows].any()
                assert np.isnan(groups.step_reward[rows]).all() or not groups.failure[p]
                continue
            tokens = [rollouts.tokens[b, : rollouts.length[b]].tolist() for b in rows]
            want = advantages_by_hand(tokens, rollouts.tokens.shape[1])
            np.testing.assert_allclose(credit.advantage[rows], want, rtol=1e-5, atol=1e-6)
            differs += sum(len(set(x[:n])) > 1 for x, n in zip(want.round(6).tolist(), map(len, tokens), strict=True))
            replayed += rollouts.version[rows].max() < rollouts.version.max()
    assert len(seen) == 3 and differs > 10 and (replayed > 0) == (name == "replay")

    metrics, records = (read_jsonl(tmp_path / "run" / f"{name}.jsonl") for name in ("metrics", "rollouts"))
    of_steps = [row for row in metrics if row["phase"] == "rl" and "rewards/steps" in row]
    assert len(of_steps) == 3 and all(row["rewards/steps"] > 1 for row in of_steps)
    for row in records:
        if row["reward"] is None:
            assert set(row["step_reward"]) == {None}
            continue
        want = [None] * len(row["ids"])
        for end, reward in steps_by_hand(row["ids"]):
            want[end] = reward
        assert row["step_reward"] == want
    assert len(records) == 3 * 8 * 4 and any(row["reward"] is None for row in records) == (name == "replay")

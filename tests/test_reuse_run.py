"""Training with reused responses: the run is, token for token, one that decodes them all with the same noise; what it records; and
the same run after it was stopped."""

import dataclasses
import json

import numpy as np
import pytest
from two_meshes import on_two_meshes

from jaxrl_llm import train
from jaxrl_llm.commands.loaded_policy import with_batch
from jaxrl_llm.config.loading import validate
from jaxrl_llm.roles.reusing import StepReuse
from jaxrl_llm.roles.stored_rollouts import read_trajectories
from jaxrl_llm.rollout.config import NoReuse
from jaxrl_llm.tasks.task import load_task

# 18 rows, 8 in a step: in the third step some were visited before.
RUN = {
    "steps": 5,
    "seed": 1,
    "task": {"kind": "arithmetic", "terms": 2, "held_out": 82},
    "model": {"vocab_size": 16, "layers": 1, "d_model": 32, "heads": 8, "kv_heads": 8, "head_dim": 8, "d_mlp": 64},
    "warm_start": {"steps": 0},
    "rollout": {"prompts": 8, "samples": 4, "max_new_tokens": 6, "reuse": {"kind": "exact"}},
    "reward": {"grader": "row_graders:odd", "workers": 1},
    "experience": {"filter": "none"},
    "evaluation": {"every": 5},
    "checkpoint": {"every": 3},
    "metrics": {"tensorboard": False, "rollouts_every": 1, "rollout_groups": -1},
}


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def trained(run_dir, steps: int = 5, **changes) -> tuple[list[dict], list[dict]]:
    """Metrics and responses of a run with these settings of the rollouts."""
    cfg = validate(RUN | {"rollout": RUN["rollout"] | changes, "run_dir": str(run_dir)}, "test")
    train.train(dataclasses.replace(cfg, steps=steps))
    return [row for row in rows(run_dir / "metrics.jsonl") if "loss" in row], rows(run_dir / "rollouts.jsonl")


def numbers(metrics) -> list[tuple]:
    return [(row["completions/crc32"], row["reward"]) for row in metrics]


CONTROLLED = {
    "top_p": 0.9,
    "control": {"kind": "budget", "tokens": 2, "close": ">", "closing": "+>", "then": {"kind": "regex", "pattern": "[0-9]{1,2}#"}},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("changes", [pytest.param({}, marks=pytest.mark.soak), CONTROLLED], ids=["free", "controlled"])
def test_a_run_is_the_one_that_decodes_all_with_the_same_noise(tmp_path, monkeypatch, changes):
    metrics, responses = trained(tmp_path / "run", **changes)
    first, second, third, *later = [row["reuse/prompts"] for row in metrics]
    assert first == second == 0 < third < 1 and min(later) > 0.5
    for row in metrics:
        assert abs(row["ratio/max"] - 1) < 1e-3, "one update per step: it is on-policy"
        mine = [r for r in responses if r["step"] == row["step"]]
        assert {r["version"] for r in mine} == {row["step"] - 1}, "kept tokens are the new policy's"
        assert row["completions/min_length"] > 0
        if row["step"] > 2:
            assert 0.3 < row["reuse/tokens"] < 1 and 0 < row["reuse/whole"] < row["reuse/tokens"]
    # Behind the third step is the first save.
    assert [row["compiles"] for row in metrics if row["step"] in (2, 3, 5)] == [0, 0, 0]
    monkeypatch.setattr(StepReuse, "add", lambda self, asked: asked)
    plain, same = trained(tmp_path / "plain", **changes)
    assert [row["reuse/tokens"] for row in plain] == [0] * 5
    assert numbers(metrics) == numbers(plain)
    np.testing.assert_allclose([row["loss"] for row in metrics], [row["loss"] for row in plain], atol=1e-5)
    assert [r["ids"] for r in responses] == [r["ids"] for r in same]
    # Stopped after three steps, it continues with what it knew.
    monkeypatch.undo()
    trained(tmp_path / "again", steps=3, **changes)
    again, _ = trained(tmp_path / "again", **changes)
    assert numbers(again) == numbers(metrics)
    assert [row["reuse/tokens"] for row in again] == [row["reuse/tokens"] for row in metrics]
    # Visits of a row have one uid, and are told apart by their steps.
    cfg = validate(RUN, "test")
    groups = read_trajectories(tmp_path / "run/rollouts.jsonl", load_task(cfg.task, cfg.tokenizer))
    assert groups.rollouts.size.tolist() == [4] * 8 * 5


@pytest.mark.slow
def test_the_inexact_form_keeps_more_and_says_what_of_whom(tmp_path):
    """Its ratios are at least exp(-leniency), and kept tokens have the version of the policy that drew them. Under a truncation
    that records what it keeps, and hardly leaves out a token."""
    metrics, responses = trained(tmp_path / "run", reuse={"kind": "inexact", "leniency": 0.5}, top_p=0.999)
    for row in metrics[2:]:
        assert row["reuse/tokens"] > 0.8 * row["reuse/prompts"] and row["ratio/max"] > 1.01
        assert np.exp(-0.5) - 1e-4 < row["ratio/min"] < 0.9
        mine = [r["version"] for r in responses if r["step"] == row["step"]]
        of_tokens = [v for each in mine for v in (each if isinstance(each, list) else [each])]
        assert min(of_tokens) < row["step"] - 1 == max(of_tokens)
    assert len({r["uid"] for r in responses}) == 8 * 5


def test_commands_sample_afresh():
    assert with_batch(validate(RUN, "test"), 8, 1).rollout.reuse == NoReuse()


@pytest.mark.soak
def test_two_processes_reuse_the_same_tokens(tmp_path):
    """2 processes x 4 devices, (2, 2, 2), against one device."""
    one, two = on_two_meshes(RUN, tmp_path)
    assert numbers(one) == numbers(two)
    for name in ("reuse/prompts", "reuse/tokens", "reuse/whole"):
        assert [row[name] for row in one] == [row[name] for row in two], name
    np.testing.assert_allclose([row["loss"] for row in one], [row["loss"] for row in two], atol=1e-5)

"""Training with trees: on-policy ratio 1, what a run records, and the same run after it was stopped."""

import dataclasses
import json

import numpy as np
import pytest
from two_meshes import on_two_meshes

from jaxrl_llm import train
from jaxrl_llm.commands.loaded_policy import with_batch
from jaxrl_llm.config.loading import validate
from jaxrl_llm.roles.stored_rollouts import read_trajectories
from jaxrl_llm.rollout.config import NoTree
from jaxrl_llm.tasks.task import load_task

RUN = {
    "steps": 3,
    "seed": 1,
    "task": {"kind": "arithmetic", "terms": 3, "held_out": 16},
    "model": {"vocab_size": 16, "layers": 1, "d_model": 32, "heads": 8, "kv_heads": 8, "head_dim": 8, "d_mlp": 64},
    "warm_start": {"steps": 0},
    "rollout": {
        "prompts": 8, "samples": 6, "max_new_tokens": 6,
        "tree": {"kind": "points", "roots": 2, "branches": 2, "rounds": 2},
    },
    "reward": {"grader": "row_graders:odd", "workers": 1},
    "objective": {"advantage": {"kind": "tree_rl"}},
    "experience": {"filter": "none"},
    "update": {"packing": {"kind": "shared_prefix"}},
    "evaluation": {"every": 3},
    "checkpoint": {"every": 2},
    "metrics": {"tensorboard": False, "rollouts_every": 1, "rollout_groups": -1},
}  # fmt: skip


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_run_with_trees(tmp_path):
    cfg = validate(RUN | {"run_dir": str(tmp_path / "run")}, "test")
    train.train(cfg)
    metrics = [row for row in rows(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in metrics] == [1, 2, 3]
    responses = rows(tmp_path / "run" / "rollouts.jsonl")
    for row in metrics:
        assert abs(row["ratio/max"] - 1) < 1e-3, "one update per step: it is on-policy"
        mine = [r for r in responses if r["step"] == row["step"]]
        roots = [r for r in mine if "trunk" not in r]
        assert len(mine) == 48 and len(roots) == row["tree/roots"] * 8 == 16
        assert row["reward"] == pytest.approx(np.mean([r["reward"] for r in roots]))
        sampled = sum(sum(r.get("sampled", [True] * len(r["ids"]))) for r in mine)
        assert (
            row["tree/sharing"] == pytest.approx(sum(len(r["ids"]) for r in mine) / sampled) and row["tree/sharing"] > 1
        )
        by = {(r["uid"], r["sample"]): r for r in mine}
        for r in mine:
            trunk = by[r["uid"], r.get("trunk", r["sample"])]
            assert r["ids"][: r.get("fork", 0)] == trunk["ids"][: r.get("fork", 0)]
    # Its first save compiles in the third step.
    assert metrics[1]["compiles"] == 0
    assert metrics[-1]["num_tokens"] == sum(sum(r.get("sampled", [True] * len(r["ids"]))) for r in responses)
    assert "tree/roots" not in rows(tmp_path / "run" / "metrics.jsonl")[0]
    # Stopped after two steps and resumed, the third step is the same.
    again = dataclasses.replace(cfg, run_dir=str(tmp_path / "again"), steps=2)
    train.train(again)
    train.train(dataclasses.replace(again, steps=3))
    last = rows(tmp_path / "again" / "metrics.jsonl")[-1]
    assert {name: last[name] for name in ("loss", "reward", "completions/crc32")} == {
        name: metrics[-1][name] for name in ("loss", "reward", "completions/crc32")
    }
    check_read_back(tmp_path / "run" / "rollouts.jsonl", cfg, responses)
    # `jaxrl sample` and `jaxrl eval` draw independent responses, also a single one.
    assert with_batch(cfg, 8, 1).rollout.tree == NoTree()


@pytest.mark.soak
def test_two_processes_grow_the_same_trees(tmp_path):
    """2 processes x 4 devices, (2, 2, 2), against one device."""
    one, two = on_two_meshes(RUN | {"steps": 2}, tmp_path)
    for name in ("completions/crc32", "reward", "tree/sharing", "tree/fork"):
        assert [row[name] for row in one] == [row[name] for row in two], name
    np.testing.assert_allclose([row["loss"] for row in one], [row["loss"] for row in two], atol=1e-5)


def check_read_back(path, cfg, responses) -> None:
    """The file has the trees."""
    groups = read_trajectories(path, load_task(cfg.task, cfg.tokenizer))
    rollouts = groups.rollouts
    names = list(zip(rollouts.prompts.uid[rollouts.prompt].tolist(), rollouts.sample.tolist(), strict=True))
    want = {(r["uid"], r["sample"]): (r.get("trunk", r["sample"]), r.get("fork", 0)) for r in responses}
    got = zip(rollouts.trunk.tolist(), rollouts.fork.tolist(), strict=True)
    assert {name: each for name, each in zip(names, got, strict=True)} == want

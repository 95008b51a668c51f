"""Runs whose steps have no learning signal: their messages and records. With a signal, each objective learns."""

import pytest
import yaml

from jaxrl_llm import cli
from jaxrl_llm.metrics.json_lines import read_jsonl

CONFIG = {
    "steps": 4,
    "model": {"vocab_size": 16, "layers": 1, "d_model": 32, "heads": 8, "kv_heads": 8, "head_dim": 8, "d_mlp": 64},
    "rollout": {"prompts": 8, "samples": 2, "max_new_tokens": 4},
    "task": {"kind": "arithmetic", "terms": 2, "held_out": 8},
    "evaluation": {"every": 100},
    "mesh": {"data": 8},
    "metrics": {"tensorboard": False, "samples_every": 0, "rollouts_every": 0},
}
GRADERS = """
def raises(sample): raise ValueError(f"cannot read {len(sample.completion) >= 0}")
def same(sample): return 1.0
def odd(sample): return float(sum(map(ord, sample.completion)) % 2)
"""
# Prefixes of metrics over the tokens in the loss, and names of metrics over rewards.
TOKEN_METRICS = ("loss", "entropy", "ratio/", "clip_ratio/", "grad_norm", "nonfinite", "mismatch/", "kl", "update/")
REWARD_METRICS = ("reward", "reward_std", "frac_reward_zero_std", "rewards/it/mean", "eval/pass@1", "eval/maj@2")


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "some_graders.py").write_text(GRADERS)
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(grader: str, expect: int, **changes) -> list[dict]:
        reward = {"workers": 1, "graders": [{"grader": f"some_graders:{grader}", "name": "it"}]}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"reward": reward} | changes))
        assert cli.main(["train", str(tmp_path / "config.yaml"), "--run-dir", str(tmp_path / "run")]) == expect
        return read_jsonl(tmp_path / "run" / "metrics.jsonl")

    return run


def named(row: dict, prefixes: tuple[str, ...]) -> list[str]:
    return [name for name in row if name.startswith(prefixes)]


@pytest.mark.slow
def test_a_grader_that_always_raises_ends_the_run_with_its_message(run, capsys):
    rows = run("raises", expect=4)
    out, err = capsys.readouterr()
    assert "no group of 3 consecutive steps could be graded (update.guards.max_ungraded)" in err
    assert "the first failure: grader it: ValueError: cannot read True" in err
    assert [row["step"] for row in rows] == [0, 1, 2, 3], "the step that ends the run is recorded too"
    assert all(row["groups/graded"] == row["groups/kept"] == row["updates"] == 0 for row in rows[1:])
    assert all(row["rewards/it/raised"] == 8 for row in rows[1:])
    assert [named(row, TOKEN_METRICS) for row in rows] == [[]] * 4, "no metrics over no tokens"
    assert not any(row.keys() & set(REWARD_METRICS) for row in rows)
    # Computed from the known answers, without a grader.
    assert "eval/exact" in rows[0]
    assert "kept 0" in out and "nan" not in out
    warnings = [" ".join(row.get("warnings", [])) for row in rows]
    assert warnings[0].startswith(
        "no held-out prompt could be graded; the first failure: grader it: ValueError: cannot read True"
    )
    assert "update.guards.max_ungraded" in warnings[3] and warnings[1:3] == ["", ""], "the error is recorded"


@pytest.mark.slow
def test_rewards_that_never_differ_are_warned_of_on_the_console_and_in_the_record(run, capsys, tmp_path):
    rows = run("same", expect=0)
    warning = "3 of 3 RL steps so far learned nothing; this one: the rewards of each group were equal"
    assert [[w[: len(warning)] for w in row.get("warnings", [])] for row in rows] == [[], [], [], [warning], []]
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    assert f"<dt>step 3</dt><dd>{warning}" in (tmp_path / "run" / "report.html").read_text()
    out = capsys.readouterr().out
    assert warning in out and "kept 0" in out
    assert all(row["frac_reward_zero_std"] == row["reward"] == 1 and row["reward_std"] == 0 for row in rows[1:])
    assert [named(row, TOKEN_METRICS) for row in rows] == [[]] * 5


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["paper:reinforce", pytest.param("paper:ppo", marks=pytest.mark.soak)])
def test_one_sample_per_prompt_is_enough_without_a_group_baseline(run, preset):
    """PPO's usual setting: in a group of one, no reward differs from another."""
    rows = run("odd", expect=0, steps=2, rollout=CONFIG["rollout"] | {"samples": 1}, objective=preset)
    assert all(row["groups/kept"] == 8 and row["updates"] == 1 and row["grad_norm"] > 0 for row in rows[1:])
    # A group of one has no standard deviation, and no rewards to compare.
    assert not any({"reward_std", "frac_reward_zero_std"} & row.keys() for row in rows)


@pytest.mark.slow
def test_the_score_before_rl_is_in_the_last_row_before_it(run, tmp_path, monkeypatch, capsys):
    """Also in a run of supervised steps only, which RL then resumes: one row per step. Slow phases are announced on the console."""
    monkeypatch.setattr("jaxrl_llm.metrics.console.TICK", 0.002)
    monkeypatch.setattr("jaxrl_llm.metrics.console.PRINTED_AFTER", 0.0)
    warm_start = {"steps": 2, "rows": 8}
    assert [row["step"] for row in run("odd", expect=0, steps=0, warm_start=warm_start)] == [1, 2]
    rows = run("odd", expect=0, steps=1, warm_start=warm_start)
    assert [(row["step"], row["phase"], "eval/exact" in row) for row in rows] == [
        (1, "warm_start", False),
        (2, "warm_start", True),
        (3, "rl", True),
    ]
    assert {n for n in rows[1] if n.startswith("eval/")} == {n for n in rows[2] if n.startswith("eval/")}
    assert rows[1]["eval/exact"] != rows[2]["eval/exact"]
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    outputs, places = capsys.readouterr().out.split("resuming from step 2"), []
    for words in (
        "making the model",
        "compiling the update of the warm start",
        "compiling what samples",
        "evaluating 8 held-out prompts",
    ):
        assert f"{words} ...\n" in outputs[0], outputs[0]
        places.append(outputs[0].index(words))
    assert places == sorted(places)
    assert "compiling the update ...\n" in outputs[1] and "evaluating 8 held-out prompts ...\n" in outputs[1]
    page = (tmp_path / "run" / "report.html").read_text()
    training = page[page.index("Training") : page.index("Warm start")]
    assert f"step 2\neval/exact {rows[1]['eval/exact']:.4g}" in training, "its curve begins there"

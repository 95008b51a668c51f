"""Custom stages from a file outside the package: a filter, a curriculum, an advantage, a loss with its own column, a grader and a
schedule. A run with all of them that is killed and resumed equals an undisturbed one."""

import json
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from test_train import ROOT, assert_same_run, command, environment, rows, run  # noqa: F401

CONFIG = """
steps: 6
model: {vocab_size: 16, layers: 1, d_model: 32, heads: 8, kv_heads: 8, head_dim: 8, d_mlp: 64}
rollout: {prompts: 8, samples: 4, max_new_tokens: 4}
task: {kind: arithmetic, terms: 2, held_out: 60}
reward: {grader: "newcomer:longest_digit", workers: 1}
experience:
  filter: "newcomer:no_echo"
  curriculum: {function: "newcomer:Hardest", options: {memory: 0.25}}
objective:
  advantage: {function: "newcomer:above_half", options: {half: 0.4}}
  loss: {function: "newcomer:early", own_columns: ["newcomer:PLACE"]}
update:
  minibatches: 2
  optimizer: {schedule: {function: "newcomer:wait_then_learn", options: {wait: 2}}}
evaluation: {every: 6}
checkpoint: {every: 1}
metrics: {rollouts_every: 1, rollout_groups: -1, samples_every: 0, tensorboard: false}
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, environment):  # noqa: F811
    place = tmp_path_factory.mktemp("newcomer")
    (place / "c.yaml").write_text(CONFIG)
    run(place / "c.yaml", place / "run", environment)
    return place / "run", place / "c.yaml"


def responses(run_dir) -> list[list[dict]]:
    """Return the responses of each step."""
    found = [json.loads(line) for line in (run_dir / "rollouts.jsonl").read_text().splitlines()]
    return [[row for row in found if row["step"] == step] for step in range(1, 7)]


@pytest.mark.slow
def test_each_custom_stage_takes_effect(undisturbed):
    steps, metrics = responses(undisturbed[0]), [row for row in rows(undisturbed[0]) if row["step"]]
    visits = Counter(row["prompt"] for step in steps for row in step if row["sample"] == 0)
    # 40 rows, 8 per step: the curriculum takes each once before any comes twice.
    assert len(visits) == 40 and sorted(visits.values()) == [1] * 32 + [2] * 8
    for row_metrics, step in zip(metrics, steps, strict=True):
        reward = np.array([0.1 * max([int(c) for c in row["completion"] if c.isdigit()], default=0) for row in step])
        np.testing.assert_allclose([row["reward"] for row in step], reward, atol=1e-6)
        keep = np.array([len(row["ids"]) >= 2 and not row["completion"].startswith("1") for row in step])
        assert row_metrics["groups/kept"] == keep.reshape(8, 4).any(axis=1).sum()
        np.testing.assert_allclose([row["advantage"] for row in step], np.where(keep, reward - 0.4, 0), atol=1e-6)
    # Two updates at a rate of 0 leave the policy as it was, the third does not.
    assert abs(metrics[0]["ratio/max"] - 1) < 1e-5 < 0.01 < metrics[1]["ratio/max"] - 1


@pytest.mark.slow
def test_the_script_of_the_page_runs(undisturbed, environment, tmp_path):  # noqa: F811
    """The page's script, with the small config of this test."""
    page = (ROOT / "docs" / "extending.md").read_text()
    script = page.rpartition("```python\n")[2].partition("```")[0]
    assert 'Path("configs/arithmetic.yaml")' in script
    small = script.replace('Path("configs/arithmetic.yaml")', f'Path("{undisturbed[1]}"), ["--run_dir={tmp_path}/run"]')
    done = subprocess.run(
        [sys.executable, "-c", small], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]
    numbers = [line.split() for line in done.stdout.splitlines() if len(line.split()) == 2 and line[0] in "-0123456789"]
    assert len(numbers) == 3 and np.isfinite(np.array(numbers, float)).all()


@pytest.mark.slow
def test_the_loss_reads_its_own_column(undisturbed):
    """The first step's two updates change nothing, so their losses are by hand from the sampler's log-probs."""
    step, logged = responses(undisturbed[0])[0], next(row for row in rows(undisturbed[0]) if row["step"] == 1)

    def terms(row) -> list[float]:
        keep = len(row["ids"]) >= 2 and not row["completion"].startswith("1")
        return [(0.4 - row["reward"]) * p / (1 + i) for i, p in enumerate(row["logprobs"])] if keep else []

    parts = np.split(np.random.default_rng((0, 0)).permutation(8), 2)
    of_parts = [[x for group in part for row in step[4 * group : 4 * group + 4] for x in terms(row)] for part in parts]
    assert min(map(len, of_parts)) > 10
    np.testing.assert_allclose(logged["loss"], np.mean([np.mean(x) for x in of_parts]), rtol=1e-4)


@pytest.mark.soak
def test_a_killed_run_with_custom_stages_resumes_to_the_same_result(undisturbed, environment, tmp_path):  # noqa: F811
    """Killed by the curriculum when it has seen 24 prompts, after step 3: its state resumes from a checkpoint."""
    whole, config = undisturbed
    done = subprocess.run(
        command(config, tmp_path / "run"),
        env=environment | {"KILL_AT": "24"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    run(config, tmp_path / "run", environment)
    assert_same_run(whole, tmp_path / "run")

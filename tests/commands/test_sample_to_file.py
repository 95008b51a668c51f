"""`jaxrl sample --out`: graded responses to many prompts as a file, on which `jaxrl sft` and `jaxrl train` continue."""

import resource
from collections import Counter

import numpy as np
import pytest
from commands.test_sample_command import OWN, QUESTION, model, refused  # noqa: F401

from jaxrl_llm import cli
from jaxrl_llm.config import loading
from jaxrl_llm.roles import inputs
from jaxrl_llm.roles.stored_rollouts import read_trajectories
from jaxrl_llm.tasks.records import read
from jaxrl_llm.types import check

# The grader raises where the first digit is below 3, and gives 1 for an odd number; sampling is truncated.
CONFIG = """
run_dir: {run_dir}
steps: 2
model: {{vocab_size: 16, layers: 1, d_model: 32, heads: 8, kv_heads: 8, head_dim: 8, d_mlp: 64}}
mesh: {{data: 1, fsdp: 4, tensor: 2}}
warm_start: {{steps: 40, rows: 16}}
rollout: {{prompts: 8, samples: 4, max_new_tokens: 4, top_k: 9}}
task: {{kind: arithmetic, terms: 2, held_out: 16}}
reward: {{graders: ["row_graders:odd_if_readable"], workers: 1}}
update: {{optimizer: {{lr: 1.0e-2}}}}
evaluation: {{every: 5}}
metrics: {{tensorboard: false, samples_every: 0, rollout_groups: -1}}
"""


def jaxrl(capsys, *args) -> str:
    """Output of a command."""
    assert cli.main([str(arg) for arg in args]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with the config `c.yaml` and its `run`."""
    place = tmp_path_factory.mktemp("files")
    (place / "c.yaml").write_text(CONFIG.format(run_dir=place / "run"))
    assert cli.main(["train", str(place / "c.yaml")]) == 0
    return place


@pytest.mark.slow
def test_responses_of_a_run_are_a_task_of_another(place, capsys, tmp_path):
    """All 84 training prompts, 4 responses each; those that begin with a digit below 3 cannot be graded. The right ones are learned
    by `sft`, and `train` continues with their prompts."""
    out = tmp_path / "deep" / "rollouts.jsonl"
    said = jaxrl(capsys, "sample", place / "run", "--out", out, "-n", 4)
    rows = [record.columns for record in read(out, "")]
    right = sum(row["success"] is True for row in rows)
    assert said == f"336 responses to 84 prompts from step 42 of {place}/run, {right / 336:.1%} of them right: {out}\n"
    assert 50 < right < 330
    task = inputs.read_task(loading.load(place / "c.yaml"))
    assert [rows[4 * i + g]["prompt"] for i in range(84) for g in range(4)] == [
        row.prompt for row in task.train for _ in range(4)
    ]
    for row in rows:
        lost = int(row["prompt"][1]) < 3
        assert (row["success"] is None) == lost and row.get("failure") == ("raised" if lost else None)
        assert row["version"] == 42 and row["answer"] == f"{int(row['prompt'][1]) + int(row['prompt'][3])}#"
        assert all(1 <= len(kept) <= 9 and id in kept for id, kept in zip(row["ids"], row["kept_tokens"], strict=True))
    groups = check(read_trajectories(out, task))
    assert groups.rollouts.size.tolist() == [4] * 84 and groups.rollouts.prompts.row.tolist() == list(range(84))
    assert groups.graders == ("odd_if_readable",) and np.nansum(groups.measure("success")) == right

    stored = f"{{kind: rollouts, path: {out}, held_out: 9}}"
    config = [place / "c.yaml", "--run_dir", tmp_path / "learned", "--task", stored]
    assert "after supervised training" in jaxrl(capsys, "sft", *config)
    task = inputs.read_task(loading.load(config[0], [str(arg) for arg in config[1:]]))
    learned = {(row["prompt"], tuple(row["ids"])) for row in rows if row["success"]}
    held_out = {row.prompt for row in task.held_out}
    assert Counter((row.prompt, tuple(row.target.tolist())) for row in task.train) == Counter(
        pair for pair in learned if pair[0] not in held_out
    )
    assert "before RL" in jaxrl(capsys, "train", *config)
    # Its own record can be read as well.
    found = check(read_trajectories(tmp_path / "learned" / "rollouts.jsonl", task))
    assert found.rollouts.size.tolist() == [4] * 16 and set(
        found.rollouts.version[found.rollouts.sampled].tolist()
    ) == {40, 41}


@pytest.mark.slow
def test_both_formats_of_one_policy_hold_the_same(place, capsys, tmp_path):
    """The same prompts, seed and weights: the same tokens. The first prompts alone, of the held-out rows."""
    for suffix in ("jsonl", "parquet"):
        out = tmp_path / f"x.{suffix}"
        said = jaxrl(capsys, "sample", place / "run", "--out", out, "-n", 4, "--prompts", 5, "--split", "held_out")
        assert said.startswith(f"20 responses to 5 prompts from step 42 of {place}/run, ")
    task = inputs.read_task(loading.load(place / "c.yaml"))
    one, other = (read_trajectories(tmp_path / f"x.{suffix}", task) for suffix in ("jsonl", "parquet"))
    for x, y in zip(
        *(map(np.asarray, (g.rollouts.tokens, g.rollouts.behavior_logprobs, g.reward)) for g in (one, other)),
        strict=True,
    ):
        assert x.tobytes() == y.tobytes()
    asked = [row.prompt for row in task.held_out[:5]]
    assert [task.tokenizer.decode(tokens.tolist()) for tokens in one.rollouts.prompts.tokens] == asked
    assert (one.rollouts.prompts.row == -1).all()


@pytest.mark.slow
def test_a_model_by_itself_and_a_prompt_without_an_answer(model, capsys, tmp_path):  # noqa: F811
    flags = ["--rollout.max-new-tokens", "5", "--model.compute", "float32"]
    said = jaxrl(capsys, "sample", model, "--prompt", QUESTION, "-n", 2, "--out", tmp_path / "x.jsonl", *flags)
    assert said == f"2 responses to 1 prompts from {model}: {tmp_path}/x.jsonl\n"
    first, second = (record.columns for record in read(tmp_path / "x.jsonl", ""))
    assert first["prompt"].endswith(f"{QUESTION}\nassistant\n") and first["reward"] is None and first["success"] is None
    assert first["prompt_ids"] == second["prompt_ids"] and first["version"] == 0


@pytest.mark.slow
def test_a_full_disk_is_one_message(place, capsys, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    args = ["sample", place / "run", "-n", 4, "--prompts", 5, "--split", "held_out", "--out"]
    jaxrl(capsys, *args, tmp_path / "y.jsonl")  # compiles, for the cache of compiled programs does not fit either
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        code = cli.main([str(arg) for arg in (*args, tmp_path / "x.jsonl")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    # Before it a slow machine says that it samples.
    lines = capsys.readouterr().err.splitlines()
    message = f"jaxrl: {tmp_path}/x.jsonl: File too large; nothing was written"
    assert (code, lines[-1]) == (2, message) and all(line.startswith("sampling ") for line in lines[:-1])
    assert [path.name for path in tmp_path.iterdir()] == ["y.jsonl"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--out", "{}/there.jsonl"], "--out: got {}/there.jsonl, which exists, want a new file"),
        (["--out", "{}/x.csv"], "--out: got {}/x.csv, want a file that ends in .jsonl or .parquet"),
        (["--prompts", "3"], "--prompts: got it without --out, want --out FILE: only a file has the responses to many prompts"),
        (["--out", "{}/x.jsonl", "--prompts", "3", "--prompt", "<3+4+5>"], "--prompts: got it with --prompt, want one of the two"),
        (["--out", "{}/x.jsonl", "--benchmark"], "--benchmark: got it with --out, want one of the two: a benchmark writes no "),
        (["--out", "{}/x.jsonl", "--prompts", "873"], "--prompts: got 873, want 872 at most, the rows of the split train"),
        (["--out", "{}/x.jsonl", "--split", "test"], "--split: got test, want one of train, held_out"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit(tmp_path, capsys, options, message):
    (tmp_path / "own.yaml").write_text(OWN + f"run_dir: {tmp_path}/none\n")
    (tmp_path / "there.jsonl").write_text("mine")
    said = refused(capsys, tmp_path / "own.yaml", *(option.format(tmp_path) for option in options))
    assert said.startswith(f"jaxrl: {message.format(tmp_path)}") and (tmp_path / "there.jsonl").read_text() == "mine"

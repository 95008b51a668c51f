"""Bad input ends with exit code 2, one message and no traceback."""

import contextlib
import fcntl
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxrl_llm import cli
from jaxrl_llm.cli import read_config
from jaxrl_llm.config.unused_settings import unused_settings

ROOT = Path(__file__).parents[1]


def jaxrl(*arguments: object, expect: int = 2) -> str:
    """Stderr of the command, run in this process: starting another takes a hundred times as long."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        assert cli.main([str(argument) for argument in arguments]) == expect, stderr.getvalue()
    return stderr.getvalue()


def jaxrl_process(*arguments: object, devices: int, expect: int = 2) -> str:
    """Stderr of the command, run in another process. `test_cli.py` starts some for exit code 2, `test_train.py` for 3 and 75."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    done = subprocess.run(
        [sys.executable, "-m", "jaxrl_llm.cli", *map(str, arguments)],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == expect, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def config(directory: Path, text: str) -> Path:
    path = directory / "run.yaml"
    path.write_text(f"run_dir: {directory / 'run'}\n{text}")
    return path


def test_an_impossible_mesh_is_refused_with_all_other_errors(tmp_path):
    path = config(
        tmp_path,
        "mesh: {data: 2, fsdp: 1, tensor: 3}\n"
        "model: {vocab_size: 10, kv_heads: 2}\nrollout: {prompts: 9}\nupdate: {minibatches: 2}\n",
    )
    message = jaxrl_process("train", path, devices=8)
    assert "asked for data 2, fsdp 1, tensor 3, expert 1 (a product of 6), found 8 devices" in message
    assert "mesh.tensor: got 3, want a divisor of model.kv_heads (2): 1, 2" in message
    assert "mesh.tensor: got 3, want a divisor of model.vocab_size (10): 1, 2, 5, 10" in message
    assert "rollout.prompts: got 9, want a multiple of mesh.data * mesh.fsdp * mesh.expert (2)" in message
    assert "update.minibatches: got 2, want a divisor of rollout.prompts (9): 1, 3, 9" in message
    assert "model.vocab_size: got 10, want at least the tokenizer's 16" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "train.jsonl: got no rows, want one or more"),
        ('{"prompt": "<1+2>", "answer": "3#"}\n{"prompt": oops}\n', "train.jsonl:2: not JSON"),
        ('{"prompt": "<1+2>"}\n', "train.jsonl:1: task.answer: got no column 'answer', want one of prompt"),
    ],
)
def test_bad_data_is_named_by_file_and_line(tmp_path, content, message):
    (tmp_path / "train.jsonl").write_text(content)
    path = config(
        tmp_path, f"task: {{kind: file, path: {tmp_path}/train.jsonl, held_out_path: {tmp_path}/train.jsonl}}\n"
    )
    assert message in jaxrl("train", path)


def rows(path: Path, answers: list[str]) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"<{i}+1>", "answer": a}) + "\n" for i, a in enumerate(answers)))
    return path


@pytest.mark.parametrize(
    ("grader", "good", "bad", "why"),
    [
        ("math", "1e-5", "The answer is five", "want mathematics: reads as prose ('The')"),
        ("numeric", "12 cm^2", "12:30", "want one number"),
        ("gsm8k", "so #### 5", "5 or 6", "want one number"),
        ("multiple_choice", "(B)", "Paris", "want one of the letters"),
        ("reasoning_gym", "5", "6", 'the row has no column "reasoning_gym"'),
    ],
)
def test_rows_that_a_grader_cannot_read_are_refused_with_file_and_line(tmp_path, grader, good, bad, why):
    """Before anything compiles, in training and held-out rows. Of seven rows five are listed, and their number."""
    known = [] if grader == "reasoning_gym" else [good] * 3
    train = rows(tmp_path / "train.jsonl", [*known, bad, *[bad] * 6])
    held_out = rows(tmp_path / "held_out.jsonl", known or [bad])
    files = f"task: {{kind: file, path: {train}, held_out_path: {held_out}}}\n"
    message = jaxrl("train", config(tmp_path, f"{files}reward: {grader}\nmodel: {{vocab_size: 16}}\n"))
    lines = [line for line in message.splitlines() if f'grader "{grader}"' in line]
    first = len(known) + 1
    assert len(lines) == 6 and f"train.jsonl:{first} ('<{first - 1}+1>'): grader" in lines[0] and why in lines[0]
    assert ("cannot grade 7 of 13 rows" if known else "cannot grade 8 of 8 rows") in lines[5]


def test_rows_that_a_grader_can_read_are_accepted(tmp_path):
    train = rows(tmp_path / "train.jsonl", [r"\frac{1}{2}", "1e-5", "12 cm^2", r"\text{Paris}"])
    files = f"task: {{kind: file, path: {train}, held_out_path: {rows(tmp_path / 'held_out.jsonl', ['7'])}}}\n"
    message = jaxrl("train", config(tmp_path, f"{files}reward: math\nmodel: {{vocab_size: 3}}\n"))
    assert "model.vocab_size: got 3" in message and 'grader "math"' not in message


def test_errors_in_data_model_graders_mesh_and_objective_come_at_once(tmp_path):
    """No file, no checkpoint and no such grader: none hides another, nor an error about training."""
    message = jaxrl(
        "train",
        config(tmp_path, "rollout: {prompts: 9, temperature: 0}\nreward: nothing\nupdate: {minibatches: 2}\n"),
        "--task", f"{{kind: file, path: {tmp_path}/none.jsonl, held_out: 1}}",
        "--model.path", tmp_path / "nowhere",
        "--tokenizer.alphabet", "ab#",
    )  # fmt: skip
    assert f"{tmp_path}/nowhere: got a path that does not exist" in message
    assert f"{tmp_path}/none.jsonl" in message
    assert 'reward.graders.0.grader: got "nothing", want one of' in message
    assert "update.minibatches: got 2, want a divisor of rollout.prompts (9): 1, 3, 9" in message
    assert "rollout.temperature: got 0, want more" in message


@pytest.mark.parametrize(
    ("flags", "names", "why"),
    [
        ("", "", ""),
        ("--objective=trl:grpo", "", ""),
        ("--objective.loss.kl.kind=k2", "objective.loss.kl.kind", "objective.loss.kl.weight is 0"),
        ("--objective.loss.kl.kind=k2 --objective.loss.kl.weight=0.1", "", ""),
        ("--lora.alpha=8 --lora.targets=[q]", "lora.alpha, lora.targets", "lora.rank is 0: every parameter is trained"),
        ("--lora.alpha=8 --lora.rank=2", "", ""),
        (
            "--update.optimizer.decay_steps=0",
            "update.optimizer.final_lr",
            "update.optimizer.decay_steps is 0: the learning rate does not fall",
        ),
        ("--objective.reference.decay=0.9", "objective.reference.decay", "reference.kind is not ema"),
        ("--objective.reference.kind=ema", "objective.reference.kind", "no term of the objective reads a reference"),
        ("--objective.critic.lr_scale=2", "objective.critic.lr_scale", "the advantage is not gae"),
        ("--objective=verl:ppo --objective.critic.lr_scale=2", "", ""),
        ("--model.window=4", "model.window", "no layer of model.sliding slides"),
        ("--rollout.max_kept_tokens=9", "rollout.max_kept_tokens", "rollout.top_p, top_k and min_p leave all tokens"),
        ("--rollout.max_kept_tokens=9 --rollout.top_k=3 --objective.loss.kind=dpo", "", ""),
    ],
)
def test_a_setting_that_nothing_reads_is_named(flags, names, why):
    found = unused_settings(read_config(str(ROOT / "configs/arithmetic.yaml"), flags.split()))
    these = "these" if "," in names else "this"
    assert found == ([f"{names}: nothing reads {these}, since {why}"] if names else [])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configs_of_the_repository_set_nothing_unused(path):
    assert unused_settings(read_config(str(path), [])) == []


def test_a_run_directory_that_cannot_be_written(tmp_path, caplog):
    """And a setting that nothing reads is reported once when a run starts."""
    (tmp_path / "file").write_text("")
    message = jaxrl("train", ROOT / "configs/arithmetic.yaml", "--run-dir", tmp_path / "file/run", "--lora.alpha", 8)
    assert f"run_dir: got {tmp_path}/file/run" in message
    assert caplog.text.count("lora.alpha: nothing reads this, since lora.rank is 0") == 1


def test_two_runs_in_one_directory(tmp_path):
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 123 on host x")
        lock.flush()
        message = jaxrl("train", ROOT / "configs/arithmetic.yaml", "--run-dir", tmp_path)
    assert f"{tmp_path} is in use by process 123 on host x" in message


def test_a_run_directory_with_another_config(tmp_path):
    (tmp_path / "config.yaml").write_text((ROOT / "configs/arithmetic.yaml").read_text())
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    message = jaxrl(
        "train",
        ROOT / "configs/arithmetic.yaml",
        "--run-dir",
        tmp_path,
        "--seed",
        3,
        "--objective.loss.surrogate.low",
        0.1,
    )
    assert "holds a run with another config" in message
    assert "seed: 0 -> 3" in message and "objective.loss.surrogate.low: 0.2 -> 0.1" in message


def test_resume_without_a_checkpoint(tmp_path):
    message = jaxrl("train", ROOT / "configs/arithmetic.yaml", "--run-dir", tmp_path / "none", "--resume", expect=3)
    assert "holds no checkpoint" in message and not (tmp_path / "none").exists()


def test_a_stop_text_that_no_response_can_hold(tmp_path):
    """The longest token of the arithmetic alphabet is <pad>: four of them are 20 characters."""
    flags = ["--run-dir", tmp_path / "run", "--rollout.max_new_tokens", 4, "--mesh.data", 3, "--rollout.stop"]
    message = jaxrl("train", ROOT / "configs/arithmetic.yaml", *flags, f"['{'1' * 20}', '{'2' * 21}']")
    assert f"rollout.stop: got '{'2' * 21}', want text that rollout.max_new_tokens (4) tokens can hold" in message
    assert f"'{'1' * 20}'" not in message


def test_sampling_a_prompt_that_cannot_be_encoded(tmp_path):
    tiny = "model: {vocab_size: 16, layers: 1, d_model: 8, heads: 2, kv_heads: 1, head_dim: 8, d_mlp: 8}\n"
    assert "'x' 'y'" in jaxrl("sample", config(tmp_path, tiny), "--prompt", "xy")


def test_eval_of_a_target_that_is_no_run(tmp_path):
    assert "want a run directory" in jaxrl("eval", ROOT / "configs/arithmetic.yaml")
    assert "got a directory without config.yaml, want a run directory" in jaxrl("eval", tmp_path)


def test_packed_rows_too_short_for_a_sequence_or_a_pair_are_refused(tmp_path):
    """Prompts of 7 slots at most, and 12 new tokens: 24 slots hold one sequence and no pair."""
    for preset, slots, words in (("trl:grpo", 10, "of one sequence"), ("paper:dpo", 24, "of a pair of the loss dpo")):
        packing = f"update: {{packing: {{kind: shared_prefix, slots: {slots}}}}}\n"
        message = jaxrl("train", config(tmp_path, f"rollout: {{max_new_tokens: 12}}\nobjective: {preset}\n{packing}"))
        assert f"update.packing.slots: got {slots}, want 0 or at least the" in message and words in message

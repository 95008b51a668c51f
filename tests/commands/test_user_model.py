"""A user's model, tokenizer, data set and grader: from a Hugging Face directory through training, export and evaluation."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
from setups import layouts, make_params
from tokenizer_setup import save_tokenizer

from jaxrl_llm import cli
from jaxrl_llm.commands.evaluate import evaluate_target
from jaxrl_llm.commands.export import export_run
from jaxrl_llm.commands.loaded_policy import restore_params
from jaxrl_llm.config import loading, run_config
from jaxrl_llm.metrics.json_lines import read_jsonl
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.hf.export import export
from jaxrl_llm.model.hf.load import load
from jaxrl_llm.roles import inputs
from jaxrl_llm.roles.blueprint import blueprint_of
from jaxrl_llm.train import train

TINY = ModelConfig(
    vocab_size=320, layers=1, d_model=32, heads=8, kv_heads=8, head_dim=8, d_mlp=64, qk_norm=True, rope_theta=1e6
)
ROWS = 100
CONFIG = """
run_dir: {run_dir}
steps: {steps}
model: {{path: {model}, compute: float32}}
tokenizer: {{system: Be brief., stop: ["<s>"]}}
task: {{kind: file, path: {data}, held_out_path: {held_out}, prompt: "{{question}}", answer: "{{answer}}"}}
mesh: {{fsdp: {fsdp}, tensor: 2}}
rollout: {{prompts: 20, samples: 4, max_new_tokens: 6, stop: ["<|im_start|>"]}}
reward: {{graders: [row_graders:counts_letters, {{grader: length, weight: 0.1, options: {{target: 3}}}}], deadline_s: 2}}
evaluation: {{every: {every}}}
update: {{optimizer: {{lr: 1.0e-3}}}}
metrics: {{tensorboard: false, samples_every: 0, rollouts_every: 1, rollout_groups: -1}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with `model/`, `train.jsonl` and `test.jsonl`."""
    place = tmp_path_factory.mktemp("user")
    cfg, (layout, _) = TINY, layouts()
    save = lambda directory: save_tokenizer(directory)  # noqa: E731
    export(make_params(cfg, layout, sharpness=1.0), cfg, place / "model", "float32", save_tokenizer=save)
    rows = [{"id": i, "question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(ROWS + 20)]
    (place / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:ROWS]))
    held_out = [row for row in rows[ROWS:] if row["id"] % 10 in (1, 2)]
    (place / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    return place


def write(place, tmp_path, **changes) -> run_config.RunConfig:
    values = {
        "run_dir": tmp_path / "run", "steps": 5, "model": place / "model", "data": place / "train.jsonl",
        "held_out": place / "test.jsonl", "fsdp": -1, "every": 100,
    }  # fmt: skip
    path = tmp_path / "user.yaml"
    path.write_text(CONFIG.format(**values | changes))
    return loading.load(path)


@pytest.fixture(scope="module")
def trained(place, tmp_path_factory):
    """One epoch over the hundred rows: the config, and the result."""
    cfg = write(place, tmp_path_factory.mktemp("trained"))
    return cfg, train(cfg)


@pytest.mark.slow
def test_failures_of_a_grader_are_counted_by_name_and_training_continues(trained):
    _cfg, result = trained
    before, *rows = read_jsonl(result.run_dir / "metrics.jsonl")
    assert before["step"] == 0 and [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    name = "rewards/counts_letters"
    total = {kind: sum(row[f"{name}/{kind}"] for row in rows) for kind in ("raised", "timed_out", "wrong_type", "died")}
    assert total == {"raised": 10, "timed_out": 2, "wrong_type": 1, "died": 0}
    assert sum(row["groups/kept"] for row in rows) <= 87
    assert all(0 < row[f"{name}/mean"] < 1 and row["rewards/length/raised"] == 0 for row in rows)
    assert all(row["updates"] == 1 and row["nonfinite"] == 0 for row in rows)


@pytest.mark.slow
def test_the_prompt_is_the_chat_and_the_completion_ends_at_any_end_token(trained):
    _, result = trained
    rollouts = read_jsonl(result.run_dir / "rollouts.jsonl")
    first = rollouts[0]["prompt"]
    assert first.startswith("system\nBe brief.\nuser\nWhat is ") and first.endswith("?\nassistant\n")
    ended = {row["ids"][-1] for row in rollouts if row["finish"] == "eos"}
    assert ended <= {2, 3} and all(not {2, 3} & set(row["ids"][:-1]) for row in rollouts)


@pytest.mark.slow
def test_a_stop_string_that_is_a_special_token_ends_every_row_that_samples_it(trained):
    """Token 1, which the text for graders does not show."""
    rows = [row for row in read_jsonl(trained[1].run_dir / "rollouts.jsonl") if 1 in row["ids"]]
    assert len(rows) > 2
    assert all(row["ids"].index(1) == len(row["ids"]) - 1 and row["finish"] == "stop" for row in rows)
    assert not any("<|im_start|>" in row["completion"] for row in rows)


@pytest.mark.slow
def test_the_export_is_the_run_bit_for_bit_and_can_be_trained_on(trained, place, tmp_path):
    cfg, _result = trained
    out = export_run(cfg, tmp_path / "out", "float32")
    blueprint = blueprint_of(cfg, inputs.read(cfg))
    masters = restore_params(blueprint).params
    again = load(out, blueprint.specs, blueprint.train, np.float32)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), masters, again)
    ours, theirs = (json.loads((d / "config.json").read_text()) for d in (out, place / "model"))
    assert ours["eos_token_id"] == [2, 3] and ours["hidden_size"] == theirs["hidden_size"]
    onward = write(out.parent, tmp_path, model=out, data=place / "train.jsonl", held_out=place / "test.jsonl")
    assert blueprint_of(onward, inputs.read(onward)).model == blueprint.model
    by_run, by_export = (evaluate_target(c, 2) for c in (cfg, loading.load(tmp_path / "user.yaml")))
    assert by_run["avg@2"] == by_export["avg@2"] and by_run["step"] == 5 and by_export["step"] == 0
    assert set(by_run) == {"model", "step", "k", "temperature", "avg@2", "pass@1", "pass@2", "maj@2"}


@pytest.mark.slow
def test_changed_prompts_are_reported_at_resume(trained, place, tmp_path, capsys):
    """A changed chat template and a changed answer; no report if nothing changed."""
    kept = [place / "test.jsonl", place / "model" / "chat_template.jinja"]
    before = [path.read_text() for path in kept]
    shutil.copytree(trained[1].run_dir, tmp_path / "run")
    write(place, tmp_path, every=100)
    again = lambda: (cli.main(["train", str(tmp_path / "user.yaml")]), capsys.readouterr().out)  # noqa: E731
    try:
        code, output = again()
        assert code == 0 and "resuming from step 5" in output and "at the checkpoint" not in output
        kept[0].write_text(before[0].replace('"answer": "102"', '"answer": "103"'))
        kept[1].write_text(before[1] + " ")
        assert "task: got other training rows, held-out rows than at the checkpoint" in again()[1]
    finally:
        for path, text in zip(kept, before, strict=True):
            path.write_text(text)


@pytest.mark.slow
def test_evaluation_does_not_change_training(trained, place, tmp_path):
    _, result = trained
    often = train(write(place, tmp_path, every=1, steps=3))
    a, b = (read_jsonl(r.run_dir / "metrics.jsonl")[1:4] for r in (often, result))
    assert len(a) == 3 and [row["completions/crc32"] for row in a] == [row["completions/crc32"] for row in b]
    assert [row["grad_norm"] for row in a] == [row["grad_norm"] for row in b]
    assert all("eval/maj@4" in row for row in a) and not any("eval/maj@4" in row for row in b)


@pytest.mark.slow
def test_a_model_is_evaluated_on_a_task_by_name(place, capsys):
    limits = ["--rollout.max-new-tokens", "4", "--task.held-out", "8", "--model.compute", "float32"]
    assert cli.main(["eval", str(place / "model"), "--task", "reasoning_gym:chain_sum", "-k", "1", *limits]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["avg@1"] == found["pass@1"] == found["maj@1"] and found["avg@1"]["n"] == 8 and found["step"] == 0


def test_a_run_without_a_checkpoint_is_not_evaluated(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text("model: {layers: 1, d_model: 16, heads: 2, d_mlp: 16}\n")
    assert cli.main(["eval", str(tmp_path), "-k", "1"]) == 3
    assert "got no checkpoint" in capsys.readouterr().err


BAD = {
    "a missing path": ({"model": "/nowhere/at/all"}, "/nowhere/at/all: got a path that does not exist"),
    "no config.json": ({"model": "{place}"}, "got a directory without config.json"),
    "a missing column": ({"data": "{tmp}/other.jsonl"}, "other.jsonl:2:"),
}


@pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD)
def test_bad_input_is_one_message(place, tmp_path, capsys, changes, message):
    (tmp_path / "other.jsonl").write_text('{"id": 1, "question": "a", "answer": "b"}\n{"id": 2, "answer": "b"}\n')
    refused(place, tmp_path, capsys, message, **{k: v.format(place=place, tmp=tmp_path) for k, v in changes.items()})


def refused(place, tmp_path, capsys, message, **changes):
    write(place, tmp_path, **changes)
    assert cli.main(["train", str(tmp_path / "user.yaml")]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.startswith("jaxrl: ") and "Traceback" not in printed


def test_a_tokenizer_larger_than_the_model(place, tmp_path, capsys):
    small = ModelConfig(vocab_size=64, layers=1, d_model=32, heads=8, kv_heads=8, head_dim=8, d_mlp=64)
    export(make_params(small, layouts()[0]), small, tmp_path / "small", "float32", save_tokenizer=save_tokenizer)
    refused(
        place, tmp_path, capsys, "model.vocab_size: got 64, want at least the tokenizer's", model=tmp_path / "small"
    )


def test_a_shard_that_was_cut_short(place, tmp_path, capsys):
    cut = tmp_path / "cut"
    shutil.copytree(place / "model", cut)
    shard = cut / "model.safetensors"
    os.truncate(shard, shard.stat().st_size - 100)
    refused(place, tmp_path, capsys, "model.safetensors: got", model=cut)


def test_a_chat_template_that_raises(place, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(place / "model", broken)
    save_tokenizer(broken, template="{{ raise_exception('no system turn, please') }}")
    refused(place, tmp_path, capsys, "no system turn, please", model=broken)

"""Configs and flags that attack the YAML reader or the terminal: one message each, at once, without control characters."""

import json
import logging
import time

import pytest
from test_bad_input import jaxrl

from jaxrl_llm import cli
from jaxrl_llm.cli import read_config
from jaxrl_llm.errors import UserError
from jaxrl_llm.metrics.config import MetricsConfig
from jaxrl_llm.metrics.json_lines import read_jsonl
from jaxrl_llm.metrics.recorder import Recorder
from jaxrl_llm.metrics.report.build import build

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{last}'] * 10)}]\n" for last, name in zip("abcdefgh", "bcdefghi", strict=True)
)
TEXTS = {
    "aliases of aliases": (BOMB + "rollout: {stop: *i}\n", "its aliases expand to more than 100,000 values"),
    "an alias of itself": ("rollout: {stop: &a [*a]}\n", "an alias is inside the value that it names: line 1"),
    "a mapping of itself": ("task: &a {kind: *a}\n", "an alias is inside the value that it names: line 1"),
    "deep lists": ("[" * 5000, "it is nested too deeply"),
    "deep mappings": ("a: " + "{a: " * 5000 + "}" * 5000, "it is nested too deeply"),
    "a long number": ("seed: " + "9" * 5000, "Exceeds the limit (4300 digits)"),
    "a list as key": ("? [1, 2]\n: 3\n", "while constructing a mapping"),
    "two documents": ("seed: 1\n---\nseed: 2\n", "expected a single document"),
}


def refused(directory, text, *args) -> str:
    path = directory / "c.yaml"
    path.write_text(text)
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        read_config(str(path), args)
    assert time.monotonic() - start < 5
    return str(error.value).replace(f"{path}: ", "FILE ")


@pytest.mark.parametrize("kind", TEXTS)
def test_small_yaml_with_a_huge_value(tmp_path, kind):
    text, why = TEXTS[kind]
    line = refused(tmp_path, text)
    assert line.startswith(f"FILE not YAML: {why}") and "\n" not in line
    if kind.startswith("deep"):  # values of flags are YAML as well
        assert refused(tmp_path, "seed: 0\n", "--task", text[text.index("[") if "[" in text else 3 :]).endswith(why)


def test_a_file_too_large_for_a_config(tmp_path):
    assert refused(tmp_path, "#" * 2_000_001) == "FILE got 2,000,001 bytes, want a config of 2,000,000 at most"


def test_an_anchor_and_a_merge_are_fine(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "rollout: &r {prompts: 8}\nwarm_start: {rows: 16}\nupdate: {minibatches: &m 2, micro_batches: *m}\n"
    )
    cfg = read_config(str(tmp_path / "c.yaml"), [])
    assert (cfg.rollout.prompts, cfg.update.micro_batches) == (8, 2)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('rollout: {stop: ["\\ud800"]}', "rollout.stop.0"),
        ('run_dir: "\\ud800"', "run_dir"),
        ('tokenizer: {path: a, system: "x\\ud800"}', "tokenizer.system"),
        ('tokenizer: {path: a, template: {date: "\\ud800"}}', "tokenizer.template.date"),
        ('tokenizer: {alphabet: "ab\\ud800"}', "tokenizer.alphabet"),
        ('task: {kind: file, held_out: 1, path: "\\ud800"}', "task.path"),
        ('model: {path: "a\\0b"}', "model.path"),
    ],
)
def test_half_a_surrogate_pair_is_refused_by_its_key(tmp_path, text, place):
    (line,) = refused(tmp_path, text).splitlines()
    wrong = "'\\x00'" if "\\0" in text else "'\\ud800'"
    assert line.startswith(f"FILE {place}: got ") and line.endswith(
        f", want text without {wrong}, which is no character"
    )


def test_a_prompt_with_half_a_surrogate_pair(tmp_path):
    tiny = "model: {vocab_size: 16, layers: 1, d_model: 8, heads: 2, kv_heads: 1, head_dim: 8, d_mlp: 8}"
    (tmp_path / "c.yaml").write_text(
        f"run_dir: {tmp_path}/run\ntask: {{kind: file, path: {tmp_path}/r.jsonl, held_out: 1}}\n{tiny}\n"
    )
    (tmp_path / "r.jsonl").write_text(
        '{"prompt": "<0>", "answer": "0", "note": "\\ud800"}\n{"prompt": "<1>", "answer": "1"}\n'
    )
    assert "--prompt: got \\udcff, want text in UTF-8" in jaxrl("sample", tmp_path / "c.yaml", "--prompt", "\udcff")
    (tmp_path / "r.jsonl").write_text('{"prompt": "<0>", "answer": "\\ud800"}\n{"prompt": "<1>", "answer": "1"}\n')
    words = jaxrl("sample", tmp_path / "c.yaml")
    assert (
        f"{tmp_path}/r.jsonl:1: task.answer: got '\\ud800', half of a character (a lone surrogate), want text" in words
    )


RED = "\x1b[31m"


def test_error_messages_hold_no_control_characters(tmp_path):
    """Keys of a config, columns, file names, names of models, misspelled commands and flags."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({f"{RED}q\u202e": 1}) + "\n")
    (tmp_path / "c.yaml").write_text(f"task: {{kind: file, path: {tmp_path}/rows.jsonl, held_out: 1}}\n")
    (tmp_path / "keys.yaml").write_text('"\\e[31mkey": 1\n')
    model = tmp_path / f"{RED}dir"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"architectures": [f"{RED}\x07Llama"]}))
    plain = "configs/arithmetic.yaml"
    commands = [
        ("train", tmp_path / "c.yaml", "--run-dir", tmp_path / "run"),
        ("train", tmp_path / "keys.yaml"),
        ("train", plain, "--model.path", model, "--run-dir", tmp_path / "run"),
        ("train", plain, f"--{RED}x", "1"),
        (f"{RED}train", plain),
        ("train", tmp_path / f"{RED}no.yaml"),
        ("report", tmp_path / f"{RED}no"),
    ]
    for command in commands:
        message = jaxrl(*command)
        assert message.startswith("jaxrl: ") and "\\x1b[31m" in message, command
        assert not {"\x1b", "\x07", "\u202e"} & set(message), command


def test_records_report_and_console_take_any_text(tmp_path, capsys):
    bad = f"\ud800{RED}\u202e"
    row = {
        "uid": 0,
        "sample": 0,
        "prompt": bad,
        "completion": bad,
        "tokens": [bad],
        "logprobs": [-1.0],
        "entropy": [1.0],
    }
    with Recorder(tmp_path, MetricsConfig(tensorboard=False), 1, True) as recorder:
        recorder.log(1, {"reward": 1.0, "phase": "rl", "note": bad, bad: 1.0})
        recorder.rollouts(1, [row | {"reward": 1.0, "advantage": 0.0, "finish": bad}])
        recorder.samples([row])
        recorder.message(bad)
    assert (
        read_jsonl(tmp_path / "metrics.jsonl")[0]["note"] == read_jsonl(tmp_path / "rollouts.jsonl")[0]["prompt"] == bad
    )
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    for text in (build(tmp_path).read_text(), capsys.readouterr().out):
        assert "\\ud800\\x1b[31m\\u202e" in text and not set(bad) & set(text) - set("[31m")


def test_warnings_hold_no_control_characters():
    record = logging.LogRecord("jaxrl_llm", logging.WARNING, "", 0, "column %s\nnext", (f"{RED}q",), None)
    assert cli.PrintableFormatter("%(message)s").format(record) == "column \\x1b[31mq\nnext"

"""`jaxrl sample --regex` and `--json-schema`, and how controlled tokens are printed."""

import re

import jax
import numpy as np
import pytest
from controlled import CONTROLS, P, policy, sampler
from setups import make_prompts

from jaxrl_llm import cli
from jaxrl_llm.commands.control_options import controlled, named_by_option
from jaxrl_llm.commands.sample import _line
from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.control.config import JsonSchemaControl, NoControl, RegexControl
from jaxrl_llm.errors import CheckpointError, UserError
from jaxrl_llm.metrics.timers import CompileCounter
from jaxrl_llm.roles.allowed_sets import allowed_in_row
from jaxrl_llm.tasks.task import Task

OWN = "model: {vocab_size: 16, layers: 1, d_model: 8, heads: 2, kv_heads: 1, head_dim: 8, d_mlp: 8}\nmesh: {fsdp: -1}\n"


def test_an_option_takes_the_place_of_the_configs_control():
    cfg = RunConfig()
    assert controlled(cfg, {"-n": 2}) is cfg and cfg.rollout.control == NoControl()
    assert controlled(cfg, {"--regex": "a+"}).rollout.control == RegexControl(pattern="a+")
    assert controlled(cfg, {"--json-schema": "s.json"}).rollout.control == JsonSchemaControl(path="s.json")
    with pytest.raises(UserError, match=r"^--regex: got it with --json-schema, want one of the two$"):
        controlled(cfg, {"--regex": "a", "--json-schema": "s"})


def test_errors_name_the_option():
    def raised(given: dict, text: str, kind: type = UserError) -> str:
        with pytest.raises(kind) as error, named_by_option(given):
            raise kind(text)
        return str(error.value)

    text = "rollout.control: got x\nrollout.control.schema.type: got y\nrollout.max_new_tokens: got 3"
    want = "--json-schema: got x\n--json-schema.type: got y\nrollout.max_new_tokens: got 3"
    assert raised({"--json-schema": "s"}, text) == want
    assert raised({"--regex": "s"}, "rollout.control.pattern: got x", CheckpointError) == "--regex: got x"
    assert raised({}, text) == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--regex", "[0-9"], r"--regex: got '\[0-9', want a regular expression"),
        (["--regex", "abc"], "--regex: got texts that this tokenizer cannot spell"),
        (["--regex", ""], "--regex: got nothing, want some text"),
        (["--regex", "[0-9]{8}#"], "rollout.max_new_tokens: got 8, want at least 9: the control allows no response"),
        (["--regex", "[0-9]#", "--rollout.stop", "[+]"], r"rollout.stop: got \['\+'\] beside --regex regex, want \[\]"),
        (["--json-schema", "s.json", "--regex", "1"], "--regex: got it with --json-schema"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_compiles(tmp_path, capsys, options, message):
    (tmp_path / "own.yaml").write_text(OWN + f"run_dir: {tmp_path}/none\n")
    compiles = CompileCounter()
    assert cli.main(["sample", str(tmp_path / "own.yaml"), *options]) == 2
    assert re.search(f"^jaxrl: {message}", capsys.readouterr().err, re.MULTILINE)
    assert compiles.take()["compiles"] == 0


def test_help_shows_the_options(capsys):
    assert cli.main(["sample", "--help"]) == 0
    assert {"--regex PATTERN", "--json-schema FILE"} <= set(re.findall(r"--[a-z-]+ [A-Z]+", capsys.readouterr().out))


def test_forced_tokens_are_in_brackets_and_allowed_ones_counted():
    """`<1` is forced, two of ten digits follow, then `#` alone is allowed; a free row shows neither."""
    engine = sampler()
    controls = engine.controls(P, control=[CONTROLS["begin"]] + [NoControl()] * (P - 1))
    of = engine.generate(policy(), make_prompts(P), jax.random.key(0), controls)
    task = Task((), (), engine.model.tokenizer)
    parts = re.split(r"  +", _line(task, of, 0, np.nan, allowed_in_row(engine.tables, of, 0, 16)).strip())
    assert re.fullmatch(r"<1\d\d#", parts[1]) and parts[2] == "reward ?" and parts[-6] == "eos"
    assert parts[-5:-3] == ["[<]", "[1]"]
    for part in parts[-3:-1]:
        assert re.fullmatch(r"\d -\d\.\d{3} \(H \d\.\d{3}, 10 allowed\)", part)
    assert parts[-1] == "# 0.000 (H 0.000, 1 allowed)"
    last = len(of.tokens) - 1
    free = _line(task, of, last, np.nan, allowed_in_row(engine.tables, of, last, 16))
    assert "allowed" not in free and "[" not in free

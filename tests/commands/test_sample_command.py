"""`jaxrl sample` of a model by itself and of prompts longer than the task's. Prompts that cannot be sampled are refused before
anything compiles."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from setups import layouts, make_params
from tokenizer_setup import save_tokenizer

from jaxrl_llm import cli
from jaxrl_llm.metrics.terminal import printable
from jaxrl_llm.metrics.timers import CompileCounter
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.hf.export import ConfigFiles, export

OWN = "model: {vocab_size: 16, layers: 1, d_model: 8, heads: 2, kv_heads: 1, head_dim: 8, d_mlp: 8}\nmesh: {fsdp: -1}\n"
THEIRS = ModelConfig(vocab_size=320, layers=1, d_model=16, heads=8, kv_heads=8, head_dim=8, d_mlp=16, qk_norm=True)
QUESTION = "What is 3 + 4?"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model whose blocks add nothing, so that the next token depends on the last one alone; made for 40 positions."""
    place = tmp_path_factory.mktemp("model") / "theirs"
    params = make_params(THEIRS, layouts()[0])
    export(params, THEIRS, place, "float32", ConfigFiles(length=40), save_tokenizer=lambda to: save_tokenizer(to))
    tensors = load_file(place / "model.safetensors")
    silent = {name: 0 * x for name, x in tensors.items() if name.endswith(("o_proj.weight", "down_proj.weight"))}
    save_file(tensors | silent, place / "model.safetensors", metadata={"format": "pt"})
    return place


def read(model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def prompt_of(model, text: str) -> list[int]:
    turn = [{"role": "user", "content": text}]
    return read(model).apply_chat_template(turn, add_generation_prompt=True, return_dict=False)


def greedy_tokens(model, last: int, most: int) -> list[int]:
    """Greedy tokens: each maximizes e_j . (w e / rms(e)), e the embedding of the previous token. Ends after an end token."""
    embed = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    norm = load_file(model / "model.safetensors")["model.norm.weight"]
    size, eos, found = len(read(model)), read(model).eos_token_id, [last]
    while len(found) <= most and (len(found) == 1 or found[-1] != eos):
        x = embed[found[-1]]
        found.append(int(np.argmax(embed[:size] @ (x / np.sqrt(np.mean(x**2) + 1e-6) * norm))))
    return found[1:]


@pytest.mark.slow
def test_a_model_by_itself_answers_in_its_chat_template(model, capsys):
    tokens = greedy_tokens(model, prompt_of(model, QUESTION)[-1], 5)
    backend = read(model).backend_tokenizer
    text = "".join(printable(backend.decode([token], skip_special_tokens=False)) for token in tokens)
    flags = ["--rollout.temperature", "0", "--rollout.max-new-tokens", "5", "--model.compute", "float32"]
    assert cli.main(["sample", str(model), "--prompt", QUESTION, "-n", "2", *flags]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head == f"{QUESTION}   from {model}, temperature 0.0"
    assert [row.split(" reward ?")[0].rstrip() for row in rows] == [f"  0  {text}", f"  1  {text}"]


def refused(capsys, *args) -> str:
    """The error message; nothing may be compiled before it."""
    counter = CompileCounter()
    assert cli.main(["sample", *map(str, args)]) == 2
    assert counter.take()["compiles"] == 0
    return capsys.readouterr().err


@pytest.mark.parametrize("chat", ["true", "false"])
def test_a_prompt_beyond_the_models_positions_is_refused(model, capsys, chat):
    text = QUESTION * 10
    plain = len(read(model)(text, add_special_tokens=False)["input_ids"])
    tokens = len(prompt_of(model, text)) if chat == "true" else plain
    assert tokens > plain or chat == "false"
    message = refused(capsys, model, "--prompt", text, "--tokenizer.chat", chat, "--rollout.max_new_tokens", "6")
    assert message == (
        f"jaxrl: --prompt: got {tokens} tokens, want 34 at most: the model was made for 40 positions, and rollout.max_new_tokens "
        "takes 6 of them\n"
    )


def test_settings_and_prompts_of_a_task_for_a_model(model, capsys, tmp_path):
    """The config of the task is checked for the model: the right answer has 2 tokens, and 1 is not enough."""
    rows = [{"question": f"{n} + 1", "answer": str(n + 1)} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(
        f"task: {{kind: file, path: {tmp_path}/rows.jsonl, held_out: 1, prompt: '{{question}}', response: '{{answer}}'}}\n"
        "rollout: {max_new_tokens: 1}\n"
    )
    message = refused(capsys, model, "--task", tmp_path / "task.yaml", "--prompt", "1 + 1")
    assert message == "jaxrl: rollout.max_new_tokens: got 1, want at least the 2 tokens of the longest right response\n"


def test_a_prompt_that_cannot_be_encoded_is_refused_before_anything_compiles(tmp_path, capsys):
    (tmp_path / "own.yaml").write_text(OWN + f"run_dir: {tmp_path}/none\n")
    message = refused(capsys, tmp_path / "own.yaml", "--prompt", "xy")
    assert message == "jaxrl: --prompt: got characters 'x' 'y', want only those of tokenizer.alphabet\n"


@pytest.mark.slow
def test_a_prompt_may_be_longer_than_those_of_the_task(tmp_path, capsys):
    """The task's prompts have 7 tokens, three digits and two signs in brackets; this one has 25. A model without config.json has no
    maximum length."""
    (tmp_path / "own.yaml").write_text(OWN + f"run_dir: {tmp_path}/none\n")
    prompt = "<" + "+".join("123456789012") + ">"
    assert len(prompt) == 25
    assert cli.main(["sample", str(tmp_path / "own.yaml"), "--prompt", prompt, "-n", "3"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head == f"{prompt}   from an untrained policy, temperature 1.0"
    # The answer is not known, so there is no reward.
    assert [re.match(r"  (\d)  .* reward \?  log-prob +-\d", row)[1] for row in rows] == ["0", "1", "2"]


@pytest.mark.slow
def test_a_model_answers_as_a_pattern_or_a_schema_says(model, capsys, tmp_path):
    (tmp_path / "s.json").write_text(
        json.dumps({"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]})
    )

    def sampled(*options: object) -> list[str]:
        flags = ["--rollout.max_new_tokens", "16", "--model.compute", "float32"]
        assert cli.main(["sample", str(model), "--prompt", QUESTION, "-n", "4", *map(str, options), *flags]) == 0
        rows = capsys.readouterr().out.splitlines()[1:]
        return [re.fullmatch(r" +\d  (.*?) +reward .*  eos .*", row)[1].removesuffix("<|im_end|>") for row in rows]

    found = sampled("--regex", "[a-c]{2}-[0-9]")
    assert len(found) == 4 and all(re.fullmatch("[a-c]{2}-[0-9]", text) for text in found)
    found = sampled("--json-schema", tmp_path / "s.json")
    assert len(found) == 4 and all(json.loads(text)["ok"] in (True, False) for text in found)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (None, "--json-schema: .*s.json"),
        ("{", "--json-schema: .*s.json"),
        ('{"type": "text"}', 's.json: got type "text", want a type'),
    ],
)
def test_a_schema_that_cannot_be_read_is_refused_by_its_option(model, capsys, tmp_path, schema, words):
    if schema:
        (tmp_path / "s.json").write_text(schema)
    flags = ["--rollout.max_new_tokens", "16", "--json-schema", tmp_path / "s.json"]
    message = refused(capsys, model, "--prompt", QUESTION, *flags)
    assert re.search(words, message) and "rollout.control" not in message

"""The examples of docs/prompts.md are valid configs, and its picture is what they make of its rows."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter
from tokenizer_setup import save_tokenizer

from jaxrl_llm.tasks.config import ExamplesConfig, FileTask, PretrainedTokenizer, PromptColumns, PromptForm
from jaxrl_llm.tasks.task import load_task

PAGE = (Path(__file__).parents[2] / "docs" / "prompts.md").read_text()
BLOCKS = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
READER = TypeAdapter(FileTask)


def test_the_examples_are_valid():
    assert [READER.validate_python(block["task"]).prompting.forms[0].name for block in BLOCKS] == ["plain", "plain"]


def test_the_picture_is_of_its_rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text(re.search(r"```json\n(.*?)```", PAGE, re.DOTALL)[1])
    cfg = dataclasses.replace(READER.validate_python(BLOCKS[0]["task"]), path=str(tmp_path / "rows.jsonl"))
    task = load_task(cfg, PretrainedTokenizer(str(save_tokenizer(tmp_path))), seed=0)
    row, shown = task.train[0], {}
    for title, asked in (("visit 0: ", row.asked(0)), ("visit 5: ", row.asked(5)), ("evaluation", task.held_out[0])):
        text = task.tokenizer.backend.decode(asked.tokens.tolist(), skip_special_tokens=False)
        shown[title + asked.asks.form] = ["", *text.rstrip("\n").split("\n")]
    first, *lines = re.search(r"```text\n(.*?)\n```", PAGE, re.DOTALL)[1].split("\n")
    starts = [first.index(title) for title in shown]
    for start, end, want in zip(starts, [*starts[1:], None], shown.values(), strict=True):
        assert [line[start:end].rstrip() for line in lines][: len(want)] == want


@pytest.mark.parametrize("section", [PromptForm, ExamplesConfig, PromptColumns])
def test_every_setting_is_on_the_page(section):
    assert all(f"| `{field.name}` |" in PAGE for field in dataclasses.fields(section))

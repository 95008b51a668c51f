"""The examples of docs/data.md are valid configs."""

import re
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

from jaxrl_llm.tasks.config import TaskConfig, TokenizerConfig

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
SECTIONS = {"task": TypeAdapter(TaskConfig), "tokenizer": TypeAdapter(TokenizerConfig)}


def test_the_page_has_examples():
    assert {name for block in BLOCKS for name in yaml.safe_load(block)} == set(SECTIONS)


@pytest.mark.parametrize("block", BLOCKS)
def test_every_example_is_valid(block):
    for name, values in yaml.safe_load(block).items():
        SECTIONS[name].validate_python(values)

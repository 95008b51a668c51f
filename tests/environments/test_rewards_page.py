"""docs/rewards.md agrees with the code: its example runs, its configs are valid, its tables are complete."""

import dataclasses
import re
import sys
from pathlib import Path

import numpy as np
import pydantic
import pytest
import yaml

from jaxrl_llm.environments.config import GraderConfig, RewardConfig
from jaxrl_llm.environments.grader import BUILT_IN, Sample, problems, resolve
from jaxrl_llm.environments.grader_pool import Failure, GraderPool

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def configs():
    sections = [document["reward"] for block in blocks("yaml") for document in yaml.safe_load_all(block)]
    return [pydantic.TypeAdapter(RewardConfig).validate_python(section) for section in sections]


def test_the_example_is_short_and_runs(tmp_path, monkeypatch):
    example, _ = blocks("python")
    assert len(example.splitlines()) <= 12
    (tmp_path / "my_graders.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    # The pool adds the working directory to it.
    monkeypatch.setattr(sys, "path", [*sys.path])
    config = dataclasses.replace(configs()[-2], workers=1)
    completions = ["42", "It is 42.", "It is 41.", ""]
    with GraderPool(config) as pool:
        graded = pool.grade([[Sample("6 * 7?", text, "42", "eos") for text in completions]])
    assert graded.reward.tolist() == [[1.5, 1.0, 0.0, 0.0]]


def test_the_example_with_steps_runs(tmp_path, monkeypatch):
    """Two lines of three are right; the second response is the answer, and no sum. Values by the characters up to a step's end."""
    _, example = blocks("python")
    assert len(example.splitlines()) <= 12
    (tmp_path / "my_steps.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    config = dataclasses.replace(configs()[-1], workers=1)
    with GraderPool(config) as pool:
        graded = pool.grade([[Sample("", text, "42", "eos") for text in ("1 + 2 = 3\n3 + 4 = 8\n8 + 8 = 16", "42")]])
    assert graded.components.tolist() == np.float32([[[2 / 3, 0]], [[0, 1]]]).tolist()
    assert graded.earned == [[{10: 1.0, 20: 0.0, 30: 1.0}, {2: 1.0}]]


def test_the_configs_are_valid():
    short, mine, tolerant, mix, by_task, example, steps = configs()
    assert [grader.tasks for grader in by_task.graders] == [("easy",), ("hard",), ()] and problems(by_task) == []
    assert (steps.graders[0].step_end, steps.graders[1].step_end) == ("\n", "")
    assert short == RewardConfig((GraderConfig("gsm8k"),))
    assert mine.graders[0].label == "my_function"
    assert (tolerant.workers, tolerant.graders[0].options) == (8, {"rel_tol": 0.01})
    assert [grader.weight for grader in mix.graders] == [1.0, 0.2, 0.5]
    assert problems(short) == problems(tolerant) == problems(mix) == []
    assert example.graders[0].options == {"bonus": 0.5}


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_grader_and_every_option_is_in_the_tables(name):
    assert f"| `{name}` |" in PAGE
    tables = "".join(line for line in PAGE.splitlines() if line.startswith("|"))
    assert {field.name for field in dataclasses.fields(resolve(name))} <= set(re.findall(r"`(\w+)`", tables))


def test_every_field_and_every_failure_is_in_the_tables():
    for field in [*dataclasses.fields(GraderConfig), *dataclasses.fields(RewardConfig)[1:]]:
        assert f"| `{field.name}` |" in PAGE
    for name in Sample._fields:
        assert f"| `{name}` |" in PAGE
    for kind in Failure:
        assert kind is Failure.NONE or f"`rewards/<name>/{kind.name.lower()}`" in PAGE

"""docs/filtering.md agrees with the code: its configs are valid, its example runs, its tables name every rule and option."""

import dataclasses
import re
import typing
from pathlib import Path

import numpy as np
import pytest
import yaml
from random_groups import groups_of

from jaxrl_llm.config.loading import load, validate
from jaxrl_llm.experience import config
from jaxrl_llm.experience.filters import Filter

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "filtering.md").read_text(encoding="utf-8")


def rules(annotation) -> list[type]:
    inner = typing.get_args(annotation)[0] if typing.get_origin(annotation) is typing.Annotated else annotation
    composed = (config.ChainConfig, config.AllOfConfig, config.AnyOfConfig)
    own = (config.OwnCurriculum, config.OwnFilter, config.OwnGate, config.OwnBudget, config.OwnDraw)
    skipped = (config.AutoFilter, *own, *composed)
    return [rule for rule in typing.get_args(inner) if rule not in skipped]


RULES = {
    "curriculum": config.CurriculumConfig,
    "filter": config.FilterConfig,
    "gate": config.GateConfig,
    "budget": config.BudgetConfig,
    "replay.draw": config.DrawConfig,
}


@pytest.mark.parametrize(
    ("part", "rule"), [(part, rule) for part, annotation in RULES.items() for rule in rules(annotation)]
)
def test_every_rule_is_in_a_table_and_names_its_source(part, rule):
    kind = {field.name: field.default for field in dataclasses.fields(rule)}["kind"]
    table = PAGE.partition(f"| `experience.{part}`")[2].partition("\n\n")[0]
    rows = [line for line in table.splitlines() if line.startswith(f"| `{kind}`")]
    assert rows or kind == "none"
    # A rule with a source in the table has it in its docstring.
    for number in {x for row in rows for x in re.findall(r"\d{4}\.\d{5}", row)}:
        assert number in rule.__doc__
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named - {kind, "success", "by"} <= {field.name for field in dataclasses.fields(rule)}


def test_its_config_is_valid():
    first, second, stages, third, demonstrations = (
        validate(yaml.safe_load(block), "the page").experience
        for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    )
    assert first.gate.kind == "greso" and first.refill.attempts == 10 and len(first.filter.filters) == 3
    assert second.curriculum.shares == {"easy": 1, "hard": 3}
    assert stages.curriculum.groups == 64 and [stage.problem for stage in stages.curriculum.stages] == [""] * 3
    assert third.replay == config.ReplayConfig(512, 4096, 8, 4, draw=config.RecencyDraw(), groups=16)
    assert demonstrations.replay.start and not demonstrations.replay.store_fresh and demonstrations.replay.join.swap


def test_its_example_runs():
    [block] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict = {}
    exec(block, names)
    assert isinstance(names["keep"], Filter)
    groups = groups_of([3, 3], [1, 1, 0, 0, 0, 1])
    np.testing.assert_array_equal(names["keep"](groups).keep, [True, True, True, True, False, True])


@pytest.mark.parametrize("name", ["dapo", "budgets", "greso", "curriculum"])
def test_named_configs_say_what_was_seen(name):
    text = (ROOT / "configs" / f"{name}.yaml").read_text()
    assert "SEEN" not in text and "HARDWARE" not in text and f"jaxrl train configs/{name}.yaml" in text
    load(ROOT / "configs" / f"{name}.yaml")

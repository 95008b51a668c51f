"""docs/rollout_engineering.md: its configs are valid, its numbers are on the pages that it names, its code runs."""

import re
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest
import yaml

from jaxrl_llm import train
from jaxrl_llm.config import consistency
from jaxrl_llm.config.loading import validate
from jaxrl_llm.environments.grader import Sample, problems
from jaxrl_llm.environments.graders.instructions import Instructions
from jaxrl_llm.experience.config import AutoFilter
from jaxrl_llm.experience.filters import make_filter
from jaxrl_llm.metrics.json_lines import read_jsonl

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "rollout_engineering.md").read_text(encoding="utf-8")
NAMES = ("Instruction following", "Step-wise reasoning", "Domain constraints", "Less compute")


def block(language: str, name: str = "") -> str:
    """The only block of the language, of one section or of the page."""
    [found] = re.findall(
        rf"^```{language}\n(.*?)^```", PAGE.partition(f"### {name}\n")[2].partition("\n### ")[0], re.M | re.S
    )
    return found


def table() -> list[list[str]]:
    """Cells of the first table's rows."""
    lines = PAGE.partition("|---|---|---|---|---|---|\n")[2].splitlines()
    return [line.strip("| ").split(" | ") for line in takewhile(lambda line: line.startswith("|"), lines)]


@pytest.mark.parametrize("name", NAMES)
def test_its_configs_are_valid(name, tmp_path, monkeypatch):
    """With the modules that they name, which are on this page and on that of rewards."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_domain.py").write_text(block("python", "Domain constraints"))
    rewards = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    (tmp_path / "my_steps.py").write_text(re.search(r"^```python\n(# my_steps.py.*?)^```", rewards, re.M | re.S)[1])
    cfg = validate(yaml.safe_load(block("yaml", name)), name)
    if not isinstance(cfg.experience.filter, AutoFilter):
        make_filter(cfg.experience.filter, lambda groups: [])
    assert problems(cfg.reward) == []
    assert consistency.problems(cfg, 1) == consistency.training_problems(cfg) == consistency.cautions(cfg) == []


def test_each_number_is_one_of_the_pages_and_configs_that_its_row_names():
    """Accuracies have three decimals. "the same" is the row before."""
    checked, place = 0, ""
    for row in table():
        if row[-1] != "the same":
            names = [f"docs/{page}" for page in re.findall(r"\((\w+\.md)", row[-1])] + re.findall(
                r"configs/\w+\.yaml", row[-1]
            )
            place = "".join((ROOT / name).read_text(encoding="utf-8") for name in names)
        numbers = re.findall(r"\b0\.\d{3}\b", " ".join(row[:-1]))
        assert [number for number in numbers if number not in place] == [], row
        checked += len(numbers)
    assert checked > 80


def test_what_it_names_exists():
    for name in re.findall(r"configs/\w+\.yaml", PAGE):
        assert (ROOT / name).is_file(), name
    for page, anchor in re.findall(r"\]\((\w+\.md)(?:#([\w-]+))?\)", PAGE):
        headings = re.findall(r"^#+ (.*)", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.MULTILINE)
        slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in slugs, anchor
    measured = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    for name in re.findall(r"python -m experiments\.(\w+)", measured):
        assert (ROOT / "experiments" / f"{name}.py").is_file() and (
            ROOT / "experiments" / "results" / f"{name}.json"
        ).is_file()


def test_its_grader_and_filter_judge_records():
    exec(block("python", "Domain constraints"), names := {})
    columns = {"fields": {"size": 3, "color": "red"}}
    for text, share in [
        ('{"size": 3, "color": "red"}', 1.0),
        ('{"size": 3}', 0.5),
        ('{"size": "3", "color": "red"}', 0.5),
        ('{"size": 3, "color": "red", "price": 1}', 0.0),
        ("[3]", 0.0),
        ('{"size": 3', 0.0),
        ("[" * 100_000, 0.0),
    ]:
        assert names["record"](Sample("", text, "", "stop", columns)) == share, text[:40]
    assert names["one_line"](None, ['{"a": 1}\n', '{"a":\n1}']).tolist() == [True, False]


def test_its_instructions_can_be_graded():
    row = yaml.safe_load(block("json", "Instruction following"))
    assert Instructions().problem(Sample("", "", "", "eos", row)) == ""
    assert Instructions()(Sample("", "It is wide, and slow.", "", "eos", row)) == 0.5


@pytest.mark.soak
def test_two_steps_of_less_compute(tmp_path):
    """The stages as they stand there, on the arithmetic task: fewer and smaller groups, a reward that an untrained policy earns."""
    values = yaml.safe_load(block("yaml", "Less compute"))
    values["experience"]["replay"]["groups"] = values["rollout"]["prompts"] = 8
    values["rollout"] |= {"samples": 4, "max_new_tokens": 4}
    values |= {"steps": 2, "run_dir": str(tmp_path / "run"), "task": {"kind": "arithmetic", "terms": 2, "held_out": 8}}
    values |= {
        "model": {"vocab_size": 16, "layers": 1, "d_model": 32, "heads": 8, "kv_heads": 8, "head_dim": 8, "d_mlp": 64}
    }
    values |= {"reward": {"grader": "row_graders:odd", "workers": 1}}
    values["update"] |= {"minibatches": 2, "micro_batches": 2}
    values["metrics"] = {"tensorboard": False, "samples_every": 0}
    train.train(validate(values, "the page"))
    first, second = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if row["step"]]
    # The buffer is empty at first; then what the first step kept comes back.
    assert (first["groups/replayed"], second["groups/replayed"]) == (0, first["groups/kept"])
    assert 0 < first["groups/kept"] and np.isfinite([second["loss"], second["ess/sequences"]]).all()

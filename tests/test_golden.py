"""Golden runs: the same results as stored, to the last bit; and the same values of all named configs."""

import copy
import json
import os
from pathlib import Path

import pytest
import yaml
from golden import golden_runs

from jaxrl_llm.config import loading, saved_config
from jaxrl_llm.objective.presets import PRESETS

ROOT = Path(__file__).parents[1]
CONFIGS = Path(__file__).parent / "golden" / "configs"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", pytest.param("eight_devices", marks=pytest.mark.soak)])
def test_a_run_computes_what_it_computed(name, tmp_path):
    path = golden_runs.stored(name)
    if not path.exists():
        pytest.skip(f"nothing was compared: no {path.name}; tests/golden/golden_runs.py --against COMMIT compares here")
    # Programs compiled for one core are not those for two.
    got = golden_runs.record(name, tmp_path / "run", cache=os.environ["JAX_COMPILATION_CACHE_DIR"] + "-one-core")
    assert golden_runs.differences(got, json.loads(path.read_text())) == []


def test_golden_runs_are_stored_with_a_line_of_the_changelog():
    paths = sorted(golden_runs.STORE.glob("*.json"))
    assert len(paths) >= 2
    assert [golden_runs.change_problem(json.loads(path.read_text())["change"]) for path in paths] == [""] * len(paths)
    assert "want a line of CHANGELOG.md" in golden_runs.change_problem("no such line")
    assert golden_runs.change_problem("")


def test_a_changed_bit_is_found():
    """In a metric, a line too few, a name too many, the rollouts, the state."""
    want = json.loads(min(golden_runs.STORE.glob("plain.*.json")).read_text())
    assert golden_runs.differences(want, want) == []

    def changed(change) -> list[str]:
        got = copy.deepcopy(want)
        change(got)
        return golden_runs.differences(got, want)

    loss = want["rows"][-1]["loss"]
    assert changed(lambda got: got["rows"][-1].update(loss=loss * (1 + 2**-52))) == [
        f"step 40: loss: got {loss * (1 + 2**-52)}, want {loss}"
    ]
    assert changed(lambda got: got["rows"].pop()) == ["39 lines of metrics, want 40"]
    assert changed(lambda got: got["rows"][0].update(new=1.0)) == ["step 1: new: got 1.0, want None"]
    assert changed(lambda got: got.update(rollouts="")) == ["rollouts.jsonl is another"]
    path = min(want["state"])
    assert changed(lambda got: got["state"].update({path: 0})) == [f"{path} of the final state is another"]


def flat(value, path: str = "") -> list[str]:
    if isinstance(value, dict) and value:
        return [line for key in value for line in flat(value[key], f"{path}.{key}" if path else str(key))]
    return [f"{path}: {json.dumps(value)}"]


def written(name: str) -> str:
    return (CONFIGS / f"{name}.txt").read_text()


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.stem)
def test_a_named_config_equals_its_golden_file(path):
    """`GOLDEN_CONFIGS=update` stores them again."""
    found = "\n".join(flat(yaml.safe_load(saved_config.to_yaml(loading.load(path))))) + "\n"
    if os.environ.get("GOLDEN_CONFIGS") == "update":
        (CONFIGS / f"{path.stem}.txt").write_text(found)
    assert found == written(path.stem)


def test_the_presets_equal_their_golden_file():
    parts = {
        name: yaml.safe_load(saved_config.to_yaml(loading.validate({"objective": name}, name)))["objective"]
        for name in PRESETS
    }
    found = "\n".join(flat(parts)) + "\n"
    if os.environ.get("GOLDEN_CONFIGS") == "update":
        (CONFIGS / "presets.txt").write_text(found)
    assert found == written("presets")

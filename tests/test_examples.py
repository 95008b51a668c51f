"""Each example runs as it is committed, and shows what it says: scripts by their `main`, notebooks cell by cell."""

import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = ("custom_budget", "custom_curriculum", "custom_filter", "custom_loss", "custom_reward")
NOTEBOOKS = ("custom_loop", "inspect_rollouts")


@pytest.fixture
def module(request, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module(request.param)


def cells(name: str) -> list[str]:
    notebook = json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(name: str, monkeypatch) -> dict:
    """Names after all cells, in order, in one namespace: what a kernel does with plain Python. Plots are drawn to nowhere."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    names: dict = {}
    for number, cell in enumerate(cells(name)):
        exec(compile(cell, f"{name}.ipynb, cell {number}", "exec"), names)
    return names


def test_no_example_is_left_out():
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == {
        *(f"{name}.py" for name in SCRIPTS),
        *(f"{name}.ipynb" for name in NOTEBOOKS),
    }


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_committed_without_outputs(name):
    notebook = json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code) and notebook["nbformat"] == 4
    assert not re.search(r"^\s*[%!]", "\n".join(cells(name)), re.MULTILINE), "a kernel's own commands"


@pytest.mark.slow
@pytest.mark.parametrize("module", ["custom_budget"], indirect=True)
def test_a_budget_and_a_rule_of_ones_own_take_effect(module):
    steps = module.main()
    assert len(steps) == 12 and all(row["kept/rows"] < row["rollout/samples"] <= 128 for row in steps)
    # Shares are rounded down, so not all 128 are drawn once prompts differ.
    assert steps[0]["rollout/samples"] == 128 and min(row["rollout/samples"] for row in steps) < 128
    assert all(row["filter/short_and_mixed/dropped"] > 0 for row in steps)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["custom_curriculum"], indirect=True)
def test_a_curriculum_and_a_draw_of_ones_own_take_effect(module):
    steps = module.main()
    never_good = [row["curriculum/never_good"] for row in steps]
    # 80 rows, 16 per step: which were never good comes down, and never up again.
    assert len(steps) == 12 and never_good[0] == 1 and never_good == sorted(never_good, reverse=True) != [1] * 12
    assert steps[0]["groups/replayed"] == 0 < sum(row["groups/replayed"] for row in steps)
    assert all(row["replay/uses"] <= 3 for row in steps if "replay/uses" in row)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["custom_reward"], indirect=True)
def test_a_reward_of_ones_own_is_learned_and_workers_agree(module, capsys):
    means = module.main()
    # Chance is 0.08; all responses that end have 0.2 at least.
    assert means[0] < 0.15 < 0.25 < np.mean(means[-5:])
    assert "workers give the same rewards: True" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("module", ["custom_loss"], indirect=True)
def test_a_loss_of_ones_own_is_minimized_and_logs_its_number(module, capsys):
    found = module.main(20)
    assert found[0]["reward"] < 0.2 < 0.5 < found[-1]["reward"]
    # Before the first update the policy is the reference: two programs of f32.
    assert abs(found[0]["kl"]) < 1e-6 < found[-1]["kl"] and {"clipped", "ratio/max"} <= set(found[0])


@pytest.mark.slow
@pytest.mark.parametrize("module", ["custom_filter"], indirect=True)
def test_filters_of_ones_own_drop_rows_and_the_rest_teaches(module, capsys):
    found = module.main(25)
    assert all(0 < step["kept"] < 1 for step in found[:5]) and all(0 < step["near"] <= 1 for step in found)
    assert np.mean([step["reward"] for step in found[-5:]]) > found[0]["reward"] + 0.2


def test_the_loop_in_a_notebook_learns(monkeypatch, capsys):
    names = run("custom_loop", monkeypatch)
    assert np.mean(names["rewards"][-5:]) > names["rewards"][0] + 0.1 and int(names["state"].step) == 40
    assert "Estimate(" in capsys.readouterr().out


@pytest.mark.slow
def test_the_plots_show_that_sampler_and_trainer_agree(monkeypatch, capsys):
    names = run("inspect_rollouts", monkeypatch)
    # Two programs of f32 at log-probs of about 3 nats.
    assert names["mismatch"] < 1e-4
    assert names["ratio"].min() < 0.99 and names["ratio"].max() > 1.01
    axes = names["axes"]
    assert (
        len(axes[0].collections[0].get_offsets())
        == names["sampled"].sum()
        == sum(p.get_height() for p in axes[1].patches)
    )
    assert "reward" in capsys.readouterr().out

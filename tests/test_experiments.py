"""The set-up of the experiments: records are complete, arms of a seed share their start, a results file is continued."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest

from experiments import report, results_file
from experiments.arithmetic import SETUP, Arm, Pool, Record, changes_of, command, over_steps, to_records, train_arms
from experiments.grammar import GRAMMAR, VALID, Sums
from experiments.quantized import to_4_bits
from experiments.ratios import outside
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.objective.loss_config import Clip

TINY = dataclasses.replace(
    SETUP,
    steps=2,
    task=dataclasses.replace(SETUP.task, terms=2, held_out=16),
    model=ModelConfig(vocab_size=16, layers=1, d_model=32, heads=8, kv_heads=8, head_dim=8, d_mlp=64),
    warm_start=dataclasses.replace(SETUP.warm_start, steps=40, rows=64, noise=0.0),
    rollout=dataclasses.replace(SETUP.rollout, prompts=8, samples=4),
)
FASTER = dataclasses.replace(
    TINY, update=dataclasses.replace(TINY.update, optimizer=dataclasses.replace(TINY.update.optimizer, lr=1e-3))
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "tiny.json"
    train_arms(path, {"as it is": Arm(TINY), "faster": Arm(FASTER)}, seeds=(0,), every=1)
    return path


def test_records_are_complete(path):
    for run in results_file.read(path):
        assert [record["step"] for record in run["records"]] == [0, 1, 2]
        assert [record["samples"] for record in run["records"]] == [0, 32, 64]
        tokens = [record["tokens"] for record in run["records"]]
        # One to four tokens per row.
        assert tokens[0] == 0 and 32 <= tokens[1] <= 128 and tokens[1] + 32 <= tokens[2] <= 256
        for record in run["records"]:
            assert record.keys() == set(Record._fields) and 0 < record["exact"] < 1
        assert 0 < run["records"][1]["seconds"] < run["records"][2]["seconds"]
        assert {"processor", "jax", "commit"} <= run["made_on"].keys()


def test_arms_of_a_seed_start_from_equal_parameters_and_prompts(path):
    one, other = results_file.read(path)
    assert one["start"] == other["start"] and one["first_rows"] == other["first_rows"]
    assert len(set(one["first_rows"])) == 8
    assert one["records"][0]["exact"] == other["records"][0]["exact"]
    assert one["records"][2]["exact"] != other["records"][2]["exact"]
    assert other["changes"] == one["changes"] | {"update.optimizer.lr": 1e-3}


def test_only_what_the_file_lacks_is_run(path, monkeypatch):
    before = path.read_text()
    monkeypatch.setattr("experiments.arithmetic.run_arm", lambda *args: pytest.fail("ran again"))
    train_arms(path, {"faster": Arm(FASTER), "as it is": Arm(TINY)}, seeds=(0,), every=1)
    assert path.read_text() == before


def test_a_run_with_another_config_is_not_taken_for_this_one(path):
    with pytest.raises(SystemExit, match=r"'faster', seed 0.*remove the run from the file"):
        train_arms(path, {"faster": Arm(TINY)}, seeds=(0,), every=1)


@pytest.mark.parametrize("options, calls", [([], ["train"]), (["--report"], [])])
def test_the_command_trains_only_what_a_report_does_not_need(path, tmp_path, monkeypatch, capsys, options, calls):
    mine, done = tmp_path / "tiny.json", []
    mine.write_text(path.read_text())
    monkeypatch.setattr("experiments.arithmetic.train_arms", lambda *args: done.append("train"))
    monkeypatch.setattr("sys.argv", ["tiny", *options])
    monkeypatch.chdir(tmp_path)
    pool = Pool("few", (1, 2), 20)
    command(
        "Help.", mine, {"as it is": Arm(TINY)}, lambda runs: f"{len(runs)} runs", {"all": ["as it is"]}, (0,), (pool,)
    )
    assert done == calls and capsys.readouterr().out == "2 runs\n" and pool.path.exists() == bool(calls)
    assert mine.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_pool_has_equally_many_sums_of_each_number_of_digits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pool = Pool("few", (1, 2), 20)
    pool.write()
    rows = [json.loads(line) for line in pool.path.read_text().splitlines()]
    digits = [row["prompt"].strip("<>").split("+") for row in rows]
    assert sorted(map(len, digits)) == [1] * 10 + [2] * 10 and len({row["prompt"] for row in rows}) == 20
    assert [row["sum"] for row in rows] == [str(sum(map(int, d))) for d in digits]
    assert all(row["answer"] == row["sum"] + "#" for row in rows) and str(pool.path) == pool.task.path


def test_changes_are_those_from_the_setup():
    assert changes_of(SETUP) == {}
    assert changes_of(dataclasses.replace(SETUP, steps=3)) == {"steps": 3}


def test_the_first_step_costs_what_the_others_do():
    """Seconds 9, 1, 2: the first counts as 1.5, and the sums are 1.5, 2.5, 4.5."""
    records = to_records({0: 0.1, 1: 0.2, 3: 0.4}, [(4, 8, 1, 9.0, 9.0), (4, 7, 0, 1.0, 2.0), (4, 6, 2, 2.0, 2.0)])
    assert records == [
        Record(0, 0, 0, 0, 0, 0, 0.1),
        Record(1, 4, 8, 1, 1.5, 2, 0.2),
        Record(3, 12, 21, 3, 4.5, 6, 0.4),
    ]


def test_the_table_compares_at_equal_updates_and_at_equal_samples():
    """Accuracy n / 10 after n steps. With 5 samples per step, 20 samples are 4 steps; their last quarter has the mean 0.35."""
    records = [Record(n, 5 * n, 0, n // 2, n, n, n / 10)._asdict() for n in range(9)]
    runs = [{"arm": "a", "seed": seed, "records": records} for seed in (0, 1)]
    assert report.table(runs, ["a", "not run"], 8, 20).splitlines()[2:] == [
        "| a | 0.800, 0.800 | 0.800 ± 0.000 | **0.700 ± 0.000** | 40 | 0.5 | 8.0 | 0.400 ± 0.000 | **0.350 ± 0.000** |"
    ]
    assert "| - | **-** |" in report.table(runs, ["a"], 8, 41)
    assert report.budget_table(runs, ["a"], (10, 15)).splitlines()[2:] == ["| a | **0.200** | **0.300** |"]


def test_a_results_file_has_one_run_per_line(path):
    stored = json.loads(path.read_text())
    assert stored["settings"]["every"] == 1 and len(path.read_text().splitlines()) == 4 + len(stored["runs"]) - 1


def test_metrics_of_steps_are_means_and_the_largest():
    """Means of 1 and 3, and of 5 alone; the largest of 2 and 7. What no step had, or was not finite, is left out."""
    steps = [{"a": 1.0, "b": 5.0, "r/max": 2.0, "c": math.inf}, {"a": 3.0, "r/max": 7.0, "c": 1.0}]
    assert over_steps(steps, ("a", "b", "r/max", "c", "d")) == {"a": 2.0, "b": 5.0, "r/max": 7.0}


def test_tables_of_other_numbers():
    """0.1, 0.2, ... 0.9: the last quarter of 8 steps has the mean 0.8. Metrics have no value at step 0."""
    records = [{"step": n, "valid": (n + 1) / 10} | ({"kl": n / 2, "r/max": n} if n else {}) for n in range(9)]
    runs = [{"arm": "a", "records": records}]
    late = report.late_table(runs, ["a"], {"valid": "valid"}).splitlines()
    assert late == ["| arm | valid, each seed | late |", "|---|---|---|", "| a | 0.900 | **0.800** |"]
    mean = report.mean_table(runs, ["a", "not run"], {"kl": "KL", "r/max": "r", "none": "none"}).splitlines()
    assert mean[2:] == ["| a | 2.2 | 8 | - |"]


def test_what_the_clip_cuts_is_counted_among_the_tokens_of_each_sign():
    """With A < 0 one of three is below 0.8, and one above 1.2, where it keeps its gradient; with A > 0 one of two is above.
    The last token is not in the loss."""
    ratio = np.array([[0.7, 1.3, 1.0], [1.3, 0.7, 0.1]])
    advantage = np.array([[-1.0, -1.0, -1.0], [1.0, 1.0, -1.0]])
    mask = np.array([[True, True, True], [True, True, False]])
    assert outside(np.log(ratio), advantage, mask, Clip()) == (pytest.approx(1 / 3), 0.5)
    none, half = outside(np.log(ratio), np.abs(advantage), mask, Clip())
    assert math.isnan(none) and half == 0.4


def test_in_4_bits_a_channel_has_the_values_of_15():
    w = np.random.default_rng(0).normal(size=(40, 3))
    found = np.asarray(to_4_bits(w, (0,)))
    largest = np.abs(w).max(axis=0)
    levels = found / (largest / 7)
    np.testing.assert_allclose(levels, np.round(levels), atol=1e-5)
    assert (np.abs(found - w) <= largest / 14 + 1e-6).all() and len(np.unique(np.round(levels[:, 0]))) <= 15


def test_files_of_sums_hold_out_prompts_and_have_wrong_forms(tmp_path):
    sums = Sums(tmp_path)
    sums.write()
    right, mixed, held_out = (
        [json.loads(x) for x in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("right", "mixed", "held_out")
    )
    assert len(held_out) == 128 and len(right) == 872 and len(mixed) == 8720
    assert not {row["prompt"] for row in held_out} & {row["prompt"] for row in mixed}
    assert all(re.fullmatch(GRAMMAR.pattern, f"{row['response']}#") for row in right + held_out)
    valid = [re.fullmatch(GRAMMAR.pattern, f"{row['response']}#") for row in mixed]
    assert sum(map(bool, valid)) == 872 and max(len(row["response"]) for row in mixed) == 3
    assert all(re.fullmatch(GRAMMAR.pattern, text) for text in VALID) and len(set(VALID)) == 100

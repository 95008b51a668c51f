"""The set-up of the experiments: records are complete, arms of a seed share their start, a results file is continued."""

import dataclasses
import json

import pytest

from experiments import report, results_file
from experiments.arithmetic import SETUP, Arm, Pool, Record, changes_of, command, to_records, train_arms
from jaxrl_llm.model.config import ModelConfig

TINY = dataclasses.replace(
    SETUP,
    steps=2,
    task=dataclasses.replace(SETUP.task, terms=2, held_out=16),
    model=ModelConfig(vocab_size=16, layers=1, d_model=32, heads=8, kv_heads=8, head_dim=8, d_mlp=64),
    warm_start=dataclasses.replace(SETUP.warm_start, steps=40, rows=64, noise=0.0),
    rollout=dataclasses.replace(SETUP.rollout, prompts=8, samples=4),
)
FEWER = dataclasses.replace(TINY, rollout=dataclasses.replace(TINY.rollout, prompts=16, samples=2))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "tiny.json"
    train_arms(path, {"8 x 4": Arm(TINY), "16 x 2": Arm(FEWER)}, seeds=(0,), every=1)
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
    assert other["changes"] == one["changes"] | {"rollout.prompts": 16, "rollout.samples": 2}


def test_only_what_the_file_lacks_is_run(path, monkeypatch):
    before = path.read_text()
    monkeypatch.setattr("experiments.arithmetic.run_arm", lambda *args: pytest.fail("ran again"))
    train_arms(path, {"16 x 2": Arm(FEWER), "8 x 4": Arm(TINY)}, seeds=(0,), every=1)
    assert path.read_text() == before


def test_a_run_with_another_config_is_not_taken_for_this_one(path):
    with pytest.raises(SystemExit, match=r"'16 x 2', seed 0.*remove the run from the file"):
        train_arms(path, {"16 x 2": Arm(TINY)}, seeds=(0,), every=1)


@pytest.mark.parametrize("options, calls", [([], ["train"]), (["--report"], [])])
def test_the_command_trains_only_what_a_report_does_not_need(path, tmp_path, monkeypatch, capsys, options, calls):
    mine, done = tmp_path / "tiny.json", []
    mine.write_text(path.read_text())
    monkeypatch.setattr("experiments.arithmetic.train_arms", lambda *args: done.append("train"))
    monkeypatch.setattr("sys.argv", ["tiny", *options])
    monkeypatch.chdir(tmp_path)
    pool = Pool("few", (1, 2), 20)
    command("Help.", mine, {"8 x 4": Arm(TINY)}, lambda runs: f"{len(runs)} runs", {"all": ["8 x 4"]}, (0,), (pool,))
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

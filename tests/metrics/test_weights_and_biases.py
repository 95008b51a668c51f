"""Weights & Biases: the real package offline, read back from its file, and a fake one that fails in every way."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from jaxrl_llm import train
from jaxrl_llm.config.loading import validate
from jaxrl_llm.config.run_config import to_dict, with_absolute_paths
from jaxrl_llm.config.saved_config import move_old_records
from jaxrl_llm.metrics import weights_and_biases
from jaxrl_llm.metrics.config import MetricsConfig, WandbConfig
from jaxrl_llm.metrics.json_lines import read_jsonl
from jaxrl_llm.metrics.recorder import Recorder
from jaxrl_llm.metrics.weights_and_biases import COLUMNS, MAX_CHARACTERS, MAX_ROWS, run_id

OFFLINE = MetricsConfig(tensorboard=False, wandb=WandbConfig("project", mode="offline", table_every=2, tags=("a", "b")))
ROW = {"uid": 7, "sample": 1, "prompt": "2+3?", "completion": "5", "logprobs": [-0.5], "reward": 1.0, "finish": "eos"}
FAKE = """
import json, os, time
def note(*what):
    with open(os.environ["FAKE_TRACE"], "a") as file:
        file.write(json.dumps(what) + "\\n")
class Settings:
    def __init__(self, **options): pass
class Run:
    offline = False
    def define_metric(self, *names, **options): pass
    def log(self, row, step, commit):
        assert step is None and commit
        note("log", row)
    def finish(self, exit_code): note("finish", exit_code)
def init(settings, **options):
    note("init", options)
    return Run()
def teardown(): note("teardown")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Install a fake wandb with a changed part; returns what reads its calls."""

    def install(change: str = ""):
        package, trace = tmp_path / "fake" / "wandb", tmp_path / "trace"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(FAKE + change)
        monkeypatch.setenv("PYTHONPATH", f"{package.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        monkeypatch.syspath_prepend(package.parent)
        monkeypatch.setenv("FAKE_TRACE", str(trace))
        return lambda kind: [call[1:] for call in read_jsonl(trace) if call[0] == kind] if trace.exists() else []

    return install


def record(run_dir, steps, config=OFFLINE, **options):
    with Recorder(run_dir, config, 10, active=True, **options) as recorder:
        for step in steps:
            recorder.log(step, {"phase": "rl", "reward": step / 10})


def said(capsys) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if "wandb" in line]


def within(seconds, condition) -> bool:
    limit = time.monotonic() + seconds
    while not condition() and time.monotonic() < limit:
        time.sleep(0.02)
    return condition()


def cores(parent: int) -> list[Path]:
    """Processes wandb-core that the process `parent` started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_text(errors="replace").split("\0")
            found += [path] if "wandb-core" in words[0] and f"--pid {parent} " in " ".join(words) else []
    return found


def stored(path):
    """Records of a .wandb file: after seven bytes a log of LevelDB, whose blocks of 32 KiB hold pieces [crc, length, kind]."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, start, whole, found = path.read_bytes(), 7, b"", []
    while start + 7 <= len(content):
        if 2**15 - start % 2**15 < 7:
            start += 2**15 - start % 2**15
            continue
        length, kind = int.from_bytes(content[start + 4 : start + 6], "little"), content[start + 6]
        whole += content[start + 7 : start + 7 + length]
        start += 7 + length
        if kind in (1, 4):  # the whole record, or its last piece
            found.append(Record.FromString(whole))
            whole = b""
    return found


def logged(records):
    """Logged rows, with what wandb adds."""
    rows = [record.history.item for record in records if record.HasField("history")]
    return [{".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items} for items in rows]


def history(records):
    return [{name: value for name, value in row.items() if not name.startswith("_")} for row in logged(records)]


@pytest.fixture(scope="module")
def sessions(tmp_path_factory):
    """A run of three steps, resumed from its checkpoint at step 1: the run directory, and the records of both sessions."""
    pytest.importorskip("wandb")
    run_dir = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HOME", str(run_dir / "home"))
        environment.setenv("WANDB_MODE", "offline")
        given = {"evaluations": lambda step: 0, "run_config": {"seed": 3, "update": {"optimizer": {"lr": 0.25}}}}
        online = MetricsConfig(tensorboard=False, wandb=WandbConfig("project"))
        with Recorder(run_dir, OFFLINE, 9, active=True, **given) as recorder:
            recorder.log(1, {"phase": "warm_start", "loss": 2.0, "eval/exact": 0.5})
            offsets = recorder.offsets()
            recorder.log(2, {"phase": "rl", "reward": 1 / 3, "kl": math.nan, "groups/kept": 4, "warnings": ["w"]})
            recorder.rollouts(2, [ROW, ROW | {"completion": "\ud800" + "y" * 9000, "reward": None}])
            recorder.log(3, {"phase": "rl", "reward": 0.25})
            recorder.rollouts(3, [ROW])
            started = recorder._writers[-1]._process.pid
            assert within(20, lambda: cores(started))
        assert not cores(started)
        with Recorder(run_dir, online, 9, active=True, **given) as recorder:
            recorder.truncate(offsets)
            for step in (2, 3, 4, 1):  # 1: a step that goes back within one session, as W&B sees a resumed online run
                recorder.log(step, {"phase": "rl", "reward": step / 8})
    files = sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    return run_dir, [stored(path) for path in files]


def test_scalars_are_exact_and_have_their_own_step(sessions):
    first, again = (history(records) for records in sessions[1])
    assert [row for row in first if "samples._type" not in row] == [
        {"step": 1, "warm_start/loss": 2.0, "eval/exact": 0.5},
        {"step": 2, "reward": 1 / 3, "groups/kept": 4},
        {"step": 3, "reward": 0.25},
    ]
    # W&B keeps steps that go back, as they are none of its own.
    assert again == [{"step": step, "reward": step / 8} for step in (2, 3, 4, 1)]
    numbers = [row["_step"] for records in sessions[1] for row in logged(records)]
    assert numbers == sorted(set(numbers)) and len(numbers) == 8  # one number per row, over both sessions
    for records in sessions[1]:
        metrics = [r.metric for r in records if r.HasField("metric")]
        assert ["*", "step"] in [[m.glob_name, m.step_metric] for m in metrics]


def test_a_resumed_run_is_the_same_run(sessions):
    run_dir, records = sessions
    runs = [next(r.run for r in session if r.HasField("run")) for session in records]
    assert len(runs) == 2 and {run.run_id for run in runs} == {run_id(run_dir)}
    assert [(run.project, run.display_name) for run in runs] == [("project", run_dir.name)] * 2
    assert list(runs[0].tags) == ["a", "b"]
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert config["seed"] == 3 and config["update"] == {"optimizer": {"lr": 0.25}}
    assert [row["step"] for row in read_jsonl(run_dir / "metrics.jsonl")] == [1, 2, 3, 4, 1]


def test_a_table_of_samples_is_bounded(sessions):
    run_dir, (first, _) = sessions
    (row,) = [row for row in history(first) if row.get("samples._type") == "table-file"]
    assert row["step"] == 2  # every second step, so none at 3
    (path,) = run_dir.glob("wandb/offline-run-*/files/media/table/*.json")
    table = json.loads(path.read_text())
    assert tuple(table["columns"]) == COLUMNS
    short, long = (dict(zip(COLUMNS, cells, strict=True)) for cells in table["data"])
    assert short == {"step": 2, "advantage": None} | {n: v for n, v in ROW.items() if n != "logprobs"}
    assert (
        len(long["completion"]) == MAX_CHARACTERS + 3 and long["completion"].startswith("?y") and long["reward"] is None
    )


def test_tables_have_a_largest_number_of_rows(tmp_path, fake):
    calls = fake("def Table(columns, data, allow_mixed_types): return len(data)")
    with Recorder(tmp_path / "run", OFFLINE, 10, active=True) as recorder:
        recorder.rollouts(2, [ROW] * 500)
    assert calls("log") == [[{"step": 2, "samples": MAX_ROWS}]]


def test_the_package_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    record(tmp_path, [1, 2, 3])
    (line,) = said(capsys)
    assert "pip install 'jaxrl-llm[track]'" in line and "metrics.wandb: null" in line
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 3 and not (tmp_path / "wandb.json").exists()


def test_a_folder_of_that_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert weights_and_biases.why_unavailable()


def test_an_error_while_logging_is_said_once(tmp_path, fake, capsys):
    calls = fake(
        "def log(self, row, **options):\n"
        "    if row['step'] < 4: raise RuntimeError('no\\nroute')\n"
        "    note('log', row)\n"
        "Run.log = log"
    )
    record(tmp_path / "run", [1, 2, 3, 4])
    (line,) = said(capsys)
    assert line == "metrics.wandb: step 1 was not recorded: no; later failures are not shown"
    assert calls("log") == [[{"step": 4, "reward": 0.4}]] and calls("finish") == [[0]]
    assert len(read_jsonl(tmp_path / "run/metrics.jsonl")) == 4


def test_without_a_network_the_run_is_recorded_offline(tmp_path, fake, capsys):
    calls = fake(
        "def init(settings, mode, **options):\n"
        "    note('init', mode)\n"
        "    if mode != 'offline': raise RuntimeError('unreachable')\n"
        "    return Run()"
    )
    record(tmp_path / "run", [1], MetricsConfig(tensorboard=False, wandb=WandbConfig("p")))
    (line,) = said(capsys)
    assert "unreachable" in line and f"wandb sync {tmp_path}/run/wandb" in line
    assert calls("init") == [[None], ["offline"]] and calls("log") == [[{"step": 1, "reward": 0.1}]]
    assert len(calls("teardown")) == 2  # the first attempt has to give the run's id back


def test_a_start_that_fails_is_said_once(tmp_path, fake, capsys):
    fake("def init(**options): raise RuntimeError('full disk')")
    start = time.monotonic()
    record(tmp_path / "run", [1, 2])
    assert said(capsys) == ["metrics.wandb: full disk; nothing more is recorded there"]
    assert (
        time.monotonic() - start < 10
    )  # not CLOSE_S: the process does not wait for the trainer, nor it for the process


def test_an_id_that_cannot_be_stored_is_said(tmp_path, fake, capsys):
    calls = fake()
    (tmp_path / "run/wandb.json.partial").mkdir(parents=True)
    record(tmp_path / "run", [1, 2])
    (line,) = said(capsys)
    assert line.startswith("WeightsAndBiases is left out: ") and calls("init") == []
    assert len(read_jsonl(tmp_path / "run/metrics.jsonl")) == 2


def test_an_upload_that_takes_too_long_is_said(tmp_path, fake, capsys):
    calls = fake("def finish(self, exit_code): raise TimeoutError\nRun.finish = finish")
    record(tmp_path / "run", [1])
    (line,) = said(capsys)
    assert (
        "upload was not finished" in line
        and f"sync --include-online {tmp_path}/run/wandb" in line
        and calls("teardown")
    )


def test_a_failed_run_is_marked(tmp_path, fake):
    calls = fake()
    with pytest.raises(ZeroDivisionError), Recorder(tmp_path / "run", OFFLINE, 10, active=True):
        raise ZeroDivisionError
    assert calls("finish") == [[1]]


def test_neither_a_step_nor_the_end_waits_for_it(tmp_path, fake, capsys, monkeypatch):
    fake("def init(**options): time.sleep(600)")
    monkeypatch.setattr(weights_and_biases, "CLOSE_S", 0.5)
    monkeypatch.setattr(weights_and_biases, "MAX_WAITING", 100_000)
    start = time.monotonic()
    with Recorder(tmp_path / "run", OFFLINE, 10, active=True) as recorder:
        process = recorder._writers[-1]._process
        assert os.getsid(process.pid) == process.pid  # out of reach of Ctrl-C on the terminal
        for step in range(400):  # 8 MB: more than the socket holds
            recorder.log(step, {f"metric_{n}": 0.1 for n in range(1000)})
        assert process.poll() is None
    assert time.monotonic() - start < 20 and process.poll() == -signal.SIGKILL
    assert len(read_jsonl(tmp_path / "run/metrics.jsonl")) == 400
    full, late = said(capsys)
    assert "rows for it are dropped" in full and "not finished after 0.5 s" in late


def test_a_process_that_ends_is_said_once(tmp_path, fake, capsys):
    fake("def init(**options): os._exit(1)")
    with Recorder(tmp_path / "run", OFFLINE, 10, active=True) as recorder:
        recorder._writers[-1]._process.wait(timeout=20)
        for step in range(5):
            recorder.log(step, {"reward": 1.0})
    assert said(capsys) == ["metrics.wandb: its process ended, nothing more is sent to W&B"]


def test_an_interrupt_does_not_end_it(tmp_path, fake, capsys):
    calls = fake()
    with Recorder(tmp_path / "run", OFFLINE, 10, active=True) as recorder:
        assert within(20, lambda: calls("init"))
        os.kill(recorder._writers[-1]._process.pid, signal.SIGINT)
        recorder.log(1, {"reward": 1.0})
    assert calls("log") == [[{"step": 1, "reward": 1.0}]] and said(capsys) == []


def test_a_killed_trainer_leaves_no_process(tmp_path, fake):
    calls = fake()
    code = (
        "import os, sys, pathlib, time\n"
        "from jaxrl_llm.metrics.recorder import Recorder\n"
        "from jaxrl_llm.metrics.config import MetricsConfig, WandbConfig\n"
        "config = MetricsConfig(tensorboard=False, wandb=WandbConfig('p', mode='offline'))\n"
        "with Recorder(pathlib.Path(sys.argv[1]), config, 10, True) as recorder:\n"
        "    recorder.log(1, {'reward': 1.0})\n"
        "    print(recorder._writers[-1]._process.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
        assert within(20, lambda: calls("log") == [[{"step": 1, "reward": 1.0}]])
        trainer.kill()
        pid = int(trainer.stdout.read().splitlines()[-1])
    assert within(20, lambda: calls("teardown")) and calls("finish") == [[1]]
    state = Path(f"/proc/{pid}/stat")
    assert within(20, lambda: not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z")


def test_only_the_active_process_writes(tmp_path, fake):
    calls = fake()
    with Recorder(tmp_path / "run", OFFLINE, 10, active=False) as recorder:
        recorder.log(1, {"reward": 1.0})
        recorder.rollouts(2, [ROW])
    assert not (tmp_path / "run").exists() and calls("init") == []


def test_the_config_of_the_whole_run_is_passed_on(tmp_path, fake):
    calls = fake()
    given = {"project": "p", "name": "n", "entity": "e", "group": "g", "tags": ["t"], "mode": "offline"}
    cfg = validate({"run_dir": str(tmp_path / "run"), "seed": 5, "metrics": {"wandb": given}}, "test")
    with train.context_of(cfg):
        pass
    ((options,),) = calls("init")
    assert options["config"] == json.loads(json.dumps(to_dict(with_absolute_paths(cfg))))
    assert {name: options[name] for name in given} == given and options["dir"] == str(tmp_path / "run")
    assert options["resume"] == "allow"


def test_a_copy_of_a_run_is_a_run_of_its_own(tmp_path):
    run, copy, moved = (tmp_path / name for name in ("run", "copy", "moved"))
    run.mkdir()
    original = run_id(run)
    shutil.copytree(run, copy)
    assert run_id(copy) not in ("", original) and run_id(copy) == run_id(copy)
    os.rename(run, moved)
    assert run_id(moved) == original
    run.mkdir()  # a new run takes the place of the moved one
    assert run_id(run) != original == run_id(moved)
    (tmp_path / "other_name").symlink_to(moved)
    assert run_id(tmp_path / "other_name") == original


@pytest.mark.parametrize("damaged", ["", "\0\0\0", "[]", "{}"])
def test_a_damaged_id_is_made_again(tmp_path, damaged):
    (tmp_path / "wandb.json").write_text(damaged)
    assert len(run_id(tmp_path)) == 12 and run_id(tmp_path) == run_id(tmp_path)


def test_a_run_that_starts_again_at_step_0_is_another(tmp_path):
    before = run_id(tmp_path)
    move_old_records(tmp_path, warn=False)
    assert (tmp_path / "wandb.json.before").exists() and run_id(tmp_path) != before


def test_config():
    adapter = TypeAdapter(MetricsConfig)
    assert adapter.validate_python({"wandb": {"project": "p"}}).wandb == WandbConfig("p")
    assert MetricsConfig().wandb is None
    for wrong in ({}, {"project": ""}, {"project": "p", "mode": "disabled"}, {"project": "p", "nmae": "x"}):
        with pytest.raises(ValidationError):
            adapter.validate_python({"wandb": wrong})

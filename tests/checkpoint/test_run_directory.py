"""Whose a run directory is: locks that hold, a config.yaml that is whole, and what a start that came to nothing leaves."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from jaxrl_llm.checkpoint.run_directory import RunLock
from jaxrl_llm.config import loading, run_config
from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.errors import UserError
from jaxrl_llm.train import context_of

VALUES = {
    "reward": {"workers": 1},
    "metrics": {"tensorboard": False},
    "update": {"optimizer": {"lr": 1e-3}},
}


def config_of(run_dir: Path, **changes) -> RunConfig:
    return loading.validate(VALUES | {"run_dir": str(run_dir)} | changes, "test")


def record(cfg: RunConfig, *, save: bool) -> None:
    """A start of `cfg` that records a step, and saves it or does not."""
    with context_of(cfg) as context:
        context.recorder.log(1, {"phase": "rl", "loss": 0.5})
        if save:
            context.checkpoints.save(1, {"x": np.zeros(1)}, {"offsets": context.recorder.offsets()})


def test_without_lock_a_second_run_is_refused_all_the_same(tmp_path):
    cfg = config_of(tmp_path / "run")
    with context_of(cfg) as context:
        (tmp_path / "run" / "lock").unlink()
        with pytest.raises(UserError, match="run is in use by another process"), context_of(cfg):
            pass
        context.check_lock()
        assert f"pid {os.getpid()} on" in (tmp_path / "run" / "lock").read_text(), "the file is there again"
        with pytest.raises(UserError, match=f"run is in use by pid {os.getpid()}"), context_of(cfg):
            pass
    record(cfg, save=False)


def test_where_directories_cannot_be_locked_a_deleted_lock_ends_the_run(tmp_path, monkeypatch):
    flock = RunLock.__enter__.__globals__["fcntl"].flock

    def only_files(file, how):
        if isinstance(file, int):
            raise OSError(9, "Bad file descriptor")  # as NFS answers
        return flock(file, how)

    monkeypatch.setattr("fcntl.flock", only_files)
    cfg = config_of(tmp_path / "run")
    with context_of(cfg) as context:
        context.check_lock()
        with pytest.raises(UserError, match=f"in use by pid {os.getpid()}"), context_of(cfg):
            pass
        (tmp_path / "run" / "lock").unlink()
        with (
            context_of(cfg),
            pytest.raises(UserError, match=r"lock was deleted or replaced.*what it\s+saved is kept"),
        ):
            context.check_lock()


@pytest.mark.parametrize("replaced", [True, False])
def test_a_run_whose_directory_was_moved_away_ends(tmp_path, replaced):
    with context_of(config_of(tmp_path / "run")) as context:
        (tmp_path / "run").rename(tmp_path / "moved")
        if replaced:
            (tmp_path / "run").mkdir()
        words = "is another directory than at the start" if replaced else "was moved or deleted"
        with pytest.raises(UserError, match=f"run {words}"):
            context.check_lock()


def test_a_start_without_a_checkpoint_may_be_changed(tmp_path, caplog):
    run_dir = tmp_path / "run"
    record(config_of(run_dir), save=False)
    slower = config_of(run_dir, update={"optimizer": {"lr": 1e-4}})
    record(slower, save=True)
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["update"]["optimizer"]["lr"] == 1e-4
    assert caplog.messages == [
        f"{run_dir}: holds no checkpoint, so this run starts at step 0; earlier records are kept as metrics.jsonl.before"
    ]
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 1
    assert len((run_dir / "metrics.jsonl.before").read_text().splitlines()) == 1
    for held in ("1", "corrupt-1"):
        with pytest.raises(UserError, match=r"another config.*\n  update\.optimizer\.lr: 0\.0001 -> 0\.001$"):
            record(config_of(run_dir), save=False)
        if held == "1":
            (run_dir / "checkpoints" / "1").rename(run_dir / "checkpoints" / "corrupt-1")
    shutil.rmtree(run_dir / "checkpoints")
    record(config_of(run_dir), save=False)


def test_an_emptied_config_is_written_anew_and_a_torn_one_is_told(tmp_path, caplog):
    run_dir = tmp_path / "run"
    cfg, path = config_of(run_dir), run_dir / "config.yaml"
    record(cfg, save=True)
    whole, written = path.read_text(), path.stat()
    record(cfg, save=False)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns), "equal: left alone"
    path.write_text("")
    record(cfg, save=False)
    assert path.read_text() == whole
    assert caplog.messages == [f"{path}: got an empty file, so it is written from the config of this command"]
    path.write_text("run_dir: x\nmodel: {vocab_size: 16, lay")
    with pytest.raises(
        UserError, match=rf"not YAML(.|\n)*correct {path}; or remove it, and start with the run's own CONFIG"
    ):
        record(cfg, save=False)
    path.write_text("# mine\nnull\n")
    with pytest.raises(UserError, match=rf"want section: values\ncorrect {path}"):
        record(cfg, save=False)
    path.unlink()
    record(cfg, save=False)
    assert path.read_text() == whole


@pytest.mark.parametrize("what", ["a file", "a link to nothing"])
def test_checkpoints_that_can_be_no_directory_are_reported_before_the_first_step(tmp_path, what):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    if what == "a file":
        (run_dir / "checkpoints").touch()
    else:
        (run_dir / "checkpoints").symlink_to(tmp_path / "gone" / "away")
    with pytest.raises(UserError, match="checkpoints, want a directory that can be made and written"):
        record(config_of(run_dir), save=False)


def test_a_config_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    record(config_of(run_dir), save=True)
    before = (run_dir / "config.yaml").read_text()
    fsync = os.fsync

    def full(handle):
        if "config.yaml" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"run_dir: .*: No space left on device"):
        record(config_of(run_dir, steps=7), save=False)
    assert (run_dir / "config.yaml").read_text() == before
    assert not list(run_dir.glob(".*"))


def test_a_run_directory_holds_absolute_paths_and_equal_places_are_equal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    task = {"kind": "file", "path": "data/train.jsonl", "held_out_path": "link/test.jsonl"}
    record(config_of(Path("run"), task=task, tokenizer={"path": "data"}), save=True)
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["run_dir"] == f"{tmp_path}/run" and saved["tokenizer"]["path"] == f"{tmp_path}/data"
    assert (saved["task"]["path"], saved["task"]["held_out_path"]) == (
        f"{tmp_path}/data/train.jsonl", f"{tmp_path}/link/test.jsonl",
    )  # fmt: skip
    monkeypatch.chdir(tmp_path / "data")
    same = {"kind": "file", "path": "train.jsonl", "held_out_path": "../link/../data/test.jsonl"}
    record(config_of(tmp_path / "run", task=same, tokenizer={"path": "../link"}), save=False)
    with pytest.raises(UserError, match=r"\n  task\.path: .*train\.jsonl' -> .*other\.jsonl'$"):
        record(config_of(tmp_path / "run", task=same | {"path": "other.jsonl"}, tokenizer={"path": "."}), save=False)
    # No directory here, so a name on the hub.
    other = config_of(tmp_path / "hub", model={"path": "org/model"})
    assert run_config.with_absolute_paths(other).model.path == "org/model"


def test_a_record_that_cannot_be_opened_is_reported_in_one_line(tmp_path):
    record(config_of(tmp_path / "run"), save=True)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"run_dir: .*metrics\.jsonl cannot be read or written: Is a directory"):
        record(config_of(tmp_path / "run"), save=False)

"""Ctrl-C and guards: what a run that stops early leaves behind, and from where the next start resumes."""

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxrl_llm import run_context, train
from jaxrl_llm.config import loading
from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.errors import CheckpointError, GradingError, MismatchError, NonFiniteError, Preempted
from jaxrl_llm.metrics.json_lines import read_jsonl
from jaxrl_llm.metrics.recorder import Recorder
from jaxrl_llm.roles import build
from jaxrl_llm.roles.blueprint import Blueprint
from jaxrl_llm.roles.sampler import Sampler
from jaxrl_llm.roles.supervised import Supervised
from jaxrl_llm.roles.updates import Updates
from jaxrl_llm.update.packing import BatchShape

CONFIG = {
    "steps": 6,
    "model": {"vocab_size": 16, "layers": 1, "d_model": 32, "heads": 8, "kv_heads": 8, "head_dim": 8, "d_mlp": 64},
    "warm_start": {"steps": 2, "rows": 8, "noise": 0.5},
    "rollout": {"prompts": 8, "samples": 4, "max_new_tokens": 4},
    "task": {"kind": "arithmetic", "terms": 2, "held_out": 8},
    "reward": {"workers": 1, "grader": "row_graders:odd"},
    "experience": {"filter": "none"},
    # Updates 1 to 7 of RL are sound, the eighth is 10^30 times as long; none after it is finite.
    "update": {"optimizer": {"lr": 1e-3, "final_lr": 1e30, "hold_steps": 7, "decay_steps": 1}},
    "evaluation": {"every": 3},
    "checkpoint": {"every": 1000},
    "metrics": {"tensorboard": False, "samples_every": 0, "rollouts_every": 0},
    "mesh": {"data": 8},
}


def steps(run_dir: Path) -> list[int]:
    return sorted(int(p.name) for p in (run_dir / "checkpoints").iterdir() if p.name.isdigit())


@pytest.fixture(scope="module")
def made() -> dict:
    """Roles that were built once: for their programs nothing compiles twice."""
    return {}


@pytest.fixture
def cfg(made, tmp_path, monkeypatch) -> RunConfig:
    """Config of a run in a directory of its own."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))

    def keep(owner: object, name: str) -> None:
        make = getattr(owner, name)

        def once(*args):
            key = name, *(arg for arg in args if isinstance(arg, BatchShape))
            if key not in made:
                made[key] = make(*args)
            return made[key]

        monkeypatch.setattr(owner, name, once)

    for owner, name in (
        (build, "make_learner"), (build, "make_supervised"), (build, "make_scorer"),
        (Blueprint, "make_engine"),
    ):  # fmt: skip
        keep(owner, name)
    return dataclasses.replace(loading.validate(CONFIG, "test"), run_dir=str(tmp_path / "run"))


def press(monkeypatch, owner: object, name: str, nth: int, times: int = 1) -> None:
    """Ctrl-C at the beginning of the nth call of a stage."""
    stage, calls = getattr(owner, name), []

    def pressed(*args, **kwargs):
        calls.append(1)
        for _ in range(times if len(calls) == nth else 0):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
        return stage(*args, **kwargs)

    monkeypatch.setattr(owner, name, pressed)


@pytest.mark.slow
def test_ctrl_c_finishes_the_step_and_saves_it_whenever_it_comes(cfg, capfd):
    """One run, stopped at five moments: `finishing` is the step it names at once, `left` the one the next start resumes from."""
    run_dir, handler = Path(cfg.run_dir), signal.getsignal(signal.SIGINT)
    moments = [
        ("supervised training", Supervised, "__call__", 2, 2, 2),
        ("sampling", Sampler, "take", 2, 4, 3),
        ("an update", Updates, "__call__", 2, 5, 5),
        ("a save", run_context, "save", 1, 7, 6),
        ("an evaluation", train, "evaluate", 1, 8, None),
    ]
    for moment, owner, name, nth, finishing, left in moments:
        with pytest.MonkeyPatch.context() as patched:
            press(patched, owner, name, nth)
            saving = dataclasses.replace(cfg.checkpoint, every=1 if moment == "a save" else 1000)
            now = dataclasses.replace(cfg, checkpoint=saving)
            if left is None:
                train.train(now)
            else:
                with pytest.raises(Preempted, match=rf"stopped by Ctrl-C after step {left}, saved in .*/run"):
                    train.train(now)
                assert steps(run_dir)[-1] == left, moment
        acknowledged = f"jaxrl: finishing step {finishing}, then saving; Ctrl-C again stops at once\n"
        assert acknowledged in capfd.readouterr().err, moment
        assert signal.getsignal(signal.SIGINT) is handler
    assert steps(run_dir)[-1] == 8
    assert [row["step"] for row in read_jsonl(run_dir / "metrics.jsonl")] == list(range(1, 9)), "none lost, none twice"


@pytest.mark.slow
def test_before_the_first_step_and_the_second_time_ctrl_c_stops_at_once(cfg, monkeypatch):
    run_dir = Path(cfg.run_dir)
    with pytest.MonkeyPatch.context() as patched:
        press(patched, train, "new_params", 1)
        with pytest.raises(KeyboardInterrupt):
            train.train(cfg)
    assert steps(run_dir) == []
    press(monkeypatch, Supervised, "__call__", 2, times=2)
    with pytest.raises(KeyboardInterrupt):
        train.train(cfg)
    assert steps(run_dir) == [] and (run_dir / "metrics.jsonl").stat().st_size > 0


CPU = os.environ | {"JAX_PLATFORMS": "cpu"}
STUCK = """
import hashlib, sys
from jaxrl_llm.checkpoint.stopping import stop_signal
with stop_signal(ends_process=True) as stop:
    if sys.argv[1] == "in a step":
        stop(6)
    print("here", flush=True)
    # As a compilation does, this runs no Python for as long as it takes.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


@pytest.mark.parametrize("where", ["in a step", "starting"])
def test_where_no_python_runs_ctrl_c_is_answered_at_once(where):
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, where], env=CPU, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        if where == "in a step":
            assert process.stderr.readline() == "jaxrl: finishing step 7, then saving; Ctrl-C again stops at once\n"
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
        # Ten times what the slowest needs; the work itself takes many minutes.
        _, err = process.communicate(timeout=10)
        assert (process.returncode, err) == (130, "jaxrl: interrupted\n")
    finally:
        process.kill()


IMPORTING = """
import time
from jaxrl_llm import cli
from jaxrl_llm.roles import inputs

def read(*_, **__):
    # As a callback of JAX does with what is raised while it runs.
    for _ in range(2):
        try:
            print("here", flush=True)
            time.sleep(30)
        except BaseException:
            pass

inputs.read = read
cli.main(["train", "configs/arithmetic.yaml"])
"""


def test_an_import_that_swallows_exceptions_swallows_no_ctrl_c():
    process = subprocess.Popen(
        [sys.executable, "-c", IMPORTING], env=CPU, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
        assert (process.returncode, out, err) == (130, "", "jaxrl: interrupted\n")
    finally:
        process.kill()


SHORT = """
import os, signal, sys, time
from jaxrl_llm.checkpoint.stopping import stop_signal
with stop_signal(ends_process=True, last=2) as stop:
    stop(int(sys.argv[1]))
    os.kill(os.getpid(), signal.SIGINT)
    # In the same breath, before the thread has said anything, the step is over.
    print("stops" if stop(int(sys.argv[1]) + 1) else "continues")
    time.sleep(0.2)
"""


@pytest.mark.parametrize(
    ("done", "words"),
    [(0, "finishing step 1, then saving"), (2, "all steps are done; saving")],
    ids=["between", "last"],
)
def test_ctrl_c_names_the_step_that_ends_and_none_after_the_last(done, words):
    """The finishing step is named, however late; after the last step there is none to finish."""
    ended = subprocess.run(
        [sys.executable, "-c", SHORT, str(done)], env=CPU, capture_output=True, text=True, timeout=60
    )
    assert (ended.stdout, ended.stderr) == ("stops\n", f"jaxrl: {words}; Ctrl-C again stops at once\n")


@pytest.mark.slow
def test_what_graders_end_is_saved_and_what_a_guard_condemns_is_not(cfg, monkeypatch):
    """The same step ends twice: for want of a grade, with a sound state, and for a sampler that is off."""
    fine = train.observe
    for error, at, saved, words in (
        (MismatchError("off"), 2, [], r"off; the next start in .*/run begins again: no step is saved$"),
        (GradingError("no grade"), 2, [4], r"no grade; the next start in .*/run resumes from step 4$"),
        (MismatchError("off"), 3, [4], r"off; the next start in .*/run resumes from step 4$"),
    ):

        def ends(guards, *args, error=error, at=at):
            verdict = fine(guards, *args)
            return verdict._replace(error=error if verdict.guards.seen == at else None)

        monkeypatch.setattr(train, "observe", ends)
        with pytest.raises(type(error), match=words) as caught:
            train.train(cfg)
        assert caught.value.exit_code == 4
        checkpoints = Path(cfg.run_dir) / "checkpoints"
        assert (steps(Path(cfg.run_dir)) if checkpoints.exists() else []) == saved


@pytest.mark.slow
def test_a_disk_too_full_for_the_record_costs_saves_and_then_the_run(cfg, monkeypatch, caplog):
    offsets, failures = Recorder.offsets, []

    def full(self):
        failures.append(1)
        if len(failures) in (1, 2, 5, 6, 7):
            raise OSError(errno.ENOSPC, "No space left on device")
        return offsets(self)

    monkeypatch.setattr(Recorder, "offsets", full)
    cfg = dataclasses.replace(cfg, checkpoint=dataclasses.replace(cfg.checkpoint, every=1))
    with pytest.raises(
        CheckpointError,
        match=r"step 7 was not saved: disk full: .* 3 consecutive saves failed.* steps \[3, 4\] are kept",
    ):
        train.train(cfg)
    warnings = [message for message in caplog.messages if "trying again when the next save is due" in message]
    # The save of step 4 is under way when that of step 5 fails, and is waited for.
    assert len(warnings) == 4 and all("not saved: disk full: " in message for message in warnings)


@pytest.mark.slow
def test_after_divergence_the_last_good_steps_are_kept_and_the_next_start_resumes_from_them(cfg, capsys):
    saving = dataclasses.replace(cfg.checkpoint, every=1, keep=3)
    cfg = dataclasses.replace(cfg, steps=20, checkpoint=saving)
    for _ in range(2):
        with pytest.raises(
            NonFiniteError, match=r"finite: condemned-10; the next start in .*/run resumes from step 9$"
        ):
            train.train(cfg)
        names = sorted(p.name for p in (Path(cfg.run_dir) / "checkpoints").iterdir())
        assert names == ["8", "9", "condemned-10"], "step 7 went when 10 came, which looked good until 11"
    assert "resuming from step 9" in capsys.readouterr().out

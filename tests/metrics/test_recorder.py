import io
import json
import math
import resource
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from jaxrl_llm.errors import UserError
from jaxrl_llm.metrics.config import MetricsConfig
from jaxrl_llm.metrics.json_lines import read_jsonl
from jaxrl_llm.metrics.recorder import Recorder
from jaxrl_llm.metrics.terminal import printable
from jaxrl_llm.metrics.timers import CompileCounter, Timers

QUIET = MetricsConfig(tensorboard=False)


def record(run_dir, steps, config=QUIET, total=10):
    with Recorder(run_dir, config, total, active=True) as recorder:
        for step in steps:
            recorder.log(step, {"phase": "rl", "reward": step / 10})
        return recorder.offsets()


class Terminal(io.StringIO):
    def isatty(self):
        return True


class ClosedPipe(io.StringIO):
    def write(self, text):
        raise BrokenPipeError


def test_config_refuses_what_it_does_not_know():
    adapter = TypeAdapter(MetricsConfig)
    assert adapter.validate_python({"console_every": 5}) == MetricsConfig(console_every=5)
    for wrong in ({"console_evry": 5}, {"samples_every": -1}, {"rollout_groups": -2}, {"console_every": 0}):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)


def test_timers_add_up_and_reset(monkeypatch):
    clock = iter([0.0, 2.0, 10.0, 10.5, 20.0, 23.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    timers = Timers()
    with timers("generate"):
        pass
    with timers("update"):
        pass
    with pytest.raises(ZeroDivisionError), timers("generate"):
        raise ZeroDivisionError
    assert timers.take() == {"time/generate": 5.0, "time/update": 0.5}
    assert timers.take() == {}


def test_compile_counter_counts_a_fresh_program_once():
    import jax

    scale = jax.jit(lambda x: x * 3 + 1)
    x, y = np.ones(5, np.float32), np.ones(6, np.float32)
    counter = CompileCounter()
    scale(x).block_until_ready()
    first = counter.take()
    assert first["compiles"] == 1 and first["time/compile"] > 0
    scale(x).block_until_ready()
    assert counter.take() == {"compiles": 0, "time/compile": 0}
    other = CompileCounter()
    scale(y).block_until_ready()
    assert (counter.take()["compiles"], other.take()["compiles"]) == (1, 1)


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a b 数学 \\frac{1}{2}", "a b 数学 \\frac{1}{2}"),
        ("\x1b[2J\x1b]52;c;x\x07", "\\x1b[2J\\x1b]52;c;x\\x07"),
        ("\x9b31m\x7f\x00", "\\x9b31m\\x7f\\x00"),
        ("one\nstep 2/9\r\t", "one\\nstep 2/9\\r\\t"),
        ("x\u202eevil\u2066\u200f\u061c", "x\\u202eevil\\u2066\\u200f\\u061c"),
        ("\u2028\ud800\U000e0041", "\\u2028\\ud800\\U000e0041"),
    ],
)
def test_printable_escapes_what_moves_or_reorders(text, shown):
    assert printable(text) == shown


def test_printable_cuts_the_middle_in_cells():
    assert printable("0123456789", 10) == "0123456789"
    assert printable("0123456789", 7) == "012…789"
    assert printable("数" * 10, 9) == "数数…数数"
    assert printable("ab", 1) == "…"


def test_one_row_per_step_after_a_kill_and_resume(tmp_path):
    offsets = record(tmp_path, [1, 2, 3])
    record(tmp_path, [4, 5])
    (tmp_path / "metrics.jsonl").open("ab").write(b'{"step": 6, "rew')
    with Recorder(tmp_path, QUIET, 10, active=True) as recorder:
        recorder.truncate(offsets)
        assert recorder.offsets() == offsets
        recorder.log(4, {"reward": 0.4})
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_torn_line_is_dropped_even_without_offsets(tmp_path):
    record(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.open("ab").write('{"step": 3, "note": "数'.encode()[:-1])
    assert [row["step"] for row in read_jsonl(path)] == [1, 2]
    record(tmp_path, [3])
    assert [row["step"] for row in read_jsonl(path)] == [1, 2, 3]


def test_truncate_never_lengthens_and_says_that_rows_are_missing(tmp_path, capsys):
    size = record(tmp_path, [1])["metrics.jsonl"]
    with Recorder(tmp_path, QUIET, 10, active=True) as recorder:
        recorder.truncate({"metrics.jsonl": size + 100, "rollouts.jsonl": 0})
    assert (tmp_path / "metrics.jsonl").stat().st_size == size
    assert f"got {size} bytes, want the checkpoint's {size + 100}" in capsys.readouterr().out


def test_read_jsonl_refuses_damage_before_the_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\x00\x00\n')
    assert read_jsonl(path) == [{"step": 1}]
    path.write_bytes(b'{"step": 1}\nbad\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2: got b'bad"):
        read_jsonl(path)


def test_values_become_plain_json(tmp_path):
    values = {"a": math.nan, "b": np.float32(0.5), "c": np.array(-np.inf), "d": np.int32(7), "phase": "rl"}
    with Recorder(tmp_path, QUIET, 10, active=True) as recorder:
        recorder.log(np.int64(1), values)
        row = {"prompt": "\ud800\n", "logprobs": np.array([-1 / 3, np.nan], np.float32), "reward": None}
        recorder.rollouts(1, [row, row])
    assert read_jsonl(tmp_path / "metrics.jsonl") == [
        {"step": 1, "a": None, "b": 0.5, "c": None, "d": 7, "phase": "rl"}
    ]
    want = {"step": 1, "prompt": "\ud800\n", "logprobs": [-0.333333343, None], "reward": None}
    assert read_jsonl(tmp_path / "rollouts.jsonl") == [want, want]


def test_a_row_is_on_file_before_log_returns(tmp_path):
    with Recorder(tmp_path, QUIET, 10, active=True) as recorder:
        recorder.log(1, {"reward": 1.0})
        assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == '{"step": 1, "reward": 1.0}\n'


def test_a_full_disk_delays_rows_and_tears_none(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Recorder(tmp_path, QUIET, 10, active=True) as recorder:
        recorder.log(1, {"reward": 1.0})
        resource.setrlimit(resource.RLIMIT_FSIZE, (recorder.offsets()["metrics.jsonl"] + 10, hard))
        try:
            recorder.log(2, {"reward": 2.0})
            with pytest.raises(OSError):
                recorder.offsets()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        recorder.log(3, {"reward": 3.0})
    assert [row["reward"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1.0, 2.0, 3.0]


def test_an_inactive_recorder_does_nothing(tmp_path, capsys):
    with Recorder(tmp_path / "run", MetricsConfig(), 10, active=False) as recorder:
        recorder.log(1, {"reward": 1.0})
        recorder.rollouts(1, [{}])
        recorder.samples([{}])
        recorder.message("hello")
        recorder.truncate({"metrics.jsonl": 0})
        assert recorder.offsets() == {} and not recorder.wants(1, every=1)
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_wants_every_nth_step_and_never_at_zero(tmp_path):
    with Recorder(tmp_path, QUIET, 10, active=True) as recorder:
        assert [step for step in range(1, 9) if recorder.wants(step, every=4)] == [4, 8]
        assert not recorder.wants(4, every=0)


def test_console_lines(tmp_path, capsys, monkeypatch):
    clock = iter([100.0, 100.5, 200.0, 200.62, 201.24, 202.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with Recorder(tmp_path, QUIET, 150, active=True) as recorder:
        recorder.log(1, {"phase": "warm_start", "loss": 2.5, "lr": 1e-3})
        recorder.log(2, {"phase": "warm_start", "loss": math.nan})
        recorder.log(11, {"phase": "rl", "reward": 0.4})
        # Samples of the policy itself: 1 but for rounding.
        recorder.log(12, {"phase": "rl", "reward": 0.41, "kl": 0.0012, "tokens_per_s": 5310.4, "ess/sequences": 0.9999})
        recorder.log(13, {"phase": "rl", "reward": 0.41, "unknown": 1.0, "ess/sequences": 0.613})
    assert capsys.readouterr().out.splitlines() == [
        "warm start step 1/150 loss 2.5000",
        "warm start step 2/150 loss nan  0.50 s/step  left 0:01:14",
        "step 11/150 reward 0.400",
        "step 12/150 reward 0.410 kl 1.20e-03 tokens/s 5,310  0.62 s/step  left 0:01:26",
        "step 13/150 reward 0.410 ess 0.61  0.62 s/step  left 0:01:25",
    ]


def test_console_every_keeps_evaluations_and_the_last_step(tmp_path, capsys):
    with Recorder(tmp_path, MetricsConfig(console_every=4, tensorboard=False), 7, active=True) as recorder:
        for step in range(1, 8):
            recorder.log(step, {"eval/exact": 0.5} if step == 2 else {"reward": 0.0})
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["2/7", "4/7", "7/7"]


SAMPLE = {
    "prompt": "2+3? [red]x[/red]",
    "completion": "\x1b[2J5\n",
    "reward": 1.0,
    "advantage": -0.5,
    "logprobs": [-0.25, -0.5],
    "finish": "eos",
}


def test_samples_are_aligned_and_escaped(tmp_path, capsys):
    with Recorder(tmp_path, QUIET, 10, active=True) as recorder:
        recorder.samples([SAMPLE, SAMPLE | {"completion": "数", "reward": None}])
        recorder.message("two\nlines\x1b")
    head, first, second, *message = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert head.split() == ["prompt", "response", "reward", "advantage", "log-prob", "finish"]
    assert first.split("  ")[0].strip() == "2+3? [red]x[/red]"
    assert first.split()[2:] == ["\\x1b[2J5\\n", "1.000", "-0.500", "-0.750", "eos"]
    assert first.index("1.000") == head.index("reward") == second.index("-  ") + 1  # 数 takes two cells, one character
    assert message == ["two", "lines\\x1b"]


def test_a_terminal_gets_a_bar_and_its_stdout_back(tmp_path, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    with Recorder(tmp_path, QUIET, 3, active=True) as recorder:
        recorder.log(1, {"phase": "warm_start", "loss": 2.0})
        recorder.log(2, {"phase": "rl", "reward": 0.25, "eval/exact": 0.5, "tokens_per_s": 99.0})
        recorder.samples([SAMPLE])
        recorder.log(3, {"phase": "rl", "reward": 0.75, "tokens_per_s": 100.0})
    shown = screen.getvalue()
    assert sys.stdout is screen
    assert all(
        part in shown for part in ("warm start", "step 2/3 reward 0.250 exact 0.500", "reward 0.750 tokens/s 100")
    )
    assert "\\x1b[2J5" in shown and "\x1b[2J" not in shown


@pytest.mark.parametrize("screen", [ClosedPipe(), None])
def test_a_closed_stdout_does_not_stop_the_run(tmp_path, monkeypatch, screen):
    monkeypatch.setattr(sys, "stdout", screen)
    record(tmp_path, [1, 2, 3])
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 3


def test_a_closed_pipe_leaves_the_exit_status_alone(tmp_path):
    code = (
        "import sys, pathlib; from jaxrl_llm.metrics.recorder import *; from jaxrl_llm.metrics.config import MetricsConfig\n"
        "with Recorder(pathlib.Path(sys.argv[1]), MetricsConfig(tensorboard=False), 500, True) as r:\n"
        "    for i in range(500): r.log(i, {'reward': 1.0})\n"
        "assert 'jax' not in sys.modules\n"
        "sys.exit(75)"
    )
    command = [sys.executable, "-X", "warn_default_encoding", "-W", "error::EncodingWarning", "-c", code, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(30) == 75, errors
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 500


def test_tensorboard_gets_numbers_by_phase(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    with Recorder(tmp_path, MetricsConfig(), 10, active=True) as recorder:
        recorder.log(1, {"phase": "warm_start", "loss": 2.0})
        recorder.log(5, {"phase": "rl", "reward": 0.5, "eval/pass@1": 0.25, "kl": math.nan})
    written = {}
    for path in (tmp_path / "tensorboard").rglob("events*"):
        content, start = path.read_bytes(), 0
        while start < len(content):
            (length,) = struct.unpack_from("<Q", content, start)
            event = Event.FromString(content[start + 12 : start + 12 + length])
            written |= {(path.parent.name, event.step, value.tag): value.simple_value for value in event.summary.value}
            start += length + 16
    assert written == {("warm_start", 1, "loss"): 2.0, ("rl", 5, "reward"): 0.5, ("rl", 5, "eval/pass@1"): 0.25}


def test_a_missing_tensorboard_is_said_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    record(tmp_path / "a", [1, 2, 3], config=MetricsConfig())
    lines = [line for line in capsys.readouterr().out.splitlines() if "tensorboard" in line]
    assert len(lines) == 1 and "tensorboardX" in lines[0] and "pip install 'jaxrl-llm[track]'" in lines[0]
    assert not (tmp_path / "a/tensorboard").exists() and len(read_jsonl(tmp_path / "a/metrics.jsonl")) == 3
    record(tmp_path / "b", [1], config=QUIET)
    with Recorder(tmp_path / "c", MetricsConfig(), 1, active=False) as recorder:
        recorder.log(1, {"loss": 1.0})
    assert "tensorboard" not in capsys.readouterr().out and not (tmp_path / "c").exists()


def test_json_lines_are_ascii(tmp_path):
    with Recorder(tmp_path, QUIET, 10, active=True) as recorder:
        recorder.rollouts(1, [{"completion": "数\u2028"}])
    (line,) = (tmp_path / "rollouts.jsonl").read_bytes().splitlines()
    assert line.isascii() and json.loads(line)["completion"] == "数\u2028"

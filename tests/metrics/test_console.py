"""Console output: on terminals of any width one line with step and time, and long activities are shown."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress

import pytest
from rich.cells import cell_len

from jaxrl_llm.config.loading import validate
from jaxrl_llm.metrics import console
from jaxrl_llm.metrics.config import MetricsConfig
from jaxrl_llm.metrics.console import Progress, status_line, wrapped
from jaxrl_llm.metrics.pace import Pace
from jaxrl_llm.metrics.recorder import Recorder

LONG = Progress(
    "warm start", 123_456, 1_000_000, ("reward 0.971", "tokens/s 127,542"), "12.22 s/step", "left 5 days, 23:59:59"
)
WIDTHS = (39, 40, 59, 60, 79, 80, 119, 120)


@pytest.mark.parametrize("width", WIDTHS)
def test_step_and_time_left_stand_on_a_line_of_any_width(width):
    found = status_line(LONG, "", 0.0, width)
    assert "123456/1000000" in found and "left 5 days, 23:59:59" in found
    assert cell_len(found) <= width


@pytest.mark.parametrize("width", WIDTHS)
def test_step_and_elapsed_time_stand_beside_what_is_done(width):
    found = status_line(LONG, "evaluating 数学数学数学数学数学数学数学 held-out prompts", 3725.9, width)
    assert "123456/1000000" in found and found.endswith(" 1:02:05") and "evaluating" in found
    assert cell_len(found) <= width


def test_lines_by_hand():
    """The widest line has all. In the order in which they go: the bar, the phase, the speed, the last number, the first."""
    at = Progress("rl", 25, 100, ("reward 0.500", "tokens/s 900"), "0.50 s/step", "left 0:00:38")
    # 2 + 1 + 6 + 1 + 12 + 1 + 12 + 1 + 11 + 1 + 12 = 60 cells; the bar takes 3 more than it has places.
    assert status_line(at, "", 0, 59) == "25/100 reward 0.500 tokens/s 900 0.50 s/step left 0:00:38"
    assert (
        status_line(at, "", 0, 60)
        == status_line(at, "", 0, 70)
        == "rl 25/100 reward 0.500 tokens/s 900 0.50 s/step left 0:00:38"
    )
    assert status_line(at, "", 0, 71) == "rl [##......] 25/100 reward 0.500 tokens/s 900 0.50 s/step left 0:00:38"
    assert status_line(at, "", 0, 56) == "25/100 reward 0.500 tokens/s 900 left 0:00:38"
    assert status_line(at, "", 0, 40) == "25/100 reward 0.500 left 0:00:38"
    assert status_line(at, "", 0, 31) == "25/100 left 0:00:38"
    assert status_line(at, "saving step 25", 7, 29) == "25/100 saving step 25 0:00:07"
    assert status_line(at, "saving step 25", 7, 20) == "25/100 savin 0:00:07"
    assert status_line(None, "making the model", 61, 80) == "making the model 0:01:01"
    assert status_line(None, "", 0, 80) == "" and len(status_line(at, "", 0, 1)) == 1


def test_time_left_counts_the_evaluations_to_come(monkeypatch):
    """Steps of 2 s, an evaluation of 50 s in the third: 7 steps and 2 evaluations are 114 s. Counted as a step's it would be
    more than three times as long."""
    clock = iter([0.0, 2.0, 54.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    pace = Pace()
    pace.stepped("rl", 1)
    assert pace.in_words("rl", 10, 2) == ("", "")
    pace.stepped("rl", 2)
    pace.evaluated(50.0)
    pace.stepped("rl", 3)
    assert pace.in_words("rl", 10, 2) == ("2.00 s/step", "left 0:01:54")
    assert pace.in_words("rl", 10, 0) == ("2.00 s/step", "left 0:00:14")


@pytest.mark.parametrize(
    ("step", "to_come"),
    # Before RL (after 3 supervised steps), after 4 and 8 steps of RL, and after the tenth and last.
    [(0, 4), (2, 4), (3, 3), (6, 3), (7, 2), (10, 2), (11, 1), (12, 1), (13, 0)],
)
def test_evaluations_to_come_by_hand(step, to_come):
    values = {"steps": 10, "warm_start": {"steps": 3}, "evaluation": {"every": 4}}
    assert validate(values, "test").evaluations_after(step) == to_come


def test_a_number_stays_beside_its_name_where_a_line_is_wrapped():
    parts = ["step 7/9", "loss 0.1000", "reward 0.500", " 0.20 s/step", " left 0:00:01"]
    assert wrapped(parts, None) == "step 7/9 loss 0.1000 reward 0.500  0.20 s/step  left 0:00:01"
    assert wrapped(parts, 33) == "step 7/9 loss 0.1000 reward 0.500\n0.20 s/step  left 0:00:01"
    assert wrapped(parts, 32) == "step 7/9 loss 0.1000\nreward 0.500  0.20 s/step\nleft 0:00:01"
    assert wrapped(parts, 1).splitlines() == [part.strip() for part in parts]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def hasty(monkeypatch):
    """A short activity is shown too."""
    for name, seconds in (("TICK", 0.01), ("SHOWN_AFTER", 0.02), ("PRINTED_AFTER", 0.05)):
        monkeypatch.setattr(console, name, seconds)


def wait_for(words: str, stream: io.StringIO, more_than: int = 0) -> None:
    end = time.monotonic() + 10
    while stream.getvalue().count(words) <= more_than:
        assert time.monotonic() < end, stream.getvalue()
        time.sleep(0.005)


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_what_lasts_is_said_while_it_happens_and_once(tmp_path, monkeypatch, hasty, term):
    """On a terminal beside the clock; in a plain log a line for each evaluation, and one for the first of what every step does."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", "60")
    config = MetricsConfig(tensorboard=False)
    with Recorder(tmp_path, config, 2, active=True) as recorder:
        for step in (1, 2):
            with recorder.during("updating", first="compiling the update"):
                words = "compiling the update" if step == 1 else "updating"
                if step == 1 or term == "xterm":
                    wait_for(words, stream)
                else:
                    time.sleep(0.2)
            recorder.log(step, {"phase": "rl", "reward": 0.5})
            with recorder.evaluating("evaluating 128 held-out prompts"):
                wait_for("evaluating", stream, more_than=stream.getvalue().count("evaluating"))
    shown = stream.getvalue()
    if term == "dumb":
        evaluating, step = "evaluating 128 held-out prompts ...", "step {}/2 reward 0.500"
        lines = [text.partition("  ")[0].removesuffix(" 0.00 s/step").strip() for text in shown.splitlines()]
        want = ["compiling the update ...", step.format(1), evaluating, step.format(2), evaluating]
        assert [re.sub(r" \d+\.\d\d s/step.*", "", text) for text in lines] == want
    else:
        assert re.search(r"1/2 evaluating 128 held-out prompts 0:00:0\d", shown)


def test_commands_that_answer_on_stdout_say_what_lasts_on_stderr(capsys, hasty):
    with console.shown_on_stderr("compiling decode, update"):
        time.sleep(0.2)
    assert capsys.readouterr() == ("", "compiling decode, update ...\n")


def test_a_broken_pipe_under_the_clock_silences_and_does_not_stop(tmp_path, monkeypatch, hasty):
    class Pipe(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Pipe())
    with Recorder(tmp_path, MetricsConfig(tensorboard=False), 2, active=True) as recorder:
        with recorder.during("compiling the update"):
            time.sleep(0.2)
        recorder.log(1, {"reward": 1.0})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "reward": 1.0}\n'


SCRIPT = """
import sys, time
from jaxrl_llm.metrics import console
from jaxrl_llm.metrics.config import MetricsConfig
from jaxrl_llm.metrics.recorder import Recorder
console.TICK = console.SHOWN_AFTER = 0.01
row = {"prompt": "数学" * 30, "completion": "x 数学\\x1b[2J" * 20, "reward": 1.0, "advantage": -0.5, "logprobs": [-1.0]}
with Recorder(sys.argv[1], MetricsConfig(tensorboard=False), 1300, True) as recorder:
    for step in (1, 2, 3):
        with recorder.during("compiling the update of the warm start"):
            time.sleep(0.05)
        recorder.log(step, {"phase": "warm_start", "loss": 1.5, "eval/exact": 0.5, "entropy": 1.0, "grad_norm": 2.0})
        recorder.samples([row, row])
"""


@pytest.mark.parametrize("columns", [40, 1])
def test_on_a_terminal_of_few_columns_nothing_wraps(tmp_path, columns):
    """A pseudo-terminal, samples in Chinese above the line; lines are what stands between the cursor's returns."""
    main, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | {"TERM": "xterm"}
    run = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], stdin=end, stdout=end, stderr=end, env=environment
    )
    os.close(end)
    read = b""
    with suppress(OSError):  # the other end was closed
        while part := os.read(main, 65536):
            read += part
    os.close(main)
    assert run.wait(30) == 0, read
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", read.decode())
    lines = [part for part in re.split(r"[\r\n]+", text) if part]
    if columns == 1:
        return
    assert max(map(cell_len, lines)) <= columns
    assert any(part.startswith("3/1300") and " left " in part for part in lines)
    assert any(re.fullmatch(r"2/1300 compiling the upd.* 0:00:00", part) for part in lines)
    assert "数学" in text and "│ 1.000  │" in text and "advantage" not in text

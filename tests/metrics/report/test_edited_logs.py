"""`jaxrl report` of logs that were cut, edited or spoiled: a page of what can be read, and a word about what cannot."""

import errno
import html
import json
import os
import random
import re

import pytest
from test_build import METRICS, Page, rollout, write

from jaxrl_llm import cli

DEEP = "[" * 100_000
HUGE = "9" * 400


@pytest.fixture
def run_dir(tmp_path):
    write(tmp_path / "metrics.jsonl", METRICS)
    write(tmp_path / "rollouts.jsonl", [rollout(step, sample) for step in (1, 2) for sample in (0, 1)])
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    return tmp_path


def report(run_dir, *args) -> str:
    """The page, which is whole: every tag is closed, no coordinate is none."""
    assert cli.main(["report", str(run_dir), *map(str, args)]) == 0
    out = args[-1] if args else run_dir / "report.html"
    text = out.read_text(encoding="utf-8")
    assert Page(text).open == []
    plotted = " ".join(re.findall(r'(?: d| x| x1| y| y1| width)="([^"]*)"', text))
    assert "nan" not in plotted and "inf" not in plotted
    return html.unescape(text)


def insert(path, number: int, line: str | bytes) -> None:
    """As the `number`th line, counted from 1."""
    lines = path.read_bytes().splitlines(keepends=True)
    new = line.encode("utf-8", "surrogatepass") if isinstance(line, str) else line
    path.write_bytes(b"".join([*lines[: number - 1], new + b"\n", *lines[number - 1 :]]))


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("oops", "not JSON"),
        ('{"step": 2, "reward": 0.5', "not JSON"),
        (b"\xff\xfe\x00\x80", "not JSON"),
        (DEEP, "not JSON"),
        (f'{{"step": {"9" * 5000}}}', "not JSON"),
        ("[1, 2]", "got [1, 2], want an object, {...}"),
        ("null", "got null, want an object, {...}"),
        ('"text"', 'got "text", want an object, {...}'),
        ('{"reward": 1.0}', "step: got nothing, want a whole number, 0 or more"),
        ('{"step": null}', "step: got null, want a whole number, 0 or more"),
        ('{"step": "2"}', 'step: got "2", want a whole number, 0 or more'),
        ('{"step": 2.5}', "step: got 2.5, want a whole number, 0 or more"),
        ('{"step": true}', "step: got true, want a whole number, 0 or more"),
        ('{"step": -1}', "step: got -1, want a whole number, 0 or more"),
        ('{"step": NaN}', "step: got NaN, want a whole number, 0 or more"),
        ('{"step": 1e999}', "step: got Infinity, want a whole number, 0 or more"),
        (f'{{"step": {HUGE}}}', f"step: got {'9' * 60}..., want a whole number, 0 or more"),
        ('{"step": 2, "reward": "0.5"}', 'reward: got "0.5", want a number'),
        ('{"step": 2, "reward": {"mean": 1}}', 'reward: got {"mean": 1}, want a number'),
        ('{"step": 2, "eval/exact": [1]}', "eval/exact: got [1], want a number"),
        ('{"step": 2, "time/update": "fast"}', 'time/update: got "fast", want a number'),
        ('{"step": 2, "loss": false}', "loss: got false, want a number"),
        ('{"step": 2, "warnings": "w"}', 'warnings: got "w", want a list of texts'),
        ('{"step": 2, "warnings": [1]}', "warnings: got [1], want a list of texts"),
    ],
)
def test_a_line_of_metrics_that_is_no_row_is_left_out_and_named(run_dir, caplog, line, why):
    insert(run_dir / "metrics.jsonl", 3, line)
    insert(run_dir / "metrics.jsonl", 6, line)
    page = report(run_dir)
    assert f"2 lines are left out; the first: {run_dir}/metrics.jsonl:3: {why}" in page
    assert caplog.messages == [f"2 lines are left out; the first: {run_dir}/metrics.jsonl:3: {why}"]
    # The rest is there: reward 0, 0.5 and 1 at steps 1, 2 and 3.
    assert 'd="M46.0 150.0h0L189.0 82.4L332.0 14.8"' in page


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"step": "x"}, 'step: got "x"'),
        ({"tokens": "5"}, 'tokens: got "5", want a list of texts'),
        ({"tokens": [5]}, "tokens: got [5], want a list of texts"),
        ({"logprobs": 1}, "logprobs: got 1, want a list of numbers"),
        ({"logprobs": ["-1"]}, 'logprobs: got "-1", want a number'),
        ({"entropy": [[]]}, "entropy: got [], want a number"),
        ({"reward": "1"}, 'reward: got "1", want a number'),
        ({"advantage": []}, "advantage: got [], want a number"),
        ({"uid": [7]}, "uid: got [7], want a whole number"),
        ({"sample": {}}, "sample: got {}, want a whole number"),
        ({"prompt": ["a"]}, 'prompt: got ["a"], want text'),
        ({"completion": 5}, "completion: got 5, want text"),
        ({"sampled": [1]}, "sampled: got [1], want a list of true and false"),
        ({"num_allowed": ["2"]}, 'num_allowed: got "2", want a number'),
        ({"allowed": "0 1"}, 'allowed: got "0 1", want a list of lists of texts'),
        ({"allowed": [["0", 1]]}, 'allowed: got ["0", 1], want a list of texts'),
        ({"finish": None}, "finish: got null, want text"),
    ],
)
def test_a_line_of_rollouts_that_is_no_response_is_left_out_and_named(run_dir, caplog, changes, why):
    insert(run_dir / "rollouts.jsonl", 2, json.dumps(rollout(1) | changes))
    page = report(run_dir)
    (said,) = caplog.messages
    assert said.startswith(f"1 line is left out; the first: {run_dir}/rollouts.jsonl:2: {why}") and said in page
    assert page.count("<tr><td>") == 4


def test_numbers_that_are_not_finite_or_too_large_are_gaps(run_dir, caplog):
    rows = [f'{{"step": {4 + n}, "reward": {x}}}' for n, x in enumerate(("NaN", "Infinity", "-1e999", HUGE, "1e300"))]
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write("\n".join([*rows, '{"step": 9, "reward": 1.0}']) + "\n")
    page = report(run_dir)
    # Step 3 is a quarter of the way from 1 to 9, and the one at 9 stands by itself.
    assert 'd="M46.0 150.0h0L81.8 82.4L117.5 14.8M332.0 14.8h0"' in page and caplog.messages == []


def test_the_smallest_and_the_largest_numbers_can_be_plotted(run_dir):
    for values in (["5e-324", "1e-323", "0"], ["1e99", "-1e99"], ["1e16", "10000000000000002"], ["-5e-324"]):
        rows = [f'{{"step": {n}, "reward": {x}, "time/a": {x}}}\n' for n, x in enumerate(values)]
        (run_dir / "metrics.jsonl").write_text("".join(rows))
        report(run_dir)
    write(run_dir / "metrics.jsonl", [{"step": 0, "loss": 1.0}, {"step": 2**53 - 1, "loss": 2.0}])
    report(run_dir)
    write(run_dir / "rollouts.jsonl", [rollout(1, reward=1e99, logprobs=[1e99, -1e99])])
    assert "1e+99" in report(run_dir)


def test_steps_that_go_back_are_plotted_in_their_order_and_omissions(run_dir, caplog):
    rows = [{"step": step, "reward": step / 4} for step in (1, 4, 2, 3)]
    write(run_dir / "metrics.jsonl", rows)
    page = report(run_dir)
    # Thirds of the 286 units between 46 and 332.
    xs = re.findall(r'd="M([\d.]+) [\d.]+h0L([\d.]+) [\d.]+L([\d.]+) [\d.]+L([\d.]+) ', page)[0]
    assert xs == ("46.0", "141.3", "236.7", "332.0")
    line = f"1 line is out of order, shown in the order of steps; the first: {run_dir}/metrics.jsonl:3: step 2 after step 4"
    assert caplog.messages == [line] and line in page
    assert "<dt>step</dt><dd>4</dd>" in page


def test_a_step_that_stands_twice_is_plotted_twice(run_dir, caplog):
    write(run_dir / "metrics.jsonl", [{"step": step, "reward": reward} for step, reward in ((1, 0), (1, 1), (2, 0))])
    assert 'd="M46.0 150.0h0L46.0 14.8L332.0 150.0"' in report(run_dir) and caplog.messages == []


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"step": 1, "rew', b"\x00" * 5000, bytes(range(256)) * 9])
def test_files_without_a_row_have_a_page(run_dir, content):
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        (run_dir / name).write_bytes(content)
    page = report(run_dir)
    assert "No step has been logged yet." in page and "No rollouts were recorded." in page
    assert ("left out" in page) == bool(content.strip())


def test_a_run_that_only_warmed_up(run_dir):
    write(run_dir / "metrics.jsonl", METRICS[:1])
    page = report(run_dir)
    assert "<h2>Warm start</h2>" in page and "<h2>Training</h2>" not in page


def test_config_missing_spoiled_or_a_directory(run_dir):
    config = run_dir / "config.yaml"
    config.write_bytes(b"\xff\xfe seed: {[ <script>\x1b[31m")
    page = report(run_dir)
    assert "\ufffd\ufffd seed: {[ <script>\\x1b[31m" in page
    assert "<script" not in (run_dir / "report.html").read_text()
    config.unlink()
    assert "<h2>Config</h2>" not in report(run_dir)
    config.mkdir()
    (run_dir / "rollouts.jsonl").unlink()
    (run_dir / "rollouts.jsonl").mkdir()
    assert "<h2>Config</h2>" not in report(run_dir)


def test_lone_surrogates_and_markup_anywhere_do_not_break_the_page(run_dir):
    bad = "\ud800<u>\u202e"
    row = {"step": 4, f"time/{bad}": 1.0, "phase": bad, "warnings": [bad], bad: bad}
    write(run_dir / "metrics.jsonl", [*METRICS, row])
    texts = {name: bad for name in ("prompt", "completion", "finish", "sample", "uid")}
    write(run_dir / "rollouts.jsonl", [rollout(4, **texts | {"tokens": None}), {"step": bad}])
    page = report(run_dir)
    assert "<u>" not in (run_dir / "report.html").read_text() and "\u202e" not in page
    # The timer and its hover text, the warning; prompt, token (its title too), finish and sample.
    assert page.count("\\ud800<u>\\u202e") >= 7


def test_fuzz(run_dir, caplog):
    """Whole files mutated byte by byte, line by line and value by value: a page each time."""
    rng = random.Random(0)
    files = {name: (run_dir / name).read_bytes() for name in ("metrics.jsonl", "rollouts.jsonl", "config.yaml")}
    values = [
        "null",
        "true",
        '"x"',
        "[]",
        "{}",
        "[null]",
        "-1",
        "0.5",
        "NaN",
        "-Infinity",
        "1e400",
        HUGE,
        '"\\ud800"',
        "[[1]]",
    ]
    for _ in range(100):
        for name, content in files.items():
            lines = content.splitlines(keepends=True)
            for _ in range(rng.randrange(4)):
                at, kind = rng.randrange(len(lines)), rng.randrange(5)
                line = lines[at]
                if kind == 0 and line:
                    where = rng.randrange(len(line))
                    line = line[:where] + bytes([rng.randrange(256)]) + line[where + rng.randrange(3) :]
                elif kind == 1:
                    line = line[: rng.randrange(len(line) + 1)]
                elif kind == 2:
                    line = b""
                elif kind == 3:
                    line = line + line
                else:
                    new = rng.choice(values).encode()
                    line = re.sub(rb'(?<=": )[^,\[\]{}]+', lambda m, new=new: new if rng.random() < 0.3 else m[0], line)
                lines[at] = line
            (run_dir / name).write_bytes(b"".join(lines))
        report(run_dir)


def test_the_page_goes_where_it_is_sent(run_dir, tmp_path_factory):
    """And nothing is written into the run directory."""
    before = sorted(run_dir.iterdir())
    out = tmp_path_factory.mktemp("elsewhere") / "new" / "page.html"
    assert "<h2>Training</h2>" in report(run_dir, "--out", out)
    assert sorted(run_dir.iterdir()) == before and list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts.jsonl", "config.yaml", "."])
def test_the_page_never_takes_the_place_of_what_it_is_made_of(run_dir, capsys, name):
    before = {path: path.read_bytes() for path in run_dir.iterdir()}
    assert cli.main(["report", str(run_dir), "--out", str(run_dir / name)]) == 2
    assert f"--out: got {run_dir / name}, want a file to write" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run_dir.iterdir()} == before


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_a_place_that_cannot_be_written_keeps_the_older_page(run_dir, capsys, monkeypatch, code):
    (run_dir / "report.html").write_text("older")
    before = sorted(run_dir.iterdir())

    def refuse(source, target):
        raise OSError(code, os.strerror(code), source, None, target)

    monkeypatch.setattr(os, "replace", refuse)
    assert cli.main(["report", str(run_dir)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"jaxrl: {run_dir}/report.html: {os.strerror(code)}")
    assert said.endswith("--out FILE puts the page elsewhere")
    assert (run_dir / "report.html").read_text() == "older" and sorted(run_dir.iterdir()) == before


def test_a_place_below_a_file(run_dir, capsys):
    out = run_dir / "config.yaml" / "page.html"
    assert cli.main(["report", str(run_dir), "--out", str(out)]) == 2
    assert f"jaxrl: {out}: " in capsys.readouterr().err

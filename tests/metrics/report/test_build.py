import json
import math
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from jaxrl_llm.errors import UserError
from jaxrl_llm.metrics.report.build import Frame, build, draw_charts, find_ticks, format_number, thin
from jaxrl_llm.metrics.report.stages import stage_lines

METRICS = [
    {"step": 1, "phase": "warm_start", "loss": 2.0, "lr": 1e-3},
    {
        "step": 1,
        "phase": "rl",
        "reward": 0.0,
        "entropy": 1.5,
        "time/generate": 3.0,
        "time/update": 1.0,
        "time/compile": 9.0,
    },
    {"step": 2, "phase": "rl", "reward": 0.5, "entropy": None, "time/generate": 1.0, "time/update": 1.0},
    {"step": 3, "phase": "rl", "reward": 1.0, "entropy": 0.5, "eval/exact": 0.75, "tokens_per_s": 5310.4},
]
EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


def rollout(step, sample=0, **changes):
    row = {"step": step, "uid": 7, "sample": sample, "prompt": "2 + 3 =", "completion": "5", "tokens": ["5", "<eos>"]}
    row |= {"logprobs": [-0.1, -6.5], "entropy": [0.2, 0.0], "reward": 1.0, "advantage": 0.5, "finish": "eos"}
    return row | changes


@pytest.fixture
def run_dir(tmp_path):
    write(tmp_path / "metrics.jsonl", METRICS)
    write(tmp_path / "rollouts.jsonl", [rollout(step, sample) for step in (1, 2, 3, 4) for sample in (0, 1)])
    (tmp_path / "config.yaml").write_text("seed: 1  # <数>\n", encoding="utf-8")
    return tmp_path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class Page(HTMLParser):
    """Tags with their attributes and text, and whether every tag was closed in order."""

    VOID = frozenset({"meta", "line", "rect", "path", "br"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID or tag == "rect":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def parse(path):
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


def test_page_holds_charts_rollouts_and_config(run_dir):
    out = build(run_dir)
    assert out == run_dir / "report.html" and not list(run_dir.glob("*.part"))
    page = parse(out)
    headings = [text for text in page.texts if text in ("Training", "Warm start", "Rollouts", "Config")]
    assert headings == ["Training", "Warm start", "Rollouts", "Config"]
    labels = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert labels == [
        f"{title} over steps"
        for title in ("reward", "evaluation", "entropy (nats)", "tokens/s", "shares of time", "loss", "learning rate")
    ]
    assert [text for text in page.texts if text.startswith("Step ")] == ["Step 4", "Step 3", "Step 2"]
    assert "seed: 1  # <数>\n" in page.texts
    tokens = [attrs for tag, attrs in page.tags if tag == "span" and "title" in attrs]
    assert len(tokens) == 3 * 2 * 2
    assert tokens[0] == {"class": "l0", "title": "token “5”\nlog-prob -0.100 (p 0.905)\nentropy 0.200"}
    assert tokens[1]["class"] == "l9"


CONTROLLED = {
    "sampled": [False, True],
    "num_allowed": [1, 10_000],
    "allowed": [["5"], ["a", "<b>", "\u202e"]],
}


def test_a_tree_is_drawn_below_what_its_branches_left(run_dir):
    """Response 2 leaves 0 before its second token, with the first one in common; rewards 1 and 0 behind it."""
    rows = [rollout(4, 0, reward=0.0), rollout(4, 1, reward=0.0), rollout(4, 2, reward=1.0, trunk=0, fork=1)]
    write(run_dir / "rollouts.jsonl", rows)
    page = parse(build(run_dir))
    tokens = [attrs for tag, attrs in page.tags if tag == "span" and "title" in attrs]
    assert len(tokens) == 2 + 1 + 2, "the shared token is shown once"
    assert tokens[1]["class"].endswith(" left") and not tokens[2]["class"].endswith(" left")
    assert tokens[1]["title"].endswith("left before it, with the mean reward behind: 2: 1.000; here: 0.000")
    assert [text for text in page.texts if text in ("↳ 2", "1 token of sample 0")] == ["↳ 2", "1 token of sample 0"]
    assert "other responses left before this token" in "".join(page.texts)


def test_trees_in_an_edited_file_end(run_dir):
    """Circles, trunks that are missing, and numbers twice."""
    odd = [rollout(4, 1, trunk=2, fork=1), rollout(4, 2, trunk=1, fork=1), rollout(4, 3, trunk=9, fork=0)]
    odd += [rollout(4, n, trunk=n - 1, fork=1) for n in range(4, 20) for _ in range(2)]
    write(run_dir / "rollouts.jsonl", odd)
    page = parse(build(run_dir))
    assert sum(tag == "tr" for tag, _ in page.tags) < 3 * len(odd)
    write(run_dir / "rollouts.jsonl", [rollout(4, 1, trunk="0", fork=1)])
    assert any("trunk: got" in text for text in parse(build(run_dir)).texts)


def test_forced_tokens_and_what_was_allowed_are_shown(run_dir):
    write(
        run_dir / "rollouts.jsonl",
        [rollout(4, **CONTROLLED), rollout(4, 1, num_allowed=[None, 1], allowed=[None, ["#"]])],
    )
    page = parse(build(run_dir))
    tokens = [attrs for tag, attrs in page.tags if tag == "span" and "title" in attrs]
    assert [attrs["class"] for attrs in tokens] == ["lnone forced", "l9", "l0", "l9 single"]
    # Nothing was drawn, so the recorded log-prob of 0 says nothing.
    assert tokens[0]["title"] == "token “5”\nforced, not sampled\n1 allowed: “5”"
    assert tokens[1]["title"].endswith("\nentropy 0.000\n10,000 allowed: “a” “<b>” “\\u202e” ...")
    assert "allowed" not in tokens[2]["title"] and tokens[3]["title"].endswith("\n1 allowed: “#”")
    assert " no other token was allowed.\n" in "".join(page.texts)


def test_runs_without_a_control_have_no_legend_of_it(run_dir):
    text = build(run_dir).read_text(encoding="utf-8")
    assert "no other token was allowed" not in text and "Point at a token for its numbers.</p>" in text


def test_columns_of_other_lengths_than_the_tokens_are_shown(run_dir):
    short = CONTROLLED | {"sampled": [True], "num_allowed": [3], "allowed": []}
    long = {name: values * 3 for name, values in CONTROLLED.items()}
    write(run_dir / "rollouts.jsonl", [rollout(4, **short), rollout(4, 1, **long)])
    tokens = [attrs["title"] for tag, attrs in parse(build(run_dir)).tags if tag == "span" and "title" in attrs]
    assert len(tokens) == 4 and tokens[0].endswith("\n3 allowed")


def test_page_is_self_contained_and_without_scripts(run_dir):
    page = parse(build(run_dir, run_dir / "other.html"))
    assert {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "a"} == set()
    assert not any(name in ("src", "href") or name.startswith("on") for _, attrs in page.tags for name in attrs)
    policy = [attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_model_text_cannot_become_markup(run_dir):
    row = rollout(9, prompt=EVIL, tokens=[EVIL, "\u202egnp.exe\x00\n\ud800"], finish=EVIL, sample=EVIL)
    write(run_dir / "rollouts.jsonl", [row])
    write(run_dir / "metrics.jsonl", [*METRICS, {"step": 4, "phase": "rl", f"time/{EVIL}": 1.0}])
    (run_dir / "config.yaml").write_text(EVIL, encoding="utf-8")
    text = build(run_dir).read_text(encoding="utf-8")
    page = parse(run_dir / "report.html")
    assert "<script" not in text and "<img" not in text and "\u202e" not in text and "\x00" not in text
    assert page.texts.count(EVIL) == 5  # prompt, token, finish, sample, config
    assert "\\u202egnp.exe\\x00↵\n\\ud800" in page.texts


def test_rows_with_holes_are_shown(run_dir):
    bare = {"step": 5, "uid": 1, "completion": "no tokens recorded", "reward": None}
    write(run_dir / "rollouts.jsonl", [bare, rollout(5, logprobs=[None], entropy=[])])
    page = parse(build(run_dir))
    assert "no tokens recorded" in page.texts
    assert [attrs["class"] for tag, attrs in page.tags if "title" in attrs and tag == "span"] == ["lnone"] * 3


def test_an_unfinished_run_has_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "rew', encoding="utf-8")
    page = parse(build(tmp_path))
    assert {"No step has been logged yet.", "No rollouts were recorded."} <= set(page.texts)
    assert "Config" not in page.texts


def test_long_records_are_cut_and_said_so(run_dir):
    write(run_dir / "rollouts.jsonl", [rollout(1, sample) for sample in range(70)])
    page = parse(build(run_dir))
    assert "6 more rows of this step are in rollouts.jsonl." in page.texts


def test_errors_name_got_and_want(tmp_path):
    with pytest.raises(UserError, match="nowhere: got no such directory, want one that `jaxrl train` wrote"):
        build(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"got a directory without metrics\.jsonl"):
        build(tmp_path)


def test_a_line_is_drawn_where_the_numbers_are():
    charts = {chart.title: chart for chart in draw_charts(METRICS[1:])}
    reward = charts["reward"]
    # y extends from 0 to 1.05 over 142 units, x from step 1 to 3 over 286.
    assert reward.lines[0].path == "M46.0 150.0h0L189.0 82.4L332.0 14.8"
    assert reward.x_ticks == [(46.0, "1"), (189.0, "2"), (332.0, "3")]
    assert reward.bands[1] == (189.0, 143.0, "step 2\nreward 0.5")
    assert charts["entropy (nats)"].lines[0].path.count("M") == 2  # a gap where the value was not finite
    assert "loss" not in charts


def test_shares_of_time_fill_the_chart():
    chart = next(chart for chart in draw_charts(METRICS[1:]) if chart.title == "shares of time")
    assert [(line.name, line.last) for line in chart.lines] == [("time/generate", "50%"), ("time/update", "50%")]
    assert chart.lines[0].path == "M46.0 43.5L332.0 79.0L332.0 150.0L46.0 150.0Z"  # 0.75 and 0.5 of 142 units
    assert chart.lines[1].path == "M46.0 8.0L332.0 8.0L332.0 79.0L46.0 43.5Z"


@pytest.mark.parametrize(
    "low, high, ticks",
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (0, 150, [0, 50, 100, 150]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (1, 2, [1, 1.25, 1.5, 1.75, 2]),
    ],
)
def test_ticks_are_round(low, high, ticks):
    assert find_ticks(low, high) == ticks


def test_ticks_of_extreme_ranges_are_few():
    for low, high in [(0, 1e-9), (1e12, 1.1e12), (-3e30, 5e30), (0.1, 0.1 + 1e-12)]:
        assert len(find_ticks(low, high)) <= 6


def test_numbers_are_short():
    numbers = [0, 0.4125, 1.0, 5310.4, 1234567.0, 3e-6, -2500.0, 2e12]
    assert [format_number(x) for x in numbers] == ["0", "0.4125", "1", "5,310", "1.235M", "3e-06", "-2,500", "2e+12"]


def test_thinning_keeps_spikes_and_order():
    points = [(step, 0.0) for step in range(10_000)]
    points[5_000], points[5_001] = (5_000, 9.0), (5_001, -9.0)
    thinned = thin(points, columns=100)
    assert {(5_000, 9.0), (5_001, -9.0)} <= set(thinned) and len(thinned) <= 200
    assert thinned == sorted(thinned)
    assert thin(points[:50], columns=100) == points[:50]


def test_a_constant_and_a_single_point_can_be_drawn():
    for rows in ([{"step": 4, "reward": 0.0}], [{"step": 1, "reward": -2.0}, {"step": 2, "reward": -2.0}]):
        (chart,) = draw_charts(rows)
        assert all(math.isfinite(x) for x, _ in chart.x_ticks) and chart.lines[0].path.startswith("M46.0 ")


def test_frame_maps_its_corners():
    frame = Frame(0, 10, -1, 1)
    assert (frame.at(0, -1), frame.at(10, 1)) == ((46, 150), (332, 8))


def test_report_needs_no_jax():
    code = "import sys, jaxrl_llm.metrics.report.build; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_steps_groups_on_their_way_through_the_stages(run_dir):
    """By hand: of 40 groups 2 were not graded, 32 accepted, and two filters dropped 8 and 5 rows."""
    row = METRICS[-1] | {
        "groups/sampled": 40, "groups/graded": 38, "groups/kept": 31, "groups/replayed": 0, "rollout/samples": 320,
        "kept/rows": 243, "gate/skipped": 7, "refill/prompts": 40, "refill/accepted": 0.8, "refill/missing": 0,
        "filter/signal_success/dropped": 8, "filter/not_cut_off/dropped": 5,
    }  # fmt: skip
    lines = stage_lines(row)
    assert [line[:4] for line in lines] == [
        ("sampled", "40", "320", "7 prompts by the gate"), ("graded", "38", "", "2 groups"),
        ("accepted by refill", "32", "", "6 groups"), ("filter signal_success", "", "", "8 rows"),
        ("filter not_cut_off", "", "", "5 rows"), ("kept", "31", "243", ""),
    ]  # fmt: skip
    assert [round(line.share, 3) for line in lines] == [1, 0.95, 0.8, 0.975, 0.984, 0.775]
    back = {"groups/replayed": 10, "replay/rows": 16, "replay/age": 3.5, "replay/uses": 2}
    assert [(*line[:4], line.share) for line in stage_lines(row | back)[-2:]] == [
        ("from the replay", "10", "", "3.5 updates old, used 2.0 times", 0.25),
        ("stored among fresh ones", "", "16", "3.5 updates old, used 2.0 times", 0.05),
    ]
    assert stage_lines(METRICS[0]) == [] and stage_lines(row | {"groups/kept": None}) == []
    write(run_dir / "metrics.jsonl", [*METRICS[:-1], row, METRICS[-2] | {"step": 9}])
    text = build(run_dir).read_text()
    page = Page(text)
    assert "Stages of step 3" in text and text.count('class="bar"') == 6 and not page.open
    # A filter's name is the user's.
    write(run_dir / "metrics.jsonl", [row | {f"filter/{EVIL}/dropped": 1}])
    assert EVIL not in build(run_dir).read_text()

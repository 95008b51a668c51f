"""A run directory -> one HTML page: charts of the metrics, the last recorded rollouts token by token, the config.

Enters: metrics.jsonl, rollouts.jsonl and config.yaml as a run, or a person after it, left them. Leaves: a page without scripts,
servers or outside resources. All text of models and data sets is escaped twice over: by jinja2 for HTML, by `printable` for
invisible and bidirectional characters, which could make a page read differently from what it holds.
"""

import functools
import logging
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from jaxrl_llm.errors import UserError, describe_os_error
from jaxrl_llm.metrics.json_lines import METRICS, ROLLOUTS
from jaxrl_llm.metrics.report.choice import choice_charts, strata
from jaxrl_llm.metrics.report.records import Reader, metrics_row, rollouts_row
from jaxrl_llm.metrics.report.responses import FAINTEST_LOGPROB, last_steps
from jaxrl_llm.metrics.report.stages import NAMES, StageLine, stage_lines
from jaxrl_llm.metrics.report.tasks import task_charts
from jaxrl_llm.metrics.report.visits import Visits
from jaxrl_llm.metrics.terminal import printable, printable_lines

log = logging.getLogger("jaxrl_llm.metrics.report")
CONFIG = "config.yaml"
COLUMNS = 240
"""Columns of a chart: longer runs are thinned to the extremes of each column, so that no spike is lost."""
WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 340, 170, 46, 8, 20, 8
"""Size of a chart in SVG units, and the margins around its plot."""

CHARTS = (  # title, its metrics; a chart without data is left out
    ("reward", ("reward", "reward_std")),
    ("evaluation", ("eval/exact", "eval/pass@1")),
    ("entropy (nats)", ("entropy",)),
    ("completion length (tokens)", ("completions/mean_length",)),
    ("largest ratio", ("ratio/max", "ratio/mean")),
    ("effective sample size (share)", ("ess/sequences", "ess/tokens", "lr/ess_scale")),
    ("clipped fractions", ("clip_ratio/low", "clip_ratio/high")),
    ("groups", ("groups/sampled", "groups/graded", "groups/kept")),
    ("trees: tokens of all responses per sampled token", ("tree/sharing",)),
    ("trees: tokens that a branch shares, and depth", ("tree/fork", "tree/depth")),
    ("reuse: shares of tokens and of whole responses kept of earlier visits", ("reuse/tokens", "reuse/whole")),
    ("length of kept and dropped responses (tokens)", ("kept/mean_length", "dropped/mean_length")),
    ("success of kept and dropped responses", ("kept/success", "dropped/success")),
    ("attempts per prompt, rows per kept group", ("refill/attempts", "groups/effective_size")),
    ("different answers, different pairs of tokens", ("diversity/unique_answers", "diversity/distinct_2")),
    ("prompts never seen", ("prompts/never_seen",)),
    ("samples per prompt", ("budget/min_samples", "budget/max_samples")),
    ("replayed groups: age (updates) and uses", ("replay/age", "replay/age_max", "replay/uses")),
    ("groups that were replayed, responses that joined", ("groups/replayed", "replay/rows")),
    ("groups in the replay's buffer", ("replay/groups",)),
    ("the replay's buffer (MiB)", ("replay/mib",)),
    ("truncated completions, groups without signal", ("completions/clipped_ratio", "frac_reward_zero_std")),
    ("kl (nats)", ("kl",)),
    ("mismatch: max |Δ log-prob| (nats)", ("mismatch/max_abs_dlogp",)),
    ("loss", ("loss",)),
    ("gradient norm", ("grad_norm",)),
    ("learning rate", ("lr",)),
    ("tokens/s", ("tokens_per_s",)),
)
PLOTTED = frozenset(name for _, names in CHARTS for name in names) | NAMES
OVERLAPPING_TIMES = {"time/compile", "time/step"}  # seconds that other timers count too

Row = Mapping[str, Any]
Point = tuple[float, float | None]


@dataclass(frozen=True)
class Frame:
    """Ranges of a chart's axes; `at` maps a point to SVG units."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - (y - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - BOTTOM - TOP)
        return round(across, 1), round(down, 1)


@dataclass(frozen=True)
class Line:
    """One metric of a chart: an SVG path with its name and last value."""

    name: str
    path: str
    last: str


@dataclass(frozen=True)
class Chart:
    """A chart; ticks are (SVG position, label), bands are hover areas (x, width, text)."""

    title: str
    lines: list[Line]
    filled: bool
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    bands: list[tuple[float, float, str]]


def build(run_dir: Path, out: Path | None = None) -> Path:
    """Write the page of a run and return its path, by default `<run_dir>/report.html`.

    Lines that are no rows are left out; how many, and where the first is, stands on the page and is logged.

    Raises:
        UserError: `run_dir` or its metrics.jsonl is missing, or `out` cannot be written.
    """
    run_dir = Path(run_dir)
    if not (run_dir / METRICS).is_file():
        found = f"a directory without {METRICS}" if run_dir.is_dir() else "no such directory"
        raise UserError(f"run directory {run_dir}: got {found}, want one that `jaxrl train` wrote")
    out = run_dir / "report.html" if out is None else Path(out)
    if out.exists() and (not out.is_file() or any(out.samefile(p) for p in _sources(run_dir))):
        raise UserError(f"--out: got {out}, want a file to write, and none that the page is made of")
    text, omissions = _page(run_dir)
    for line in omissions:
        log.warning("%s", line)
    _write(out, text)
    return out


def _sources(run_dir: Path) -> list[Path]:
    """Files that the page is made of, if they exist."""
    return [path for path in (run_dir / METRICS, run_dir / ROLLOUTS, run_dir / CONFIG) if path.is_file()]


def _page(run_dir: Path) -> tuple[str, list[str]]:
    """The page, and warnings on what had to be left out."""
    metrics = Reader(run_dir / METRICS, functools.partial(metrics_row, plotted=PLOTTED))
    rollouts = Reader(run_dir / ROLLOUTS, rollouts_row)
    rows = sorted(metrics, key=lambda row: row["step"])
    phases = {
        "Training": [
            row if row.get("phase") != "warm_start" else _evaluated(row) for row in rows if _is_of_training(row)
        ],
        "Warm start": [row for row in rows if row.get("phase") == "warm_start"],
    }
    visits = Visits()
    steps = last_steps(visits.counting(rollouts)) if (run_dir / ROLLOUTS).is_file() else []
    omissions = [printable(line) for line in (*metrics.omissions, *rollouts.omissions)]
    config = run_dir / CONFIG
    marks = {
        token.mark for step in steps for group in step["groups"] for row in group["samples"] for token in row["tokens"]
    }
    text = _template().render(
        name=printable(run_dir.resolve().name),
        facts=_facts(phases["Training"]),
        omissions=omissions,
        sections=[(title, draw_charts(part)) for title, part in phases.items() if part],
        warnings=[(row["step"], printable_lines(text)) for row in rows for text in row.get("warnings") or ()],
        steps=steps,
        visited=visits.most_visited(phases["Training"]),
        stages=_stages(phases["Training"]),
        config=printable_lines(config.read_text(encoding="utf-8", errors="replace")) if config.is_file() else None,
        frame={"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "bottom": BOTTOM, "top": TOP},
        faintest=FAINTEST_LOGPROB,
        controlled=bool(marks & {"forced", "single"}),
        has_trees="left" in marks,
    )
    return text, omissions


@functools.cache
def _template() -> Template:
    loader = FileSystemLoader(Path(__file__).parent, encoding="utf-8")
    jinja = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return jinja.get_template("page.html.j2")


def _write(out: Path, text: str) -> None:
    """Write all or nothing: a browser never reloads half a page, and a full disk leaves the old one."""
    half = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        half.write_text(text, encoding="utf-8", newline="\n")
        os.replace(half, out)
    except OSError as error:
        with suppress(OSError):
            half.unlink()
        raise UserError(f"{describe_os_error(error, out)}; --out FILE puts the page elsewhere") from None


def _is_of_training(row: Row) -> bool:
    """True for a row of RL, and for the one with the score before RL."""
    return row.get("phase") != "warm_start" or any(name.startswith("eval/") for name in row)


def _evaluated(row: Row) -> Row:
    return {name: value for name, value in row.items() if name == "step" or name.startswith("eval/")}


def _stages(rows: Sequence[Row]) -> tuple[int, list[StageLine]] | None:
    """Return the last step of RL that has stages, and their lines; None if there is none."""
    return next(((row["step"], lines) for row in reversed(rows) if (lines := stage_lines(row))), None)


def _facts(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return (word, value) pairs for the head of the page: the last step and the last known numbers."""
    facts = [("step", f"{rows[-1]['step']:,}")] if rows else []
    for word, name in (
        ("reward", "reward"),
        ("exact", "eval/exact"),
        ("pass@1", "eval/pass@1"),
        ("entropy", "entropy"),
        ("tokens/s", "tokens_per_s"),
    ):
        known = [row[name] for row in rows if row.get(name) is not None]
        facts += [(word, format_number(known[-1]))] if known else []
    return facts


def format_number(value: float) -> str:
    """Return about four digits of `value`: 0.4125, 5,310, 1.2M, 3e-06."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g}M" if size < 1e9 else f"{value:.3g}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if size >= 1e-3 else f"{value:.3g}"


def find_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return about `count` round numbers, 1, 2, 2.5 or 5 times a power of ten apart, inside [low, high]; low < high."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{index * step:.6g}") for index in range(first, last + 1)]


def thin(points: Sequence[Point], columns: int = COLUMNS) -> list[Point]:
    """Return `points` (ascending x) or, if there are more than two per column, the lowest and the highest of each column."""
    if len(points) <= 2 * columns:
        return list(points)
    first, span = points[0][0], points[-1][0] - points[0][0] or 1
    buckets: dict[int, list[Point]] = {}
    for x, y in points:
        if y is not None:
            buckets.setdefault(int((x - first) / span * (columns - 1)), []).append((x, y))
    extremes = [{min(bucket, key=_height), max(bucket, key=_height)} for bucket in buckets.values()]
    return sorted(point for pair in extremes for point in pair)


def _height(point: Point) -> float:
    return point[1]


def draw_charts(rows: Sequence[Row]) -> list[Chart]:
    """Return a chart for each entry of CHARTS that `rows` hold numbers for, those of the curriculum and of tasks, and one of the
    shares of time."""
    wanted = (*CHARTS, *choice_charts(rows), *task_charts(rows))
    charts = [_draw_lines(title, [row for row in rows if row.keys() & set(names)], names) for title, names in wanted]
    times = sorted({name for row in rows for name in row if name.startswith("time/")} - OVERLAPPING_TIMES)
    shares = (("curriculum: shares of the prompts", strata(rows)), ("shares of time", times))
    return [chart for chart in (*charts, *(_draw_shares(title, rows, names) for title, names in shares)) if chart]


def _draw_lines(title: str, rows: Sequence[Row], names: Sequence[str]) -> Chart | None:
    series = {name: [(row["step"], row[name]) for row in rows if name in row] for name in names}
    series = {name: points for name, points in series.items() if any(y is not None for _, y in points)}
    if not series:
        return None
    heights = [y for points in series.values() for _, y in points if y is not None]
    low, high = min(heights), max(heights)
    margin = 0.05 * (high - low) or 0.5 * abs(high) or 1.0
    floor = 0.0 if 0 <= low <= high / 2 else low - margin
    frame = Frame(*_span([row["step"] for row in rows]), floor, high + margin)
    lines = []
    for name, points in series.items():
        last = [y for _, y in points if y is not None][-1]
        lines.append(Line(name, _trace(frame, thin(points)), format_number(last)))
    return Chart(title, lines, False, *_ticks(frame), _bands(frame, rows, list(series)))


def _span(steps: Sequence[float]) -> tuple[float, float]:
    return min(steps), max(max(steps), min(steps) + 1)


def _trace(frame: Frame, points: Sequence[Point]) -> str:
    """Return the SVG path through `points`, interrupted at values that are None."""
    path, pen = "", "M"
    for x, y in points:
        if y is None:
            pen = "M"
            continue
        across, down = frame.at(x, y)
        # "h0" gives a lone point the length zero that a round line cap needs to show as a dot.
        path += f"{pen}{across} {down}" + ("h0" if pen == "M" else "")
        pen = "L"
    return path


def _draw_shares(title: str, rows: Sequence[Row], names: Sequence[str]) -> Chart | None:
    """Draw each metric's fraction of their sum as stacked areas, summed per column of the chart."""
    stride = -(-len(rows) // COLUMNS)
    shares: list[Row] = []
    for part in (rows[start : start + stride] for start in range(0, len(rows), stride)):
        sums = {name: sum(row.get(name) or 0.0 for row in part) for name in names}
        if total := sum(sums.values()):
            shares.append({"step": part[0]["step"]} | {name: mine / total for name, mine in sums.items()})
    if not shares:
        return None
    frame = Frame(*_span([row["step"] for row in shares]), 0.0, 1.0)
    lines, floor = [], [0.0] * len(shares)
    for name in names:
        top = [below + row[name] for below, row in zip(floor, shares, strict=True)]
        edges = list(zip(shares, top, strict=True)) + list(zip(shares, floor, strict=True))[::-1]
        outline = "L".join("{} {}".format(*frame.at(row["step"], y)) for row, y in edges)
        lines.append(Line(name, f"M{outline}Z", f"{shares[-1][name]:.0%}"))
        floor = top
    return Chart(title, lines, True, *_ticks(frame), _bands(frame, shares, names))


def _ticks(frame: Frame) -> tuple[list[tuple[float, str]], list[tuple[float, str]]]:
    across = [tick for tick in find_ticks(frame.x_low, frame.x_high) if tick == round(tick)]
    down = find_ticks(frame.y_low, frame.y_high)
    x_ticks = [(frame.at(tick, frame.y_low)[0], format_number(tick)) for tick in across]
    return x_ticks, [(frame.at(frame.x_low, tick)[1], format_number(tick)) for tick in down]


def _bands(frame: Frame, rows: Sequence[Row], names: Sequence[str]) -> list[tuple[float, float, str]]:
    """Return up to COLUMNS hover areas with the values at a step, each from its step to the next."""
    rows = rows[:: -(-len(rows) // COLUMNS)]
    edges = [frame.at(row["step"], frame.y_low)[0] for row in rows] + [WIDTH - RIGHT]
    texts = []
    for row in rows:
        values = (f"{name} {format_number(row[name])}" for name in names if row.get(name) is not None)
        texts.append("\n".join([f"step {row['step']}", *values]))
    return [(x, round(max(2.0, end - x), 1), text) for x, end, text in zip(edges, edges[1:], texts, strict=False)]

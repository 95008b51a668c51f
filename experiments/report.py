"""Tables and plots of arms, at equal updates and at equal samples."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

Axis = Literal["step", "samples", "tokens"]
AXES: dict[Axis, str] = {"step": "step of RL", "samples": "samples drawn", "tokens": "tokens sampled"}


def series(run: dict, name: str) -> np.ndarray:
    """Return a number of each record; NaN in those without it, as the first is without the metrics of steps."""
    return np.array([record.get(name, np.nan) for record in run["records"]], float)


def accuracy(run: dict, axis: Axis, at: float, name: str = "exact") -> float:
    """Accuracy when so many steps were done or samples drawn, interpolated between records; NaN beyond the run.

    Args:
        run: of a results file.
        axis: step or samples.
        at: place on the axis.
        name: of the accuracy in the records.
    """
    return float(np.interp(at, series(run, axis), series(run, name), right=np.nan))


def late(run: dict, axis: Axis, at: float, name: str = "exact") -> float:
    """Mean accuracy over the last quarter of the way to `at`, as one evaluation may fall into a dip; arguments as in `accuracy`."""
    return float(np.mean([accuracy(run, axis, x, name) for x in np.linspace(0.75 * at, at, 26)]))


def mean_over_steps(run: dict, name: str) -> float:
    """Mean over the records that have a number of this name, of a name in /max the largest; NaN if none has."""
    found = [record[name] for record in run["records"] if name in record]
    return float(np.max(found) if name.endswith("/max") else np.mean(found)) if found else np.nan


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation over seeds."""
    if np.isnan(values).any():
        return "-"
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else f"{np.mean(values):.3f}"


def table(runs: list[dict], arms: Sequence[str], steps: int, samples: int) -> str:
    """Markdown table with a row per arm: after `steps` steps, and after `samples` samples. ± is the deviation over seeds."""
    lines = [
        f"| arm | after {steps} steps, each seed | mean | late | samples until then | groups kept per step | CPU s "
        f"| after {samples:,} samples | late |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in arms:
        some = sorted((run for run in runs if run["arm"] == arm), key=lambda run: run["seed"])
        if not some:
            continue
        after, after_samples = (
            [accuracy(run, *end) for run in some] for end in (("step", steps), ("samples", samples))
        )
        late_steps, late_samples = (
            [late(run, *end) for run in some] for end in (("step", steps), ("samples", samples))
        )
        drawn, kept, cpu = (
            np.mean([np.interp(steps, series(run, "step"), series(run, name)) for run in some])
            for name in ("samples", "groups_kept", "cpu_seconds")
        )
        lines.append(
            f"| {arm} | {', '.join(f'{x:.3f}' for x in after)} | {spread(after)} | **{spread(late_steps)}** "
            f"| {drawn:,.0f} | {kept / steps:.1f} | {cpu:.1f} | {spread(after_samples)} | **{spread(late_samples)}** |"
        )
    return "\n".join(lines)


def token_table(runs: list[dict], arms: Sequence[str], steps: int, tokens: int) -> str:
    """Markdown table with a row per arm: after `steps` steps, and after `tokens` tokens. ± is the deviation over seeds."""
    lines = [
        f"| arm | after {steps} steps, each seed | mean | late | tokens until then | after {tokens:,} tokens | late |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in arms:
        some = sorted((run for run in runs if run["arm"] == arm), key=lambda run: run["seed"])
        if not some:
            continue
        ends: tuple[tuple[Axis, int], ...] = (("step", steps), ("tokens", tokens))
        after, of_tokens = ([accuracy(run, *end) for run in some] for end in ends)
        late_steps, late_tokens = ([late(run, *end) for run in some] for end in ends)
        spent = np.mean([np.interp(steps, series(run, "step"), series(run, "tokens")) for run in some])
        lines.append(
            f"| {arm} | {', '.join(f'{x:.3f}' for x in after)} | {spread(after)} | **{spread(late_steps)}** | {spent:,.0f} "
            f"| {spread(of_tokens)} | **{spread(late_tokens)}** |"
        )
    return "\n".join(lines)


def late_table(runs: list[dict], arms: Sequence[str], names: Mapping[str, str]) -> str:
    """Markdown table with a row per arm: numbers at the last step, each seed, and late.

    Args:
        runs: of a results file, all of as many steps.
        arms: rows of the table.
        names: name in the records -> title.
    """
    lines = [f"| arm | {' | '.join(f'{title}, each seed | late' for title in names.values())} |"]
    lines += ["|---|" + "---|---|" * len(names)]
    for arm in arms:
        some, cells = [run for run in runs if run["arm"] == arm], []
        if not some:
            continue
        for name in names:
            end = [series(run, "step")[-1] for run in some]
            each = [f"{accuracy(run, 'step', at, name):.3f}" for run, at in zip(some, end, strict=True)]
            of_late = spread([late(run, "step", at, name) for run, at in zip(some, end, strict=True)])
            cells += [", ".join(each), f"**{of_late}**"]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_table(runs: list[dict], arms: Sequence[str], names: Mapping[str, str]) -> str:
    """Markdown table with a row per arm: means over steps and seeds, with the least and the largest seed; arguments as in
    `late_table`."""
    lines = [f"| arm | {' | '.join(names.values())} |", "|---|" + "---|" * len(names)]
    for arm in arms:
        some, cells = [run for run in runs if run["arm"] == arm], []
        if not some:
            continue
        for name in names:
            each = [mean_over_steps(run, name) for run in some]
            low, mean, high = (f"{x:.2g}" for x in (np.min(each), np.mean(each), np.max(each)))
            cells.append("-" if np.isnan(each).any() else mean if low == high else f"{mean} ({low} to {high})")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def reached_table(runs: list[dict], arms: Sequence[str], level: float) -> str:
    """Markdown table: when the mean accuracy of the last two records first reached `level`, in steps and in samples, per seed."""
    lines = [f"| arm | step at which {level} is reached, each seed | samples until then |", "|---|---|---|"]
    for arm in arms:
        some = sorted((run for run in runs if run["arm"] == arm), key=lambda run: run["seed"])
        found = [reached(run, level) for run in some]
        steps, samples = ([str(int(at[i])) if at else "-" for at in found] for i in (0, 1))
        lines.append(f"| {arm} | {', '.join(steps)} | {', '.join(samples)} |")
    return "\n".join(lines)


def reached(run: dict, level: float) -> tuple[float, float] | None:
    """(step, samples) of the first record from which accuracy, as the mean of it and the record before, is `level` or more."""
    exact = series(run, "exact")
    high = np.flatnonzero((exact[1:] + exact[:-1]) / 2 >= level)
    return (series(run, "step")[high[0] + 1], series(run, "samples")[high[0] + 1]) if len(high) else None


def budget_table(runs: list[dict], arms: Sequence[str], budgets: Sequence[int]) -> str:
    """Markdown table with a row per arm and a column per number of samples: mean accuracy over seeds, the best of a column bold."""
    mean = [
        [float(np.mean([accuracy(run, "samples", at) for run in runs if run["arm"] == arm])) for at in budgets]
        for arm in arms
    ]
    best = np.nanargmax(mean, axis=0)
    lines = [f"| arm | {' | '.join(f'{at:,} samples' for at in budgets)} |", "|---|" + "---|" * len(budgets)]
    for i, arm in enumerate(arms):
        cells = [f"**{x:.3f}**" if best[j] == i else f"{x:.3f}" for j, x in enumerate(mean[i])]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(path: Path, runs: list[dict], panels: Mapping[str, Sequence[str]], beside: Axis = "samples") -> None:
    """Plot exact accuracy over steps and over samples or tokens; thin lines are seeds, thick lines their mean.

    Args:
        path: of the image.
        runs: of a results file.
        panels: title of a row of panels -> the arms in it.
        beside: second axis.
    """
    figure, axes = _panels(len(panels), 2)
    for row, (title, arms) in zip(axes, panels.items(), strict=True):
        for panel, axis in zip(row, ("step", beside), strict=True):
            _draw(panel, runs, arms, axis, "exact")
            panel.set_xlabel(AXES[axis])
        row[0].set_ylabel("exact held-out accuracy")
        row[0].set_title(title, loc="left")
        row[1].legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=90, metadata={"Software": None})


def plot_columns(path: Path, runs: list[dict], panels: Mapping[str, Sequence[str]], columns: Mapping[str, str]) -> None:
    """Plot numbers of the records, shares all of them, over steps; lines as in `plot`.

    Args:
        path: of the image.
        runs: of a results file.
        panels: title of a row of panels -> the arms in it.
        columns: name in the records -> title.
    """
    figure, axes = _panels(len(panels), len(columns))
    for row, (title, arms) in zip(axes, panels.items(), strict=True):
        for panel, (name, label) in zip(row, columns.items(), strict=True):
            _draw(panel, runs, arms, "step", name)
            panel.set_title(label)
            panel.set_xlabel(AXES["step"])
        row[0].set_ylabel(title)
        row[-1].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=90, metadata={"Software": None})


def _panels(rows: int, columns: int) -> tuple:
    """Return a figure and its axes [rows, columns]."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (5 * columns, 0.8 + 3.2 * rows)
    return plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")


def _draw(panel: Any, runs: list[dict], arms: Sequence[str], axis: Axis, name: str) -> None:
    """Draw a number of the records of some arms over an axis.

    Args:
        panel: axes to draw on.
        runs: of a results file.
        arms: to draw.
        axis: step or samples.
        name: of the number.
    """
    import matplotlib.pyplot as plt

    for arm, color in zip(arms, plt.get_cmap("viridis")(np.linspace(0, 0.9, len(arms))), strict=True):
        some = [run for run in runs if run["arm"] == arm]
        end = min((series(run, axis)[-1] for run in some), default=0)
        x = np.linspace(0, end, 101)
        lines = [[accuracy(run, axis, at, name) for at in x] for run in some]
        panel.plot(x, np.transpose(lines), color=color, lw=0.6, alpha=0.35)
        panel.plot(x, np.mean(lines, axis=0), color=color, lw=2, label=arm)

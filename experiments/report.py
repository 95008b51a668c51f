"""Tables and plots of arms, at equal updates and at equal samples."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

Axis = Literal["step", "samples"]
AXES: dict[Axis, str] = {"step": "step of RL", "samples": "samples drawn"}


def series(run: dict, name: str) -> np.ndarray:
    return np.array([record[name] for record in run["records"]], float)


def accuracy(run: dict, axis: Axis, at: float) -> float:
    """Exact accuracy when so many steps were done or samples drawn, interpolated between records; NaN beyond the run."""
    return float(np.interp(at, series(run, axis), series(run, "exact"), right=np.nan))


def late(run: dict, axis: Axis, at: float) -> float:
    """Mean exact accuracy over the last quarter of the way to `at`: a single evaluation may fall into a dip."""
    return float(np.mean([accuracy(run, axis, x) for x in np.linspace(0.75 * at, at, 26)]))


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


def plot(path: Path, runs: list[dict], panels: Mapping[str, Sequence[str]]) -> None:
    """Plot exact accuracy over steps and over samples; thin lines are seeds, thick lines their mean.

    Args:
        path: of the image.
        runs: of a results file.
        panels: title of a row of panels -> the arms in it.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (10, 0.8 + 3.2 * len(panels))
    figure, axes = plt.subplots(len(panels), 2, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for row, (title, arms) in zip(axes, panels.items(), strict=True):
        colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(arms)))
        for panel, axis in zip(row, AXES, strict=True):
            for arm, color in zip(arms, colors, strict=True):
                some = [run for run in runs if run["arm"] == arm]
                end = min((series(run, axis)[-1] for run in some), default=0)
                x = np.linspace(0, end, 101)
                lines = [[accuracy(run, axis, at) for at in x] for run in some]
                panel.plot(x, np.transpose(lines), color=color, lw=0.6, alpha=0.35)
                panel.plot(x, np.mean(lines, axis=0), color=color, lw=2, label=arm)
            panel.set_xlabel(AXES[axis])
        row[0].set_ylabel("exact held-out accuracy")
        row[0].set_title(title, loc="left")
        row[1].legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=90, metadata={"Software": None})

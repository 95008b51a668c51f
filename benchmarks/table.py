"""Benchmark results as Markdown tables: `python -m benchmarks.table benchmarks/results/<name>.json`."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

PAGE = """# Benchmarks

Each program is compared with a plain copy or a plain matrix product on the same machine, timed minutes before. Times are medians
(lowest to highest) of calls in turns, without compilation. The formulas are in the docstrings of `benchmarks/generate.py`,
`update.py` and `publish.py`. `python -m benchmarks.table` writes what follows, up to the next heading, from
`{path}`.
"""


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.3g}" if seconds < 1 else f"{seconds * 1e3:,.0f}"


def rows_of(lines: Iterable[list[str]]) -> list[str]:
    """Markdown table with aligned columns; the first line is the header."""
    lines = list(lines)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return [text[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *text[1:]]


def median_range(time: dict) -> str:
    """Return the median (lowest to highest) in ms, and the number of repetitions."""
    low, high = milliseconds(time["low_s"]), milliseconds(time["high_s"])
    return f"{milliseconds(time['median_s'])} ({low} to {high}, n = {time['repetitions']})"


def heading(result: dict) -> list[str]:
    """Description of the machine, and its ceilings."""
    ceilings, machine = result["ceilings"], result["machine"]
    square = ceilings["matmul"]
    return [
        f"{result['date']}, {machine['device']}, {machine['cores']} cores ({machine['backend']}), Python {machine['python']}, "
        f"jax {machine['jax']}, jaxlib {machine['jaxlib']}, commit {machine['commit'][:12]}, "
        f"load average {machine['load_before']:.2f} before and {machine['load_after']:.2f} after.",
        "",
        f"Command: `{result['command']}`",
        "",
        f"Ceilings: copy {ceilings['copy']['bytes_per_s'] / 1e9:,.1f} GB/s over {ceilings['copy']['array_bytes'] >> 20} MiB; "
        f"matmul [{square['float32']['shape'][0]}]^3 f32 {square['float32']['flops_per_s'] / 1e9:,.0f} GFLOP/s, "
        f"bf16 to f32 {square['bfloat16']['flops_per_s'] / 1e9:,.0f} GFLOP/s.",
    ]


def generate_table(results: list[dict]) -> list[str]:
    head = ["generate", "compute", "rows", "call, ms", "tokens/s", "step, ms", "ceiling, ms", "bound by", "of ceiling"]
    return rows_of(
        [head]
        + [
            [
                r["size"],
                r["compute"],
                str(r["shapes"]["rows"]),
                median_range(r["time"]),
                f"{r['tokens_per_s']:,.0f}",
                milliseconds(r["step_s"]),
                milliseconds(r["ceiling"]["step_s"]),
                r["ceiling"]["bound"],
                f"{r['fraction_of_ceiling']:.0%}",
            ]
            for r in results
        ]
    )


def update_table(results: list[dict]) -> list[str]:
    head = ["update", "compute", "rows x slots", "call, ms", "tokens/s", "GFLOP/s", "of square matmul", "of own shapes"]
    return rows_of(
        [head]
        + [
            [
                r["size"],
                r["compute"],
                f"{r['shapes']['rows']} x {r['shapes']['slots']}",
                median_range(r["time"]),
                f"{r['tokens_per_s']:,.0f}",
                f"{r['flops_per_s'] / 1e9:,.1f}",
                f"{r['fraction_of_ceiling']:.0%}",
                f"{r['fraction_of_own_shapes']:.0%}",
            ]
            for r in results
        ]
    )


def publish_table(results: list[dict]) -> list[str]:
    head = ["publish", "compute", "call, ms", "moved, MB", "GB/s", "of a copy"]
    return rows_of(
        [head]
        + [
            [
                r["size"],
                r["compute"],
                median_range(r["time"]),
                f"{r['bytes'] / 1e6:,.1f}",
                f"{r['bytes_per_s'] / 1e9:,.2f}",
                f"{r['fraction_of_ceiling']:.0%}",
            ]
            for r in results
        ]
    )


def step_table(step: dict) -> list[str]:
    whole = step["median_s"]["whole"]
    head = [f"one step of {step['config']}", "ms, median (low to high)", "share"]
    lines = [
        [
            n,
            f"{milliseconds(s)} ({milliseconds(step['low_s'][n])} to {milliseconds(step['high_s'][n])})",
            f"{s / whole:.0%}",
        ]
        for n, s in step["median_s"].items()
    ]
    return rows_of([head, *lines])


def render(result: dict) -> str:
    """Render a complete results file."""
    tables = {"generate": generate_table, "update": update_table, "publish": publish_table}
    lines = heading(result)
    for program, table in tables.items():
        if found := [r for r in result["results"] if r["program"] == program]:
            lines += ["", *table(found)]
    if result.get("step"):
        lines += ["", *step_table(result["step"])]
    if result["left_out"]:
        lines += ["", f"Left out, since time was up: {', '.join(result['left_out'])}."]
    return "\n".join(lines)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    print(PAGE.format(path=path))
    print(render(json.loads(path.read_text(encoding="utf-8"))))

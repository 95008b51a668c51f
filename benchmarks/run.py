"""`python -m benchmarks.run [--sizes S,M] [--seconds N] [--out FILE.json]`: ceilings, then generate, update and publish.

Everything runs in one process. The calls of one model at one number of rows, in both dtypes, are timed alternately; see
`clock.alternate`. The file is written after each of these groups, so an interrupted run keeps its results.

--sizes    default S,M; on a GPU L,M,S
--seconds  total wall-clock seconds, by default 420 on a GPU, 1800 elsewhere; a third of them for repetitions. Nothing new starts
           after that, and the file names what was left out; a running call is finished.
--out      default benchmarks/results/<device>-<cores>core-<date>.json
"""

import argparse
import datetime
import gc
import json
import os
import sys
import time
from pathlib import Path

import jax

from benchmarks import generate, publish, step, update
from benchmarks.clock import alternate
from benchmarks.machine import HERE, file_name, machine
from benchmarks.models import DTYPES, SIZES, Workload, make_params
from benchmarks.table import render
from jaxrl_llm.perf import ceilings


def groups(sizes: list[str]) -> list[tuple[str, int]]:
    """(size, rows) in order; L with two numbers of rows."""
    return [(size, rows) for size in sizes for rows in ((64, 256) if size == "L" else (64,))]


def measure(size: str, rows: int, square: dict, seconds: float, deadline: float) -> tuple[list[dict], list[str]]:
    """Measure one group: the ceilings at its shapes, then all its programs alternately.

    Args:
        size: Name of the model size.
        rows: Number of rows.
        square: Matmul ceilings by dtype.
        seconds: Wall-clock seconds for repetitions.
        deadline: No call starts after this time of `time.monotonic`.

    Returns:
        The results, and the names of calls that were left out.
    """
    works = [Workload(size, rows, compute) for compute in DTYPES]
    part = min(1.0, seconds / 20)
    limits = {w: (generate.ceiling(w, part), publish.ceiling(w, part), update.own_rates(w, part)) for w in works}
    params = make_params(size)
    calls = {
        name: c for module in (publish, generate, update) for w in works for name, c in module.calls(w, params).items()
    }
    times = alternate(calls, seconds, deadline)
    results = []
    for w in works:
        step_limit, bandwidth, own_rate = limits[w]
        if {f"generate {w.name}", f"prefill {w.name}"} <= times.keys():
            results.append(generate.result(w, times, step_limit))
        if f"update {w.name}" in times:
            results.append(update.result(w, times, square[w.compute]["flops_per_s"], own_rate))
        if f"publish {w.name}" in times:
            results.append(publish.result(w, times, bandwidth))
    return results, sorted(calls.keys() - times.keys())


def save(path: Path, result: dict) -> None:
    result["machine"]["load_after"] = os.getloadavg()[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def run(sizes: list[str], seconds: float, out: Path | None, date: str) -> dict:
    """Run the benchmarks, write and print the results.

    Args:
        sizes: Names of the model sizes.
        seconds: Total wall-clock seconds.
        out: Results file; None: named after machine and date.
        date: ISO date of the results.
    """
    start = time.monotonic()
    result = {
        "date": date,
        "command": f"python -m benchmarks.run {' '.join(sys.argv[1:])}".strip(),
        "machine": machine(),
    }
    out = out or HERE / "results" / f"{file_name(result['machine'])}-{date}.json"
    result |= {"ceilings": ceilings.general(result["machine"]["backend"]), "results": [], "left_out": []}
    result["step"] = step.measure()
    save(out, result)
    todo = groups(sizes)
    for size, rows in todo:
        if time.monotonic() - start > seconds:
            result["left_out"].append(f"{size} {rows} rows")
            continue
        square = result["ceilings"]["matmul"]
        found, left = measure(size, rows, square, seconds / 3 / len(todo), start + seconds)
        result["results"] += found
        result["left_out"] += left
        save(out, result)
        gc.collect()
        print(f"{size} {rows} rows: done after {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    print(f"{render(result)}\n\n{out}")
    return result


def main() -> None:
    on_gpu = jax.default_backend() == "gpu"
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.split("\n\n")[1])
    parser.add_argument("--sizes", default="L,M,S" if on_gpu else "S,M")
    parser.add_argument("--seconds", type=float, default=420 if on_gpu else 1800)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    sizes = given.sizes.split(",")
    if unknown := [s for s in sizes if s not in SIZES]:
        parser.error(f"--sizes: got {', '.join(unknown)}, want some of {', '.join(SIZES)}")
    run(sizes, given.seconds, given.out, datetime.date.today().isoformat())


if __name__ == "__main__":
    main()

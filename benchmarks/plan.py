"""`python -m benchmarks.plan [NAME ...] [--write]`: runs `jaxrl plan` on the GSM8K configs.

Each plan runs in a separate process, for 1 to 10 minutes on two cores; for GPUs it needs the extra plan-gpu. Its report replaces
the older one of that name in benchmarks/results/plan-tpu-aot.json or plan-gpu-aot.json; one line per plan shows seconds, bytes of
the largest phase, and whether it fits.

--write  write the tables of TABLES into docs/plan.md, from the results
"""

import argparse
import datetime
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from jaxrl_llm.perf import chips
from jaxrl_llm.plan import show

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "plan.md"
BEGIN, END = "<!-- tables for {}: python -m benchmarks.plan --write -->", "<!-- end of tables -->"


class Case(NamedTuple):
    config: str
    shape: str
    topology: str
    flags: tuple[str, ...] = ()

    @property
    def of(self) -> str:
        return "gpu" if chips.parse_topology(self.topology).has_gpus else "tpu"

    @property
    def command(self) -> list[str]:
        shape = f"--model.path=benchmarks/shapes/{self.shape}"
        return ["plan", f"configs/{self.config}_gsm8k.yaml", "--topology", self.topology, *self.flags, shape]


CASES = {
    "qwen3-8b": Case("qwen3-8b", "Qwen3-8B", "v5e:8x8"),
    "llama3-70b": Case("llama3-70b", "Llama-3-70B", "v5p:8x8x8"),
    "qwen3-30b-a3b sweep": Case("qwen3-30b-a3b", "Qwen3-30B-A3B", "v5p:4x4x4", ("--sweep", "--candidates", "2")),
    "qwen3-30b-a3b": Case("qwen3-30b-a3b", "Qwen3-30B-A3B", "v5p:2x4x4"),
    "llama3.1-8b": Case("llama3.1-8b", "Llama-3.1-8B", "v5p:2x2x2"),
    "qwen3-1.7b": Case("qwen3-1.7b", "Qwen3-1.7B", "v5e:2x4"),
    "qwen2.5-0.5b": Case("qwen2.5-0.5b", "Qwen2.5-0.5B", "v5e:2x2", ("--chips", "1")),
    "qwen3-1.7b h100": Case("qwen3-1.7b", "Qwen3-1.7B", "h100:8"),
    "qwen3-8b h200": Case("qwen3-8b", "Qwen3-8B", "h200:8"),
    "llama3-70b h100": Case("llama3-70b", "Llama-3-70B", "h100:8x8", ("--update.micro_batches=16",)),
    "qwen3-30b-a3b h100": Case("qwen3-30b-a3b", "Qwen3-30B-A3B", "h100:8x2", ("--update.micro_batches=32",)),
}
# The longest takes minutes on one core.
LIMIT_S = 7200
TABLES = ("qwen3-8b", "llama3-70b", "qwen3-30b-a3b sweep", *(name for name, case in CASES.items() if case.of == "gpu"))


def run(name: str) -> dict:
    start = time.monotonic()
    command = [sys.executable, "-m", "jaxrl_llm.cli", *CASES[name].command, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=LIMIT_S)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr.strip()[-2000:]}")
    took = {"seconds": round(time.monotonic() - start), "date": datetime.date.today().isoformat()}
    return took | {"command": "jaxrl " + " ".join(CASES[name].command), "report": json.loads(done.stdout)}


def line(name: str, found: dict) -> str:
    report = found["report"]
    best = report["compiled"][0] if "meshes" in report else report
    size = f"{best['peak']['bytes'] / 1e9:.1f} GB in {best['peak']['phase']}"
    return f"{name}: {found['seconds']} s; {size}, {'fits' if best['fits'] else 'does not fit'}"


def results_of(of: str) -> tuple[Path, dict[str, dict]]:
    """Return the file of the results of a compiler, tpu or gpu, and what is in it."""
    path = ROOT / "benchmarks" / "results" / f"plan-{of}-aot.json"
    return path, json.loads(path.read_text()) if path.exists() else {}


def write(of: str) -> None:
    """Write the tables of a compiler between their two marks of the page."""
    parts, results = [], results_of(of)[1]
    for name in (n for n in TABLES if n in results):
        found = results[name]
        # Older reports lack what came later.
        report = {"control": "none", "tree": "none", "reuse": "none"} | found["report"]
        text = show.sweep_table(report) if "meshes" in report else show.show(report)
        head, _, rest = text.partition("\n\n")
        lines = [line + "  " if line.startswith(("mesh:", "  --")) else line for line in rest.splitlines()]
        took = f"{found['date']}: {found['seconds']} s on two cores."
        parts.append(f"    {found['command']}\n\n{took} {head}\n\n" + "\n".join(lines))
    begin = BEGIN.format({"tpu": "TPUs", "gpu": "GPUs"}[of])
    before, _, after = PAGE.read_text().partition(begin)
    PAGE.write_text(before + begin + "\n\n" + "\n\n".join(parts) + "\n\n" + END + after.partition(END)[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    for name in args.names or ([] if args.write else list(CASES)):
        path, results = results_of(CASES[name].of)
        results[name] = run(name)
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(line(name, results[name]), flush=True)
    for of in ("tpu", "gpu") if args.write else ():
        write(of)


if __name__ == "__main__":
    main()

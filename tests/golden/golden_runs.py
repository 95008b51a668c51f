"""Golden runs: two short trainings, every number of which is stored to the last bit, so that a change that should change nothing is
seen to change nothing.

    python tests/golden/golden_runs.py                      compare with what is stored
    python tests/golden/golden_runs.py --against COMMIT     run COMMIT here as well and compare with it
    python tests/golden/golden_runs.py --update "LINE"      store again; LINE of CHANGELOG.md says which numbers change, and why

A run is a process of its own on one core: on two, sums round otherwise. Numbers are stored for each processor family and version of
JAX, whose compilers round differently.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STORE = Path(__file__).parent / "trainings"
DEVICES = {"plain": 1, "eight_devices": 8}
# What a clock or a compiler says.
CLOCKED = ("time/", "tokens_per_s", "compiles", "rollout/ceiling_fraction", "update/")
# A leaf of the final state, by its path.
STATE = re.compile(r"(params|opt_state|reference)\b.*")


def family() -> str:
    """Maker, family, model and widest vectors of the processor, as in `amd-26-2-avx512`: what compilers tune for."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    given = {line.partition(":")[0].strip(): line.partition(":")[2] for line in lines}
    maker = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}.get(given.get("vendor_id", "").strip(), "other")
    flags = given.get("flags", "").split()
    found = (name for name in ("amx_tile", "avx512f", "avx2") if name in flags)
    numbers = "-".join(given.get(name, "").strip() or "0" for name in ("cpu family", "model"))
    return f"{maker}-{numbers}-{next(found, 'other').removesuffix('_tile').removesuffix('f')}"


def stored(name: str) -> Path:
    import jax

    return STORE / f"{name}.{family()}.jax-{jax.__version__}.json"


def record(name: str, directory: Path, tree: Path = ROOT, cache: str | None = None) -> dict[str, Any]:
    """All that the run `name` computes with the package in `tree`: each step's numbers, its rollouts, the final state."""
    mine = {key: value for key, value in os.environ.items() if not key.startswith(("JAX", "XLA"))}
    mine |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(DEVICES[name]), "PYTHONPATH": str(tree)}
    if cache:
        mine |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, __file__, "--train", name, str(directory)]
    done = subprocess.run(command, env=mine, cwd=tree, capture_output=True, text=True, timeout=280)
    if done.returncode:
        raise RuntimeError(
            f"golden run {name}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    rows = [{k: v for k, v in json.loads(line).items() if not k.startswith(CLOCKED)} for line in lines]
    rollouts = hashlib.sha256((directory / "rollouts.jsonl").read_bytes()).hexdigest()
    return {"rows": rows, "rollouts": rollouts, "state": _state(directory)}


def _state(directory: Path) -> dict[str, int]:
    """The fingerprint of each leaf of the newest checkpoint."""
    newest = max((directory / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    described = json.loads(json.loads((newest / "meta" / "metadata").read_text())["text"])
    found = {STATE.search(path): number for path, (_, number) in described["leaves"].items()}
    return {"/".join(re.findall(r"\w+", match[0])): number for match, number in found.items() if match}


def differences(got: dict[str, Any], want: dict[str, Any]) -> list[str]:
    """The first numbers that are not those of before, in words."""
    found = []
    if len(got["rows"]) != len(want["rows"]):
        found.append(f"{len(got['rows'])} lines of metrics, want {len(want['rows'])}")
    for mine, other in zip(got["rows"], want["rows"], strict=False):
        names = [*other, *(name for name in mine if name not in other)]
        wrong = [name for name in names if mine.get(name) != other.get(name)]
        found += [f"step {other['step']}: {name}: got {mine.get(name)}, want {other.get(name)}" for name in wrong]
    if got["rollouts"] != want["rollouts"]:
        found.append("rollouts.jsonl is another")
    for path in sorted(got["state"].keys() | want["state"].keys()):
        if got["state"].get(path) != want["state"].get(path):
            found.append(f"{path} of the final state is another")
    return found


def change_problem(line: str) -> str:
    """Why golden numbers may not be stored for this reason; "" if they may."""
    has = line.strip() and line in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    return "" if has else f"got {line!r}, want a line of CHANGELOG.md that says which numbers change, and why"


def train(name: str, directory: str) -> None:
    """The run itself, in this process."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    from jaxrl_llm.cli import main

    sys.exit(main(["train", str(STORE / f"{name}.yaml"), "--run_dir", directory]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--against", metavar="COMMIT")
    parser.add_argument("--update", metavar="LINE")
    asked = parser.parse_args()
    if asked.train:
        train(*asked.train)
    if asked.update is not None and (problem := change_problem(asked.update)):
        print(f"--update: {problem}")
        return 2
    wrong = 0
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        if asked.against:
            worktree = ["git", "worktree", "add", "--quiet", "--detach", str(place / "tree"), asked.against]
            subprocess.run(worktree, cwd=ROOT, check=True)
        try:
            for name in DEVICES:
                got = record(name, place / name)
                if asked.update is not None:
                    _store(stored(name), {"change": asked.update, **got})
                    print(f"{name}: stored in {stored(name).relative_to(ROOT)}")
                    continue
                if asked.against:
                    want = record(name, place / f"{name}-before", place / "tree")
                elif stored(name).exists():
                    want = json.loads(stored(name).read_text())
                else:
                    print(
                        f"{name}: nothing was compared: {stored(name).name} is not stored; --against COMMIT compares here"
                    )
                    continue
                found = differences(got, want)
                wrong += bool(found)
                print(f"{name}: {'the same' if not found else chr(10).join(found[:20])}")
        finally:
            if asked.against:
                subprocess.run(["git", "worktree", "remove", "--force", str(place / "tree")], cwd=ROOT, check=True)
    return min(wrong, 1)


def _store(path: Path, found: dict[str, Any]) -> None:
    """One line per step: a change is then read in a diff."""
    rows = ",\n".join(json.dumps(row) for row in found["rows"])
    rest = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in found.items() if key != "rows")
    path.write_text(f'{{{rest},\n"rows": [\n{rows}\n]}}\n')


if __name__ == "__main__":
    sys.exit(main())

"""Runs on one device, and in two processes started by the launcher."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def launcher(log_dir: Path, devices: int, *options: str) -> list[str]:
    """Command that starts two processes of so many devices each; the arguments of `jaxrl` follow."""
    command = [sys.executable, str(ROOT / "launch/local.py"), "--processes", "2", "--devices", str(devices)]
    return [*command, "--log-dir", str(log_dir), *options, "--"]


def on_two_meshes(values: dict, directory: Path) -> list[list[dict]]:
    """Return the metrics of the steps of RL of a run on one device, and of 2 processes x 4 devices as (2, 2, 2)."""
    config = directory / "c.yaml"
    config.write_text(yaml.safe_dump(values | {"run_dir": str(directory / "one")}))
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": path}
    mesh = ["--run-dir", str(directory / "two"), "--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2"]
    arguments = ["train", str(config)]
    for command in ([sys.executable, "-m", "jaxrl_llm.cli", *arguments], [*launcher(directory, 4), *arguments, *mesh]):
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]
    return [
        [
            row
            for line in (directory / name / "metrics.jsonl").read_text().splitlines()
            if "loss" in (row := json.loads(line))
        ]
        for name in ("one", "two")
    ]

"""Two processes of a job: equal configs, and an error in one ends both."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIG = """
steps: 1
model: {vocab_size: 16, layers: 1, d_model: 32, heads: 8, kv_heads: 8, head_dim: 8, d_mlp: 64}
task: {kind: arithmetic, terms: 2, held_out: 16}
"""


def launch(tmp_path: Path, program: str, *arguments: str) -> tuple[int, str, str, float]:
    """Exit code, stderr of process 0, log of process 1, and seconds."""
    script = tmp_path / "program.py"
    script.write_text(f"import os, sys, time\nme = int(os.environ['JAXRL_PROCESS_ID'])\n{program}", encoding="utf-8")
    local = [sys.executable, ROOT / "launch" / "local.py", "--log-dir", tmp_path / "logs", "--grace", "30"]
    start = time.monotonic()
    done = subprocess.run(
        [*map(str, local), "--module", str(script), "--", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    other = (tmp_path / "logs" / "process_1.log").read_text(encoding="utf-8")
    return done.returncode, done.stderr.split("launch/local.py")[0], other, time.monotonic() - start


def test_different_configs_end_every_process_at_once(tmp_path):
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG, encoding="utf-8")
    program = """
from jaxrl_llm.cli import main
sys.exit(main([*sys.argv[1:], *(["--seed", "1", "--rollout.samples", "4", "--model.d_mlp", "128"] if me else [])]))
"""
    code, zero, one, seconds = launch(tmp_path, program, "train", str(config), "--run-dir", str(tmp_path / "run"))
    assert code == 2 and seconds < 20
    want = (
        "jaxrl: got different configs in the processes of a job, want the same in all:\n"
        "model.d_mlp: got 128 in process 1, want 64 as in process 0\n"
        "rollout.samples: got 4 in process 1, want 8 as in process 0\n"
        "seed: got 1 in process 1, want 0 as in process 0\n"
    )
    assert (zero, one) == (want, want)
    assert not (tmp_path / "run").exists()


def test_an_error_in_one_process_ends_the_waiting_one(tmp_path):
    """Process 0, which holds the store, waits for a failing process, and vice versa."""
    program = """
from jaxrl_llm.errors import CheckpointError
from jaxrl_llm.parallel import job

with job.ends_together():
    job.join({"seed": 0})
    if me == int(sys.argv[1]):
        raise CheckpointError("the disk is gone")
    time.sleep(60)
"""

    def ended(failing: int) -> None:
        (tmp_path / str(failing)).mkdir()
        code, *output, seconds = launch(tmp_path / str(failing), program, str(failing))
        assert code == 3 and seconds < 20
        assert "CheckpointError: the disk is gone" in output[failing]
        message = f"jaxrl: process {failing} of this job failed, so this one exits too: the disk is gone\n"
        assert output[1 - failing].endswith(message)

    with ThreadPoolExecutor(2) as both:
        list(both.map(ended, (0, 1)))

"""Whole runs: their records, a single compilation, and equal results after any interruption."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest
from two_meshes import launcher

from jaxrl_llm.config import loading
from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.environments.config import GraderConfig, RewardConfig
from jaxrl_llm.errors import Preempted, UserError
from jaxrl_llm.metrics.json_lines import read_jsonl
from jaxrl_llm.metrics.timers import CompileCounter
from jaxrl_llm.parallel.compiled_ahead import CompiledAhead
from jaxrl_llm.rollout.config import EngineConfig

ROOT = Path(__file__).parents[1]
TINY = """
steps: {steps}
model: {{vocab_size: 16, layers: 1, d_model: 32, heads: 8, kv_heads: 8, head_dim: 8, d_mlp: 64}}
warm_start: {{steps: 3, rows: 16, noise: 0.5}}
rollout: {{prompts: 8, samples: 4, max_new_tokens: 4}}
task: {{kind: arithmetic, terms: 2, held_out: 16}}
reward: {{workers: 1, grader: "row_graders:odd_if_readable"}}
experience: {{replay: {{capacity: 12}}}}
objective: {{preset: paper:ppo, loss: {{kl: {{weight: 0.01}}}}}}
update: {{minibatches: 2, epochs: 2, packing: {{kind: shared_prefix}}, optimizer: {{lr: 1.0e-3}}}}
evaluation: {{every: 5}}
checkpoint: {{every: {every}}}
metrics: {{rollout_groups: -1, tensorboard: false, samples_every: 0}}
"""
# Measured by a clock or the compiler; everything else must be equal.
CLOCKED = ("time/", "tokens_per_s", "compiles", "rollout/ceiling_fraction", "update/")


@pytest.fixture(scope="session")
def environment():
    """Environment of runs in their own process with one device; the cache of compiled programs is the suite's."""
    mine = ("JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("JAX", "XLA")) or k.startswith(mine)}
    return clean | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT / "tests")}


def write_config(directory: Path, steps: int = 10, every: int = 1) -> Path:
    path = directory / "tiny.yaml"
    path.write_text(TINY.format(steps=steps, every=every))
    return path


def command(config: Path, run_dir: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "jaxrl_llm.cli", "train", str(config), "--run-dir", str(run_dir), *more]


def run(config: Path, run_dir: Path, environment: dict, *more: str, expect: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(
        command(config, run_dir, *more), env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == expect, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Traceback" not in done.stderr
    return done


def rows(run_dir: Path) -> list[dict]:
    found = read_jsonl(run_dir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(CLOCKED)} for row in found]


def final_fingerprints(run_dir: Path) -> dict[str, int]:
    newest = max((run_dir / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name))
    described = json.loads(json.loads((newest / "meta" / "metadata").read_text())["text"])
    return {path: number for path, (_, number) in described["leaves"].items()}


def assert_same_run(one: Path, other: Path) -> None:
    """Losses, rewards, prompt ids, tokens and log-probs of every step, and every leaf of the final state, bit for bit."""
    assert rows(one) == rows(other)
    assert (one / "rollouts.jsonl").read_text() == (other / "rollouts.jsonl").read_text()
    assert final_fingerprints(one) == final_fingerprints(other)


@pytest.fixture(scope="session")
def reference(tmp_path_factory, environment):
    """Undisturbed run: 3 steps of warm start, 24 of RL."""
    directory = tmp_path_factory.mktemp("reference")
    config = write_config(directory, steps=24)
    run(config, directory / "run", environment)
    return directory / "run", config


@pytest.mark.slow
def test_a_run_records_what_it_did(reference):
    run_dir, _ = reference
    found = rows(run_dir)
    assert [row["step"] for row in found] == list(range(1, 28))
    assert [row["phase"] for row in found] == ["warm_start"] * 3 + ["rl"] * 24
    names = {
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "completions/mean_length",
        "completions/clipped_ratio",
        "entropy",
        "kl",
        "critic/loss",
    }
    names |= {
        "clip_ratio/low",
        "clip_ratio/high",
        "mismatch/max_abs_dlogp",
        "ratio/mean",
        "ratio/max",
        "loss",
        "grad_norm",
    }
    # Steps that learn from old groups do not compare the sampler with the trainer; the evaluations of such a run do.
    assert names <= {name for row in found for name in row} and "eval/mismatch_kl" in found[-1]
    assert names - {"mismatch/max_abs_dlogp"} <= found[-1].keys()
    assert 0 < max(row["groups/replayed"] for row in found[3:]), (
        "old groups fill the places of those that cannot be graded"
    )
    timed = read_jsonl(run_dir / "metrics.jsonl")[-1].keys()
    assert {"time/generate", "time/update", "time/publish", "tokens_per_s", "compiles"} <= timed
    assert [row["step"] for row in found if "eval/exact" in row] == [3, 8, 13, 18, 23, 27], (
        "the last step before RL is the first"
    )
    assert min(row["grad_norm"] for row in found) > 0, (
        "every step learns: else resumed runs would be compared in nothing"
    )
    assert all(row["alarm/ratio"] == 0 for row in found[3:])
    rollouts = read_jsonl(run_dir / "rollouts.jsonl")
    assert len(rollouts) == 24 * 8 * 4
    assert [r["uid"] for r in rollouts[::4]] == list(range(24 * 8)), "each visit of the stream once, in order"


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is(reference, environment):
    run_dir, config = reference
    before = (run_dir / "metrics.jsonl").read_bytes()
    done = run(config, run_dir, environment)
    assert "held-out accuracy" in done.stdout
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def wait_for_rows(run_dir: Path, count: int, process: subprocess.Popen, timeout_s: float = 200) -> None:
    path, until = run_dir / "metrics.jsonl", time.monotonic() + timeout_s
    while (path.read_bytes().count(b"\n") if path.exists() else 0) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, f"no step {count} after {timeout_s} s"
        time.sleep(0.01)


def start(config: Path, run_dir: Path, environment: dict) -> subprocess.Popen:
    return subprocess.Popen(
        command(config, run_dir), env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("at", [pytest.param(2, marks=pytest.mark.soak), 11])
def test_sigterm_saves_and_the_resumed_run_is_the_same(reference, environment, tmp_path, at):
    """In the warm start and in RL; checkpoints are far apart here, so only the signal's own save can help."""
    undisturbed, _ = reference
    config = write_config(tmp_path, steps=24, every=1000)
    process = start(config, tmp_path / "run", environment)
    wait_for_rows(tmp_path / "run", at, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err[-3000:]
    assert "stopped by SIGTERM after step" in err and "Traceback" not in err
    run(config, tmp_path / "run", environment, "--resume")
    assert_same_run(undisturbed, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("kills", "apart"), [(1, 9), pytest.param(8, 2, marks=pytest.mark.soak)])
def test_sigkill_at_random_instants_and_the_resumed_run_is_the_same(reference, environment, tmp_path, kills, apart):
    """A save is under way most of the time: every step is due. Killed again and again, the run must have the same result."""
    undisturbed, config = reference
    rng = random.Random(1)
    run_dir, done = tmp_path / "run", 0
    for _ in range(kills):
        process = start(config, run_dir, environment)
        wait_for_rows(run_dir, min(done + apart, 26), process)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.communicate()
        done = len(read_jsonl(run_dir / "metrics.jsonl"))
    run(config, run_dir, environment)
    assert_same_run(undisturbed, run_dir)
    names = [p.name for p in (run_dir / "checkpoints").iterdir()]
    assert [name for name in names if not name.isdigit()] == ["blobs"] and len(names) <= 4
    assert not list((run_dir / "checkpoints" / "blobs").glob("*.tmp"))


def copy(source: Path, to: Path) -> Path:
    subprocess.run(["cp", "-r", str(source), str(to)], check=True)
    return to


@pytest.mark.slow
def test_a_changed_checkpoint_is_named_and_the_one_before_is_used(reference, environment, tmp_path):
    undisturbed, config = reference
    run_dir = copy(undisturbed, tmp_path / "run")
    newest = run_dir / "checkpoints" / "27"
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 4
    largest.write_bytes(data)
    done = run(config, run_dir, environment)
    assert "step 27 unreadable" in done.stderr and "corrupt-27" in done.stderr
    assert "resuming from step 26" in done.stdout
    assert_same_run(undisturbed, run_dir)


@pytest.mark.slow
def test_when_no_checkpoint_can_be_read_the_run_does_not_start_again(reference, environment, tmp_path):
    undisturbed, config = reference
    run_dir = copy(undisturbed, tmp_path / "run")
    for path in (run_dir / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:10])
    done = run(config, run_dir, environment, expect=3)
    assert "no checkpoint can be read" in done.stderr
    assert len(read_jsonl(run_dir / "metrics.jsonl")) == 27


@pytest.mark.slow
def test_another_mesh_resumes_with_the_same_losses(reference, environment, tmp_path):
    undisturbed, config = reference
    run_dir = copy(undisturbed, tmp_path / "run")
    for step in (26, 27):
        subprocess.run(["rm", "-r", str(run_dir / "checkpoints" / str(step))], check=True)
    run(config, run_dir, environment | {"JAX_NUM_CPU_DEVICES": "8"}, "--mesh.fsdp", "2", "--mesh.tensor", "4")
    want, got = rows(undisturbed)[25], rows(run_dir)[25]
    assert got["completions/crc32"] == want["completions/crc32"]
    # Compared beside the terms that the loss is the small difference of: each is of order 1.
    assert abs(got["loss"] - want["loss"]) <= 1e-6 * max(1, abs(want["loss"]))


@pytest.mark.soak
def test_two_processes_sample_the_same_tokens(reference, environment, tmp_path):
    """2 processes x 4 devices through the launcher, against one process with one device."""
    undisturbed, _ = reference
    config = write_config(tmp_path, steps=3, every=1000)
    arguments = ["train", str(config), "--run-dir", str(tmp_path / "run"), "--mesh.fsdp", "4", "--mesh.tensor", "2"]
    done = subprocess.run(
        [*launcher(tmp_path, 4), *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    logs = "".join(p.read_text()[-3000:] for p in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:] + logs
    want, got = rows(undisturbed)[:6], rows(tmp_path / "run")
    assert [row["step"] for row in got] == [1, 2, 3, 4, 5, 6]
    assert [r.get("completions/crc32") for r in got] == [r.get("completions/crc32") for r in want]
    assert [r.get("reward") for r in got] == [r.get("reward") for r in want]
    np.testing.assert_allclose([r["loss"] for r in got], [r["loss"] for r in want], atol=1e-5)


@pytest.mark.soak
def test_sigterm_to_a_job_of_two_processes(environment, tmp_path):
    config = write_config(tmp_path, steps=2000, every=100000)
    arguments = ["train", str(config), "--run-dir", str(tmp_path / "run")]
    process = subprocess.Popen(
        [*launcher(tmp_path, 1, "--grace", "60"), *arguments],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_rows(tmp_path / "run", 5, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err[-3000:]
    saved = [int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()]
    assert len(saved) == 1 and saved[0] == len(read_jsonl(tmp_path / "run" / "metrics.jsonl"))


def tiny_run(tmp_path: Path, **changes) -> RunConfig:
    cfg = loading.load(write_config(tmp_path, steps=5))
    # The model and the mesh of `test_lora_run.py`, so that what both run is compiled once.
    return dataclasses.replace(
        cfg, run_dir=str(tmp_path / "run"), mesh=dataclasses.replace(cfg.mesh, fsdp=4, tensor=2), **changes
    )


@pytest.mark.soak
def test_a_step_that_sigterm_abandons_between_chunks_is_repeated(tmp_path, monkeypatch):
    """Asked to stop while step 6 samples, in chunks of two tokens: step 5 is saved, and the resumed run is the same."""
    from jaxrl_llm import train

    engine = EngineConfig(decode_chunk=2, window=2)
    cfg = tiny_run(tmp_path)
    cfg = dataclasses.replace(cfg, rollout=dataclasses.replace(cfg.rollout, engine=engine))
    whole = dataclasses.replace(cfg, run_dir=str(tmp_path / "whole"))
    train.train(whole)
    asked = []

    @contextmanager
    def stop_signal(ends_process, last):
        """The first call after step 5 is the loop's; the second comes between two chunks."""
        yield lambda step: asked.append(step) or asked.count(5) == 2

    with monkeypatch.context() as patched:
        patched.setattr(train, "stop_signal", stop_signal)
        with pytest.raises(Preempted, match=r"after step 5, saved in .* given up while it sampled"):
            train.train(cfg)
    train.train(cfg, must_resume=True)
    assert [row["rollout/segments"] for row in rows(tmp_path / "whole")[3:]] == [2.0] * 5
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_the_update_compiles_beside_all_that_comes_before_it(tmp_path, monkeypatch):
    from jaxrl_llm import train

    class Reached(Exception):
        pass

    def begins(run):
        raise Reached(len(started))

    started = []
    monkeypatch.setattr(CompiledAhead, "start", lambda self: started.append(self))
    monkeypatch.setattr(train, "start", begins)
    with pytest.raises(Reached, match="1"):
        train.train(tiny_run(tmp_path))


@pytest.mark.slow
def test_nothing_compiles_after_warm_up(tmp_path):
    """Twenty steps with temperatures coming and going, evaluations and saves among them."""
    from jaxrl_llm import run_context, train

    # All groups can be graded, so all tokens are fresh and show how far the sampler is.
    cfg = tiny_run(tmp_path, reward=RewardConfig((GraderConfig("row_graders:odd"),), workers=1))
    with train.open_run(cfg, False, None, False) as run:
        state, policy, _ = train.start(run)
        away = []

        def steps(state, policy, n):
            for _ in range(n):
                done = train.step(run.learner, run.source, state, policy, np.random.default_rng((0, int(state.step))))
                state, policy, metrics = done.state, done.policy, train.summary(run, done)
                run.context.recorder.log(int(state.step), metrics)
                # Fresh data, first update: the remaining difference is the sampler's error against the trainer.
                away.append(metrics["mismatch/max_abs_dlogp"])
            train.evaluate(run, state.train.params, policy)
            run_context.save(run.context, state)
            run.context.checkpoints.poll()
            return state, policy

        state, policy = steps(state, policy, 2)
        counter = CompileCounter()
        for temperature in (0.7, 1.0, 1.3, 0.9, 1.1):
            run.engine.cfg = dataclasses.replace(run.engine.cfg, temperature=temperature)
            state, policy = steps(state, policy, 4)
        assert state.step == 3 + 2 + 20
        assert counter.take()["compiles"] == 0
        assert len(away) == 22 and 0 < max(away) <= 5e-4


@pytest.mark.slow
def test_live_arrays_do_not_grow(tmp_path):
    from jaxrl_llm import train

    with train.open_run(tiny_run(tmp_path), False, None, False) as run:
        state, policy, _ = train.start(run)
        counts = []
        for _ in range(6):
            state, policy, *_ = train.step(run.learner, run.source, state, policy, np.random.default_rng(0))
            counts.append(len(jax.live_arrays()))
        assert counts[-1] == counts[1]


@pytest.mark.soak
def test_supervised_training_apart_from_rl_is_the_same_run(reference, environment, tmp_path):
    """`jaxrl sft`, twice, then `jaxrl train`; and no supervised training once RL has begun."""
    whole, config = reference
    sft = [part if part != "train" else "sft" for part in command(config, tmp_path / "run")]

    def supervised(*more: str, expect: int = 0) -> str:
        done = subprocess.run([*sft, *more], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280)
        assert done.returncode == expect, done.stderr[-2000:]
        return done.stdout + done.stderr

    assert "after supervised training" in supervised()
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3]
    # Again it only evaluates.
    supervised("--resume")
    run(config, tmp_path / "run", environment)
    assert_same_run(whole, tmp_path / "run")
    assert "got a run in which RL has started, want another run_dir" in supervised(expect=2)
    none = supervised("--warm_start.steps", "0", "--run_dir", str(tmp_path / "other"), expect=2)
    assert "warm_start.steps: got 0, want 1 or more" in none


def test_supervised_training_keeps_the_directory_for_the_whole_run(tmp_path):
    """`jaxrl train RUN` after `jaxrl sft` has steps of RL to take, and one that is refused leaves config.yaml as it was."""
    from jaxrl_llm import train

    cfg = dataclasses.replace(tiny_run(tmp_path), steps=1)
    train.sft(cfg)
    saved = Path(cfg.run_dir, "config.yaml")
    assert loading.load(saved).steps == 1
    train.train(loading.load(saved))
    assert rows(Path(cfg.run_dir))[-1]["phase"] == "rl"
    before = saved.read_bytes()
    with pytest.raises(UserError, match="got a run in which RL has started"):
        train.sft(cfg)
    assert saved.read_bytes() == before


def test_supervised_updates_that_are_not_finite_count_on_in_rl(tmp_path, monkeypatch):
    """The last of them saves nothing and replaces no finite checkpoint."""
    from jaxrl_llm import train
    from jaxrl_llm.roles import build

    makes, bad = build.make_supervised, []

    def spoiled(*args):
        supervised = makes(*args)

        def call(state):
            state, metrics = supervised(state)
            bad.append(int(state.step) > 1)
            return state, metrics | {"nonfinite": float(bad[-1])}

        return call

    monkeypatch.setattr(build, "make_supervised", spoiled)
    with train.open_run(tiny_run(tmp_path), False, None, False) as run:
        state, *_ = train.start(run)
        run.context.checkpoints.wait()
        assert bad == [False, True, True] and state.step == 3 and state.guards.nonfinite == 2
        assert run.context.checkpoints.steps() == [1]


@pytest.mark.slow
def test_failing_graders_cost_their_groups_and_are_counted(tmp_path, monkeypatch):
    from jaxrl_llm import train

    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "flaky.py").write_text(
        "import time\n"
        "def grade(sample):\n"
        "    first = int(sample.prompt[1])\n"
        "    if first == 0: raise ValueError('zero')\n"
        "    if first == 1: time.sleep(60)\n"
        "    if first == 2: return float('nan')\n"
        "    if first == 3: return '1.0'\n"
        "    return float(sample.completion == sample.answer)\n"
    )
    cfg = tiny_run(tmp_path)
    cfg = dataclasses.replace(cfg, reward=RewardConfig((GraderConfig("flaky:grade"),), workers=2, deadline_s=1.0))
    train.train(cfg)
    found = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if row["phase"] == "rl"]
    assert len(found) == 5
    kinds = ("raised", "timed_out", "not_finite", "wrong_type")
    counted = [sum(row[f"rewards/grade/{kind}"] for row in found) for kind in kinds]
    starts = [int(r["prompt"][1]) for r in read_jsonl(tmp_path / "run" / "rollouts.jsonl") if r["sample"] == 0]
    assert counted == [starts.count(first) for first in range(4)]
    assert min(counted) > 0
    graded = sum(s > 3 for s in starts)
    assert sum(row["groups/kept"] for row in found) == graded
    assert np.isfinite([row["loss"] for row in found]).all()

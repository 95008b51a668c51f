"""Errors before anything compiles: settings beyond the devices and their memory, numbers out of range, and, before jax is imported,
wrong names and files."""

import contextlib
import dataclasses
import io
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from jaxrl_llm import cli, train
from jaxrl_llm.config import schema
from jaxrl_llm.config.loading import load, validate
from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.errors import UserError
from jaxrl_llm.metrics.timers import CompileCounter
from jaxrl_llm.model.hf.config import read_config as read_model
from jaxrl_llm.perf import chips
from jaxrl_llm.plan import memory
from jaxrl_llm.plan.programs import make_checked_run, problems
from jaxrl_llm.roles.memory_check import minimum

ROOT = Path(__file__).parents[1]
CONFIG = str(ROOT / "configs/arithmetic.yaml")
SHAPES = {
    "qwen2.5-0.5b_gsm8k": "Qwen2.5-0.5B",
    "qwen3-1.7b_gsm8k": "Qwen3-1.7B",
    "llama3.1-8b_gsm8k": "Llama-3.1-8B",
    "qwen3-8b_gsm8k": "Qwen3-8B",
    "qwen3-30b-a3b_gsm8k": "Qwen3-30B-A3B",
    "llama3-70b_gsm8k": "Llama-3-70B",
}


class Passed(UserError):
    """All checks are done; the next step would compile."""


def stop_here(*args: object) -> None:
    raise Passed("passed")


def jaxrl(*args: object) -> str:
    """Stderr of a command with bad input."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        assert cli.main([str(arg) for arg in args]) == 2, stderr.getvalue()
    return stderr.getvalue()


@pytest.fixture
def train_error(monkeypatch, tmp_path):
    """Stderr of `jaxrl train` up to its first compilation, on eight devices of one CPU with 24 GB together."""
    monkeypatch.setattr(train, "open_context", stop_here)
    monkeypatch.setattr(chips, "host_memory", lambda: 24e9)
    return lambda *more: jaxrl("train", CONFIG, "--mesh.data=8", "--run-dir", tmp_path / "run", *more)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--update.attention cudnn", ["cudnn on cpu, want an NVIDIA GPU", "got cudnn with float32"]),
        ("--update.attention splash", ["splash on cpu, want a TPU", "splash for rows of 11 slots"]),
        ("--rollout.engine.weights fp8", ["got fp8 on cpu, want a GPU"]),
    ],
)
def test_settings_for_another_platform_are_refused_before_anything_compiles(train_error, tmp_path, flags, words):
    """Beside all other errors."""
    compiles = CompileCounter()
    message = train_error(*flags.split(), "--rollout.temperature", 0)
    assert all(text in message for text in words) and "rollout.temperature: got 0" in message
    assert compiles.take()["compiles"] == 0 and not (tmp_path / "run").exists()


def test_a_plan_is_checked_for_its_own_devices():
    """Prompts of 120 slots and responses of 8 make rows of 128."""
    values = {"rollout": {"engine": {"weights": "fp8"}}, "model": {"compute": "bfloat16"}}
    of = lambda platform, kind, capability="": SimpleNamespace(  # noqa: E731
        platform=platform, device_kind=kind, compute_capability=capability
    )
    tpu, h100, a100 = of("tpu", "TPU v5e"), of("gpu", "NVIDIA H100", "9.0"), of("gpu", "NVIDIA A100", "8.0")

    def found(attention: str, device: Any, slots: int = 120) -> list[str]:
        cfg = validate(values | {"update": {"attention": attention}}, "test")
        return [text.partition(", want")[0] for text in problems(cfg, cfg.model, slots, [device])]

    fp8 = "rollout.engine.weights: got fp8 on "
    assert found("splash", tpu) == [f"{fp8}TPU v5e"]
    assert found("splash", tpu, 121) == [f"{fp8}TPU v5e", "update.attention: got splash for rows of 129 slots"]
    assert found("cudnn", tpu) == [f"{fp8}TPU v5e", "update.attention: got cudnn on tpu"]
    assert found("cudnn", h100) == []
    assert found("splash", a100) == [f"{fp8}NVIDIA A100", "update.attention: got splash on gpu"]


def test_the_largest_response_length_that_fits_is_named(train_error):
    """A row keeps 512 bytes per token (2 layers x 2 key/value heads x 16 numbers x keys and values x 4 bytes), 64 rows 32,768.
    While the cache grows from 524,288 slots to 1,000,000, both are allocated: 49.95 GB; and an eighth of an evaluation's 128 x 8
    rollouts at 17 bytes per token: 2.18 GB.

    The largest: the cache grows from 32,768 slots, 32,768 (N + 32,768) + 2,176 N = 3e9 less 2 to 4 MB of the model, N = 55,010 to
    55,067.
    """
    start = time.process_time()
    message = train_error("--rollout.max-new-tokens", 1_000_000)
    assert time.process_time() - start < 2
    assert (
        "extend_suffix needs at least 52.1 GB on each device, 49.9 GB of it KV cache of rows; there are 3.0 GB"
        in message
    )
    found = re.search(
        r"rollout.max_new_tokens: got 1,000,000 with 512 rows .*, want ([\d,]+) at most, or fewer rows", message
    )
    most = int(found[1].replace(",", ""))
    assert 55_010 * 63 // 64 <= most <= 55_067
    assert train_error("--rollout.max-new-tokens", most) == "jaxrl: passed\n"
    assert train_error("--rollout.max-new-tokens", 55_100) != "jaxrl: passed\n"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        # 2 layers x 3 x 64 x 10^7 numbers, and 25,920 others.
        ("--model.d-mlp 10000000", "model: got 3,840,025,920 parameters"),
        ("--lora.rank 10000000", "lora.rank: got 10,000,000, want less"),
        ("--warm-start.rows 8000000", "warm_start.rows: got 8,000,000, want fewer"),
        (
            "--experience.replay.capacity 1000000000",
            "experience.replay.capacity: got 1000000000, want 16777216 or less",
        ),
        (
            "--experience.replay.capacity 16777216 --experience.replay.memory_mib 100000000 --rollout.max_new_tokens 64",
            "experience.replay: got capacity 16,777,216, memory_mib 1e+08, want less of one",
        ),
        (
            "--experience.replay.capacity 9 --experience.replay.memory_mib 0.001",
            "experience.replay.memory_mib: got 0.001, want 0.0",
        ),
        ("--rollout.prompts 1048576 --update.minibatches 1", "update.micro_batches: got 1, want more"),
        ("--rollout.samples 100000000", "got 6,400,000,000 rows (rollout.prompts x rollout.samples), want fewer"),
        (
            "--update.packing.kind plain --update.packing.slots 100000",
            "slots: got 100000, want 0 or at most the 1408 of",
        ),
    ],
)
def test_the_setting_that_fills_the_memory_is_named(train_error, flags, words):
    assert words in train_error(*flags.split())


def test_sampling_needs_no_memory_for_training(monkeypatch, tmp_path):
    """There is memory for the 8 bytes per parameter of sampling, not for the 16 of training, nor for 100 million responses."""
    monkeypatch.setattr(chips, "host_memory", lambda: 24e9)
    monkeypatch.setattr("jaxrl_llm.commands.sample.load_policy", stop_here)
    sample = lambda *more: jaxrl("sample", CONFIG, "--mesh.data=8", "--run-dir", tmp_path, *more)  # noqa: E731
    assert sample("--model.d-mlp", 500_000) == "jaxrl: passed\n"
    assert "want fewer" in sample("-n", 100_000_000)


@pytest.mark.parametrize("name", SHAPES)
def test_no_config_needs_more_than_its_plan(name):
    """The check counts less than the estimate of `jaxrl plan`, so that nothing that fits is refused; also where 2,048 rows x 8
    heads x 128 numbers exceed the caches of a CPU."""
    cfg = dataclasses.replace(
        load(ROOT / "configs" / f"{name}.yaml"), model=read_model(ROOT / "benchmarks/shapes" / SHAPES[name], "bfloat16")
    )
    cfg = dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, fsdp=1, tensor=1, expert=1))
    run = make_checked_run(cfg, cfg.model, 256, jax.devices()[:1])
    planned = {phase.name: phase.total for phase in memory.estimated(run)}
    needed = {phase.name: phase.total for phase in minimum(run, held_out=1, trains=True, num_sharing=0)}
    assert needed.keys() - planned.keys() == {"host"}
    assert all(0.4 * planned[phase] <= needed[phase] <= planned[phase] for phase in planned)


def test_memory_of_the_host_or_of_its_control_group(tmp_path):
    def host(groups: str, limits: dict[str, str]) -> float:
        for name, text in {
            "proc/meminfo": "MemTotal:  1000 kB\nSwapTotal: 24 kB\n",
            "proc/self/cgroup": groups,
            **limits,
        }.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return chips.host_memory(tmp_path)

    assert host("0::/\n", {}) == 1024 * 1024
    # Version 2: the limit of a parent counts too, and `max` is no limit.
    assert (
        host("0::/job/step\n", {"sys/fs/cgroup/job/memory.max": "5000\n", "sys/fs/cgroup/job/step/memory.max": "max\n"})
        == 5000
    )
    v1 = "sys/fs/cgroup/memory/{}memory.limit_in_bytes".format
    assert host("4:cpu,memory:/a\n0::/b\n", {v1(""): "9223372036854771712\n", v1("a/"): "3000\n"}) == 3000
    assert host("4:cpu:/job\n", {}) == 1024 * 1024


# Values of what a variant requires that are lists.
NEEDED = {"stages": "[[1]]", "tasks": "[{name: x, task: {kind: arithmetic}}]"}


def numbers_of(
    section: type, path: tuple[str, ...] = (), kinds: tuple[str, ...] = ()
) -> list[tuple[str, type, tuple[str, ...]]]:
    """Every number of the config: its path, its type, and flags for the variant that has it and the keys which that requires."""
    found = []
    for variant in schema.sections(section):
        kind = variant.__dataclass_fields__.get("kind")
        chosen = (*kinds, f"--{'.'.join((*path, 'kind'))}={kind.default}") if kind else kinds
        needed = [f for f in dataclasses.fields(variant) if f.default is f.default_factory is dataclasses.MISSING]
        chosen += tuple(
            f"--{'.'.join((*path, f.name))}={NEEDED.get(f.name, 'x' if f.type is str else 1)}" for f in needed
        )
        for field in dataclasses.fields(variant):
            types = [a for a in schema.alternatives(field.type) if a in (int, float)]
            found += [(".".join((*path, field.name)), a, chosen) for a in types]
            found += numbers_of(field.type, (*path, field.name), chosen)
    return found


NUMBERS = numbers_of(RunConfig)


def test_there_are_numbers():
    assert len(NUMBERS) > 150 and {"seed", "rollout.engine.decode_chunk", "update.guards.max_mismatch_kl"} < {
        n for n, *_ in NUMBERS
    }


def test_every_number_has_a_range():
    """Numbers that no array can hold are refused by name in every variant: integers as 2^63 and 10^12, floats as 10^39."""
    for name, kind, chosen in NUMBERS:
        for value in (
            ("9223372036854775808", "-9223372036854775808", "1000000000000") if kind is int else ("1e39", "-1e39")
        ):
            with pytest.raises(UserError, match=rf"--{re.escape(name)}: got -?[\d.e+]+, want"):
                validate({}, "test", [*chosen, f"--{name}={value}"])
    assert "--update.optimizer.lr: got 1e-46, want 0, or 1.2e-38 at least" in jaxrl(
        "train", CONFIG, "--update.optimizer.lr=1e-46"
    )
    assert validate({"seed": 2**32 - 1}, "test").seed == 2**32 - 1


def test_a_billion_of_anything_is_refused_or_possible(train_error):
    """Without a traceback, an array of that size or a loop over it."""
    slowest, few = 0.0, ("--task.terms=2", "--task.held_out=16")
    for name, chosen in {name: chosen for name, kind, chosen in reversed(NUMBERS) if kind is int}.items():
        start = time.process_time()
        message = train_error(*(() if name.startswith("task.") else few), *chosen, f"--{name}=1000000000")
        slowest = max(slowest, time.process_time() - start)
        assert message == "jaxrl: passed\n" or name.partition(".")[0] in message, message
    # A loop over a billion takes minutes.
    assert slowest < 10


def test_a_wrong_name_is_reported_before_jax_is_imported(tmp_path):
    """With all other errors that can be found without devices."""
    code = (
        "import sys; from jaxrl_llm import cli\n"
        "assert cli.main(sys.argv[1:]) == 2\n"
        "assert not {'jax', 'flax', 'orbax'} & set(sys.modules)"
    )
    flags = ["--reward=gsm9k", "--task={kind: file, path: none.jsonl, held_out: 1}", "--update.minibatches=5"]
    done = subprocess.run(
        [sys.executable, "-c", code, "train", CONFIG, *flags], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert 'reward.graders.0.grader: got "gsm9k", want one of' in done.stderr
    assert "none.jsonl: cannot be read" in done.stderr and "update.minibatches: got 5" in done.stderr
    evaluated = ["eval", "org/model", "--task", CONFIG, "--reward=gsm9k"]
    done = subprocess.run(
        [sys.executable, "-c", code, *evaluated], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == 0 and 'reward.graders.0.grader: got "gsm9k"' in done.stderr, done.stderr


def test_a_plan_of_a_billion_tokens_is_made_without_delay(capsys):
    """No array of that length is made, on the host either."""
    start = time.process_time()
    assert cli.main(["plan", CONFIG, "--chips", "1", "--prompt-tokens", "1000000000"]) == 0
    assert time.process_time() - start < 10 and "does not fit: needs about" in capsys.readouterr().out
    assert "--prompt-tokens: got 2147483648, want less than 2^31" in jaxrl("plan", CONFIG, "--prompt-tokens", 2**31)

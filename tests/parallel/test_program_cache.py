"""The cache of compiled programs: a second process compiles nothing, and no program of another machine is run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxrl_llm.parallel import program_cache

# Prints the result, the programs that were compiled and stored, and those that were read.
RUN = """
import collections, jax, jax.numpy as jnp, numpy as np
import jaxrl_llm as rl
jax.config.update("jax_platforms", "cpu")
events = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: events.update([name]))
rl.make_mesh()
found = jax.jit(lambda x: jnp.sin(x) @ x.T + 17)(np.ones((8, 8), np.float32))
cache = "/jax/compilation_cache/"
print(float(found.sum()), events[cache + "cache_misses"], events[cache + "cache_hits"])
"""


def run(home: Path, **variables: str) -> tuple[str, int, int]:
    mine = {key: value for key, value in os.environ.items() if not key.startswith(("JAX", "XLA"))}
    mine |= {"XDG_CACHE_HOME": str(home), **variables}
    done = subprocess.run([sys.executable, "-c", RUN], env=mine, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    value, stored, read = done.stdout.split()
    return value, int(stored), int(read)


def entries(home: Path) -> list[Path]:
    return sorted(home.rglob("*-cache"))


def test_a_second_process_compiles_nothing_and_a_broken_entry_costs_one_compilation(tmp_path):
    value, stored, read = run(tmp_path)
    assert stored > 0 and read == 0 and len(entries(tmp_path)) == stored
    assert run(tmp_path) == (value, 0, stored)
    # As a process leaves it that is killed while it writes.
    largest = max(entries(tmp_path), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-40])
    again, _, read = run(tmp_path)
    assert (again, read) == (value, stored - 1)


def test_other_flags_are_another_program(tmp_path):
    _, stored, _ = run(tmp_path)
    assert run(tmp_path, XLA_FLAGS="--xla_cpu_max_isa=AVX2")[1:] == (stored, 0)


@pytest.mark.parametrize(
    "variables", [{"JAX_ENABLE_COMPILATION_CACHE": "false"}, {"JAX_COMPILATION_CACHE_DIR": "elsewhere"}]
)
def test_what_the_user_set_stays(tmp_path, variables):
    named = {name: str(tmp_path / value) if "DIR" in name else value for name, value in variables.items()}
    run(tmp_path / "home", **named)
    assert not (tmp_path / "home").exists()


def test_a_directory_that_others_can_write_is_not_used(tmp_path):
    for mode in (0o777, 0o775):
        (home := tmp_path / "jaxrl_llm" / "programs").mkdir(parents=True, exist_ok=True)
        home.chmod(mode)
        run(tmp_path)
        assert entries(tmp_path) == []
    home.chmod(0o700)
    run(tmp_path)
    assert entries(tmp_path)


def test_another_processor_or_number_of_cores_has_a_directory_of_its_own(tmp_path, monkeypatch):
    text = "processor: 0\nmodel name\t: A\nflags\t\t: avx2 avx512f\ncpu MHz: 2400\n"
    (cpuinfo := tmp_path / "cpuinfo").write_text(text)
    mine = program_cache.machine(cpuinfo)
    cpuinfo.write_text(text.replace("2400", "1200"))
    assert program_cache.machine(cpuinfo) == mine
    for old, new in (("avx512f", "amx_tile"), ("name\t: A", "name\t: B")):
        cpuinfo.write_text(text.replace(old, new))
        assert program_cache.machine(cpuinfo) != mine
    cpuinfo.write_text(text)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(99)), raising=False)
    assert program_cache.machine(cpuinfo) != mine
    assert re.fullmatch("[0-9a-f]{12}", mine)


def test_the_oldest_programs_are_removed(tmp_path):
    for age, name in enumerate(["newest", "middle", "oldest"]):
        (path := tmp_path / name / f"jit_{name}-cache").parent.mkdir()
        path.write_bytes(bytes(100))
        os.utime(path, (1000 - age, 1000 - age))
    program_cache.trim(tmp_path, 200)
    assert [path.name for path in entries(tmp_path)] == ["jit_middle-cache", "jit_newest-cache"]
    program_cache.trim(tmp_path, 0)
    assert entries(tmp_path) == []

"""Each program is compiled once by the real compilers, for a v5e:4x4 slice of a pod and for two hosts of eight H100s.

None of them is needed. `tpu_aot` is a part of `make test`, `gpu_aot` is `make test-gpu-aot`.
"""

import dataclasses
import fcntl
import os
import pickle
from collections.abc import Callable
from types import SimpleNamespace

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from programs import (
    COMPILERS,
    DECODE_LAYERS,
    EIGHT_BILLION,
    EXPERT_MESH,
    EXPERTS,
    LONG,
    LONG_WINDOW,
    MESH,
    ONE_BILLION,
    SLIDING,
    C,
    P,
    Program,
    S,
    compile_program,
    layouts,
    lower_experts,
    lower_publish,
    lower_rollout,
    lower_update,
)

from jaxrl_llm.errors import UserError
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.perf import chips
from jaxrl_llm.plan import compilers


# A directory of tests without `__init__.py` is no package: the fixture of one would last to the end of the session.
@pytest.fixture(scope="module", autouse=True)
def no_cache():
    """A program for a topology can be written to jax's persistent cache and not be read from it: that warns and compiles again."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()
        yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session", params=[pytest.param(of, marks=mark) for of, mark in COMPILERS.items()])
def topology(request):
    """Sixteen chips of v5e in one slice; two hosts of eight H100s. `of`: the name of the compiler."""
    want = {"tpu": "v5e:4x4", "gpu": "h100:8x2"}[request.param]
    # Before libtpu loads: several processes (pytest -n) may compile at a time.
    for variable, value in compilers.OF_TPUS.items():
        os.environ.setdefault(variable, value)
    try:
        compilers.check(chips.parse_topology(want))
    except UserError as missing:
        pytest.skip(str(missing))
    return SimpleNamespace(of=request.param, devices=compilers.devices_of(chips.parse_topology(want), want))


@pytest.fixture(scope="session")
def compile_once(tmp_path_factory, topology):
    """Compile under a name; the workers of pytest-xdist share the result through a file."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder

    def get(name: str, cfg: ModelConfig, lower: Callable[[], jax.stages.Lowered]) -> Program:
        name = f"{topology.of}-{name}"
        with open(folder / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            path = folder / f"{name}.pickle"
            if not path.exists():
                path.write_bytes(pickle.dumps(compile_program(topology, cfg, lower)))
            program = pickle.loads(path.read_bytes())
        print(
            f"{name}: {program.seconds:.0f} s to compile; MB per chip: argument {program.argument / 1e6:.0f}, "
            f"output {program.output / 1e6:.0f}, temp {program.temp / 1e6:.0f}, alias {program.alias / 1e6:.0f}, "
            f"together {program.chip / 1e6:.0f}"
        )
        return program

    return get


@pytest.fixture(scope="session")
def decode_chunk(topology, compile_once) -> Program:
    cfg = dataclasses.replace(ONE_BILLION, layers=DECODE_LAYERS)
    return compile_once("decode_chunk", cfg, lambda: lower_rollout(cfg, layouts(topology)[1], "decode_chunk", P, C))


@pytest.fixture(scope="session")
def prefill(topology, compile_once) -> Program:
    cfg = dataclasses.replace(ONE_BILLION, layers=DECODE_LAYERS)
    return compile_once("prefill", cfg, lambda: lower_rollout(cfg, layouts(topology)[1], "prefill", P, S))


@pytest.fixture(scope="session")
def eight_billion(topology, compile_once) -> Program:
    layout = layouts(topology)[1]
    return compile_once(
        "eight-billion", EIGHT_BILLION, lambda: lower_rollout(EIGHT_BILLION, layout, "decode_chunk", P, C)
    )


@pytest.fixture(scope="session", params=[MESH, (2, 2, 4)], ids=str)
def publish(request, topology, compile_once) -> Program:
    name = "publish-" + "x".join(map(str, request.param))
    return compile_once(name, ONE_BILLION, lambda: lower_publish(ONE_BILLION, *layouts(topology, request.param)))


@pytest.fixture(scope="session")
def update(topology, compile_once) -> Program:
    return compile_once("update", ONE_BILLION, lambda: lower_update(ONE_BILLION, layouts(topology)[0]))


@pytest.fixture(scope="session")
def sliding(topology, compile_once) -> Program:
    """In one chunk of 2,000 steps."""
    layout = layouts(topology)[1]
    return compile_once(
        "sliding", SLIDING, lambda: lower_rollout(SLIDING, layout, "decode_chunk", P, LONG_WINDOW, steps=LONG)
    )


@pytest.fixture(scope="session")
def experts_chunk(topology, compile_once) -> Program:
    layout = layouts(topology, EXPERT_MESH)[1]
    return compile_once("experts-chunk", EXPERTS, lambda: lower_rollout(EXPERTS, layout, "decode_chunk", P, C))


@pytest.fixture(scope="session")
def experts_gradient(topology, compile_once) -> Program:
    layout = layouts(topology, EXPERT_MESH)[0]
    return compile_once("experts-gradient", EXPERTS, lambda: lower_experts(EXPERTS, layout))

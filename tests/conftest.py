"""Eight CPU devices for every test, set before any backend starts, and one cache of compiled programs for the whole suite."""

import gc
import hashlib
import os
import platform
import signal
import sys
from pathlib import Path

import jax
import pytest

CACHE_BYTES = 1_000_000_000


def machine() -> str:
    """A digest of what compiled code depends on and jax's own key leaves out: the processor, where a home is shared."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text(encoding="utf-8").splitlines() if cpu.exists() else [platform.processor()]
    about = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    return hashlib.sha256("\n".join([platform.machine(), *(about or lines)]).encode()).hexdigest()[:12]


OWN = Path(__file__).parents[1] / ".pytest_cache" / f"xla-{machine()}"
# In the environment for the processes that tests start; a directory that the user names stays.
if os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(OWN)) == str(OWN):
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    # A plugin of pytest may have imported jax before, which reads the environment then.
    jax.config.update("jax_compilation_cache_dir", str(OWN))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
# A background process of a script ignores Ctrl-C, and so would all processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)


def trim(directory: Path, most: int) -> None:
    """Remove the oldest programs, which the code no longer makes, until at most so many bytes are left."""
    files = sorted((f.stat().st_mtime, f.stat().st_size, f) for f in directory.glob("*-cache"))
    total = sum(size for _, size, _ in files)
    for _, size, path in files:
        if total > most:
            path.unlink(missing_ok=True)
            total -= size


# Compiled programs are mapped into memory, each in dozens of parts. A process may have 65,530: beyond, the compiler crashes.
MANY_MAPPINGS = 20_000


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Programs that tests have compiled so far, and what holds them, when there are many: other files hardly use them."""
    yield
    maps, here = Path("/proc/self/maps"), str(Path(__file__).parent)
    if maps.exists() and maps.read_bytes().count(b"\n") > MANY_MAPPINGS:
        for module in [m for m in sys.modules.values() if (getattr(m, "__file__", None) or "").startswith(here)]:
            for cached in [x for x in vars(module).values() if hasattr(x, "cache_clear")]:
                cached.cache_clear()
        jax.clear_caches()
        gc.collect()


def pytest_sessionstart(session) -> None:
    if not hasattr(session.config, "workerinput"):
        trim(OWN, CACHE_BYTES)


def pytest_collection_modifyitems(items) -> None:
    """Files with what is long first, so that no worker ends minutes after the others."""
    long = {item.path for item in items if any(item.get_closest_marker(name) for name in ("slow", "tpu_aot", "soak"))}
    items.sort(key=lambda item: item.path not in long)

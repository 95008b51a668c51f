"""Eight CPU devices for every test, set before any backend starts, and one cache of compiled programs for the whole suite."""

import gc
import os
import signal
import sys
from pathlib import Path

import jax
import pytest

from jaxrl_llm.parallel import program_cache

CACHE_BYTES = 1_000_000_000


OWN = Path(__file__).parents[1] / ".pytest_cache" / f"xla-{program_cache.machine()}"
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


# Compiled programs are mapped into memory, each in dozens of parts. A process may have 65,530: beyond, the compiler crashes.
MANY_MAPPINGS = 20_000


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Programs that tests have compiled so far, and what holds them, when there are many: other files hardly use them."""
    assert jax.config.jax_enable_compilation_cache, (
        "the files before have turned the cache of the suite off, and left it so"
    )
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
        program_cache.trim(OWN, CACHE_BYTES)


# At Python's threshold of 700 new objects the garbage collector walks what jax keeps for 4 % of the suite's time.
gc.set_threshold(100_000, 50, 50)


def pytest_collection_finish() -> None:
    """Leave the tests themselves to no collection."""
    gc.freeze()


def pytest_collection_modifyitems(items) -> None:
    """Files with what is long first, so that no worker ends minutes after the others."""
    long = {item.path for item in items if any(item.get_closest_marker(name) for name in ("slow", "tpu_aot", "soak"))}
    items.sort(key=lambda item: item.path not in long)

"""JAX's persistent cache of compiled programs, in `$XDG_CACHE_HOME/jaxrl_llm/programs` or under `~/.cache`.

A run compiles what the run before it compiled. JAX's key of an entry has the program, the compiler's version, its flags and the
devices, but neither the processor nor the number of its cores, for which XLA:CPU compiles too: they name the directory, so that
machines may share a home directory.
"""

import contextlib
import hashlib
import os
import platform
import stat
from pathlib import Path

import jax
import jaxlib

MAX_BYTES = 2 << 30


def use_program_cache() -> None:
    """Set JAX's cache directory, unless a directory is set already, or no directory of this user can be written.

    `JAX_COMPILATION_CACHE_DIR` names another directory, and `JAX_ENABLE_COMPILATION_CACHE=false` turns the cache off.
    """
    if jax.config.jax_compilation_cache_dir is not None or not jax.config.jax_enable_compilation_cache:
        return
    try:
        home = _home()
        directory = home / f"jaxlib-{jaxlib.__version__}-{machine()}"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        usable = _only_ours(home) and _only_ours(directory) and os.access(directory, os.W_OK)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return
    if usable:
        trim(home, MAX_BYTES)
        jax.config.update("jax_compilation_cache_dir", str(directory))
        # A start has hundreds of small programs.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxrl_llm" / "programs"


def _only_ours(directory: Path) -> bool:
    """True if no other user can put code there, which JAX would run."""
    found = directory.stat()
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return a digest of the processor, its instruction sets and the number of cores that this process may use."""
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else [platform.processor()]
    about = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return hashlib.sha256("\n".join([platform.machine(), str(cores), *(about or lines)]).encode()).hexdigest()[:12]


def trim(directory: Path, most: int) -> None:
    """Remove the oldest programs below `directory` until at most `most` bytes are left."""
    found = []
    for path in directory.rglob("*-cache"):
        with contextlib.suppress(OSError):  # another process has just removed it
            about = path.stat()
            found.append((about.st_mtime, about.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= most:
            break
        with contextlib.suppress(OSError):
            path.unlink()
        total -= size

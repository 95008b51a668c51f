"""Description of the machine, for results files."""

import os
import platform
import re
import subprocess
from pathlib import Path

import jax
import jaxlib

HERE = Path(__file__).parent


def processor() -> str:
    """Return the CPU's model name; "unknown" if /proc/cpuinfo has none."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        return "unknown"
    return found.group(1) if found else "unknown"


def git(*args: str) -> str:
    try:
        done = subprocess.run(["git", *args], cwd=HERE, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def machine() -> dict:
    on_cpu = jax.default_backend() == "cpu"
    return {
        "backend": jax.default_backend(),
        "device": processor() if on_cpu else jax.devices()[0].device_kind,
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "commit": git("rev-parse", "HEAD") or "unknown",
        "changed_files": git("status", "--porcelain", "--", "jaxrl_llm").splitlines(),
        "load_before": os.getloadavg()[0],
        "load_after": os.getloadavg()[0],
    }


def file_name(found: dict) -> str:
    """Return `<device>-<cores>core`, for the names of results files."""
    device = re.sub(r"[^a-z0-9]+", "-", found["device"].lower()).strip("-")
    return f"{'cpu-' if found['backend'] == 'cpu' else ''}{device}-{found['cores']}core"

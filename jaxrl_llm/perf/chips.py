"""Kinds of chips: memory and published peaks, in one table. Imports no jax.

Sources: Google Cloud's TPU system pages and "How to Scale Your Model" (Austin et al. 2025, the table of TPU specs); NVIDIA's data
sheets of A100, H100, H100 NVL, H200 and H200 NVL, dense rates.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

from jaxrl_llm.errors import UserError


class Chip(NamedTuple):
    """One accelerator. A rate of 0 is not published."""

    name: str
    memory: float
    """Bytes."""
    flops: float = 0.0
    """Of bfloat16 products, a second, without sparsity."""
    hbm: float = 0.0
    """Bytes a second of its main memory."""
    wire: float = 0.0
    """Bytes a second that it receives through one axis of the slice, both directions; for a GPU through all its links."""
    clock: float = 0.0
    """Cycles a second of the matrix units: what the compiler's estimated cycles are divided by."""


V4 = Chip("v4", 32e9, 2.75e14, 1.2e12, 9e10, 1.05e9)
V5E = Chip("v5e", 16e9, 1.97e14, 8.1e11, 9e10, 1.5e9)
V5P = Chip("v5p", 95e9, 4.59e14, 2.77e12, 1.8e11, 1.75e9)
V6E = Chip("v6e", 32e9, 9.18e14, 1.64e12, 1.8e11, 1.75e9)
TPUS = {chip.name: chip for chip in (V4, V5E, V5P, V6E)}
A100_40 = Chip("A100 40GB", 40e9, 3.12e14, 1.555e12, 3e11)
H200 = Chip("H200", 141e9, 9.89e14, 4.8e12, 4.5e11)
# By what JAX calls them; a GPU's name may go on behind it.
KINDS = {
    "TPU v4": V4,
    "TPU v5 lite": V5E,
    "TPU v5e": V5E,
    "TPU v5": V5P,
    "TPU v5p": V5P,
    "TPU v6 lite": V6E,
    "TPU v6e": V6E,
    "NVIDIA A100-SXM4-40GB": A100_40,
    "NVIDIA A100-PCIE-40GB": A100_40,
    "NVIDIA A100-SXM4-80GB": Chip("A100 80GB", 80e9, 3.12e14, 2.039e12, 3e11),
    "NVIDIA A100 80GB PCIe": Chip("A100 80GB PCIe", 80e9, 3.12e14, 1.935e12, 3e11),
    "NVIDIA H100": Chip("H100", 80e9, 9.89e14, 3.35e12, 4.5e11),
    "NVIDIA H100 PCIe": Chip("H100 PCIe", 80e9, 7.56e14, 2e12, 3e11),
    "NVIDIA H100 NVL": Chip("H100 NVL", 94e9, 8.35e14, 3.9e12, 3e11),
    "NVIDIA H200": H200,
    "NVIDIA H200 NVL": H200._replace(name="H200 NVL", flops=8.35e14),
}


def host_memory(root: Path = Path("/")) -> float:
    """Bytes that this process may use: the host's, swap included, or the limit of a control group that it is in."""
    total = sum(
        int(size) * 1024 for size in re.findall(r"^(?:Mem|Swap)Total: *(\d+)", _text(root / "proc/meminfo"), re.M)
    )
    limits = [total or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    groups = root / "sys/fs/cgroup"
    for kinds, own in re.findall(r"^\d+:(.*?):/(.*)$", _text(root / "proc/self/cgroup"), re.M):
        # Version 2 names no kind. Inside a container the path may be the host's, and the limit stand at the top.
        if kinds and "memory" not in kinds.split(","):
            continue
        top, name = (groups / "memory", "memory.limit_in_bytes") if kinds else (groups, "memory.max")
        texts = [_text(place / name).strip() for place in (top, *(top / p for p in (Path(own), *Path(own).parents)))]
        limits += [int(text) for text in texts if text.isdigit()]
    return float(min(limits))


def _text(path: Path) -> str:
    """ "" where there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def known(kind: str) -> Chip | None:
    """Of `jax.Device.device_kind`, the longest name that fits. None where nothing is known of it."""
    gpu = kind.startswith("NVIDIA")
    fitting = [name for name in KINDS if kind == name or (gpu and f"{kind} ".startswith(f"{name} "))]
    return KINDS[max(fitting, key=len)] if fitting else None


def of_topology(name: str) -> Chip:
    """The chip of `v5e:4x4`. Raises UserError for a name of another form."""
    kind, colon, sizes = name.partition(":")
    if kind not in TPUS or not colon or not all(n.isdigit() for n in sizes.split("x")):
        raise UserError(f"--topology: got {name}, want a kind ({', '.join(TPUS)}) and sizes, as v5e:4x4 or v5p:4x4x4")
    return TPUS[kind]


def of_device(platform: str, kind: str, count: int) -> Chip:
    """The chip of a local device, one of `count`. Those of a CPU share the host's memory.

    Raises UserError for an accelerator whose memory is not known here.
    """
    if platform == "cpu":
        return Chip("cpu", host_memory() / count)
    found = known(kind)
    if found is None:
        names = dict.fromkeys(chip.name for chip in KINDS.values())
        raise UserError(f"{kind}: got a chip that plan knows nothing of, want one of {', '.join(names)}, or --topology")
    return found

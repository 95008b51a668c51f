"""Chips: memory and published peak rates, in one table. Imports no jax.

Sources: Google Cloud's TPU system pages and "How to Scale Your Model" (Austin et al. 2025, the table of TPU specs); NVIDIA's data
sheets of A100, H100, H100 NVL, H200, H200 NVL and DGX B200, dense rates; the user guides of DGX A100, H100, H200 and B200 for the
network: eight adapters for eight GPUs, of 200 (A100) or 400 Gbit/s.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

from jaxrl_llm.errors import UserError


class Chip(NamedTuple):
    """One accelerator. A rate of 0: not published."""

    name: str
    memory: float
    """Bytes."""
    flops: float = 0.0
    """bfloat16 FLOPs per second, without sparsity."""
    hbm: float = 0.0
    """Bytes per second of its main memory."""
    wire: float = 0.0
    """Bytes per second received through one axis of the slice, both directions; for a GPU through all its links."""
    clock: float = 0.0
    """Cycles per second of the matrix units, which the compiler's estimated cycles are divided by."""
    network: float = 0.0
    """Bytes per second received from other hosts, if `wire` is within a host. A TPU slice is one network."""


V4 = Chip("v4", 32e9, 2.75e14, 1.2e12, 9e10, 1.05e9)
V5E = Chip("v5e", 16e9, 1.97e14, 8.1e11, 9e10, 1.5e9)
V5P = Chip("v5p", 95e9, 4.59e14, 2.77e12, 1.8e11, 1.75e9)
V6E = Chip("v6e", 32e9, 9.18e14, 1.64e12, 1.8e11, 1.75e9)
TPUS = {chip.name: chip for chip in (V4, V5E, V5P, V6E)}
A100_40 = Chip("A100 40GB", 40e9, 3.12e14, 1.555e12, 3e11, network=2.5e10)
A100 = Chip("A100 80GB", 80e9, 3.12e14, 2.039e12, 3e11, network=2.5e10)
H100 = Chip("H100", 80e9, 9.89e14, 3.35e12, 4.5e11, network=5e10)
H200 = Chip("H200", 141e9, 9.89e14, 4.8e12, 4.5e11, network=5e10)
B200 = Chip("B200", 180e9, 2.25e15, 8e12, 9e11, network=5e10)
# The GPUs of a topology, with NVLink among all of a host.
GPUS = {"a100": A100, "h100": H100, "h200": H200, "b200": B200}
# By `jax.Device.device_kind`; a GPU's may continue after the name.
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
    "NVIDIA A100-SXM4-80GB": A100,
    "NVIDIA A100 80GB PCIe": Chip("A100 80GB PCIe", 80e9, 3.12e14, 1.935e12, 3e11),
    "NVIDIA B200": B200,
    "NVIDIA H100": H100,
    "NVIDIA H100 PCIe": Chip("H100 PCIe", 80e9, 7.56e14, 2e12, 3e11),
    "NVIDIA H100 NVL": Chip("H100 NVL", 94e9, 8.35e14, 3.9e12, 3e11),
    "NVIDIA H200": H200,
    "NVIDIA H200 NVL": H200._replace(name="H200 NVL", flops=8.35e14, network=0.0),
}


def host_memory(root: Path = Path("/")) -> float:
    """Return the bytes that this process may use: the host's, swap included, or the limit of its control group."""
    total = sum(
        int(size) * 1024 for size in re.findall(r"^(?:Mem|Swap)Total: *(\d+)", _text(root / "proc/meminfo"), re.M)
    )
    limits = [total or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    groups = root / "sys/fs/cgroup"
    for kinds, own in re.findall(r"^\d+:(.*?):/(.*)$", _text(root / "proc/self/cgroup"), re.M):
        # Version 2 names no kind. Inside a container the path may be the host's, with the limit at the top.
        if kinds and "memory" not in kinds.split(","):
            continue
        top, name = (groups / "memory", "memory.limit_in_bytes") if kinds else (groups, "memory.max")
        texts = [_text(place / name).strip() for place in (top, *(top / p for p in (Path(own), *Path(own).parents)))]
        limits += [int(text) for text in texts if text.isdigit()]
    return float(min(limits))


def _text(path: Path) -> str:
    """Return the file's text, "" if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def lookup(kind: str) -> Chip | None:
    """Return the chip of a `jax.Device.device_kind`, by the longest name that matches; None if it is not in the table."""
    gpu = kind.startswith("NVIDIA")
    fitting = [name for name in KINDS if kind == name or (gpu and f"{kind} ".startswith(f"{name} "))]
    return KINDS[max(fitting, key=len)] if fitting else None


def granted(chip: Chip) -> float:
    """Return the bytes of a chip that JAX uses: of a GPU the fraction XLA_PYTHON_CLIENT_MEM_FRACTION, by default 0.75.

    Raises UserError if the variable is no positive number.
    """
    if chip not in KINDS.values() or chip.name in TPUS:
        return chip.memory
    given = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")
    if not re.fullmatch(r"\d*\.?\d+", given) or not float(given):
        raise UserError(f"XLA_PYTHON_CLIENT_MEM_FRACTION: got {given!r}, want a positive number, as 0.9")
    return chip.memory * float(given)


class Topology(NamedTuple):
    """Accelerators that may not exist here."""

    chip: Chip
    sizes: tuple[int, ...]
    """The edges of a TPU slice; the GPUs of a host, and the number of hosts."""

    @property
    def has_gpus(self) -> bool:
        return self.chip.name not in TPUS


def parse_topology(name: str) -> Topology:
    """Return the topology of this name: `v5e:4x4`, a TPU slice; `h100:8`, a host of eight GPUs; `h100:8x4`, four such hosts.

    Raises UserError for any other form.
    """
    kind, colon, sizes = name.partition(":")
    chip = TPUS.get(kind) or GPUS.get(kind)
    numbers = tuple(int(n) if n.isdecimal() and n.isascii() else 0 for n in sizes.split("x"))
    if not chip or not colon or 0 in numbers or (kind in GPUS and len(numbers) > 2):
        raise UserError(
            f"--topology: got {name}, want a kind ({', '.join((*TPUS, *GPUS))}) and sizes: v5e:4x4 or v5p:4x4x4 for TPUs, "
            "h100:8 or h100:8x4 (GPUs of a host x hosts) for GPUs"
        )
    if kind in GPUS and numbers[0] > 8:
        raise UserError(f"--topology: got {name}, want at most 8 GPUs of a host; two hosts of 8 are {kind}:8x2")
    return Topology(chip, (*numbers, 1) if kind in GPUS and len(numbers) == 1 else numbers)


def of_device(platform: str, kind: str, count: int) -> Chip:
    """Return the chip of a local device, one of `count`. CPU devices share the host's memory.

    Raises UserError for an accelerator that is not in the table.
    """
    if platform == "cpu":
        return Chip("cpu", host_memory() / count)
    found = lookup(kind)
    if found is None:
        names = dict.fromkeys(chip.name for chip in KINDS.values())
        raise UserError(
            f"{kind}: got a chip that is not in the table of chips, want one of {', '.join(names)}, or --topology"
        )
    return found

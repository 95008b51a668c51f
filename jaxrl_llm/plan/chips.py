"""Kinds of chips: memory and published peaks. Imports no jax.

Sources: Google Cloud's TPU system pages and "How to Scale Your Model" (Austin et al. 2025, the table of TPU specs); NVIDIA's data
sheets of H100 SXM and H200, dense rates.
"""

import os
from typing import NamedTuple

from jaxrl_llm.errors import UserError


class Chip(NamedTuple):
    """One accelerator. A rate of 0 is not published."""

    name: str
    memory: float
    """Bytes."""
    flops: float = 0.0
    """Of bfloat16 products, a second."""
    hbm: float = 0.0
    """Bytes a second of its main memory."""
    wire: float = 0.0
    """Bytes a second that it receives through one axis of the slice, both directions; for a GPU through all its links."""
    clock: float = 0.0
    """Cycles a second of the matrix units: what the compiler's estimated cycles are divided by."""


CHIPS = {
    "v4": Chip("v4", 32e9, 2.75e14, 1.2e12, 9e10, 1.05e9),
    "v5e": Chip("v5e", 16e9, 1.97e14, 8.1e11, 9e10, 1.5e9),
    "v5p": Chip("v5p", 95e9, 4.59e14, 2.77e12, 1.8e11, 1.75e9),
    "v6e": Chip("v6e", 32e9, 9.18e14, 1.64e12, 1.8e11, 1.75e9),
    "H100": Chip("H100", 80e9, 9.89e14, 3.35e12, 4.5e11),
    "H200": Chip("H200", 141e9, 9.89e14, 4.8e12, 4.5e11),
}
# What JAX calls them.
DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
}


def of_topology(name: str) -> Chip:
    """The chip of `v5e:4x4`. Raises UserError for a name of another form."""
    kind, colon, sizes = name.partition(":")
    known = [chip for chip in CHIPS if chip.startswith("v")]
    if kind not in known or not colon or not all(n.isdigit() for n in sizes.split("x")):
        raise UserError(f"--topology: got {name}, want a kind ({', '.join(known)}) and sizes, as v5e:4x4 or v5p:4x4x4")
    return CHIPS[kind]


def of_device(platform: str, kind: str, count: int) -> Chip:
    """The chip of a local device, one of `count`. Those of a CPU share the host's memory.

    Raises UserError for an accelerator whose memory is not known here.
    """
    if platform == "cpu":
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Chip("cpu", host / count)
    if kind in DEVICE_KINDS:
        return CHIPS[DEVICE_KINDS[kind]]
    found = next((chip for name, chip in CHIPS.items() if name in kind), None)
    if found is None:
        raise UserError(f"{kind}: got a chip that plan knows nothing of, want one of {', '.join(CHIPS)}, or --topology")
    return found

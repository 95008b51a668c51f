"""`publish`: bytes per second from the trainer's parameters to the policy's, compared with a copy.

    bytes = N (4 + b)     every f32 parameter read once, every entry of b bytes of the compute dtype written once

The ceiling is the bandwidth of an in-place copy of an array of the same bytes. On one device there is no communication.
"""

from collections.abc import Callable

import numpy as np

from benchmarks.clock import Timing
from benchmarks.models import Workload, layouts
from jaxrl_llm.model.publish import jit_publish, make_empty_policy
from jaxrl_llm.perf.ceilings import copy_bandwidth
from jaxrl_llm.types import PyTree


def moved_bytes(work: Workload) -> int:
    return work.num_params() * (4 + work.itemsize)


def calls(work: Workload, params: PyTree) -> dict[str, Callable[[], object]]:
    """Return the program to time. Each call reuses the buffers of the previous policy, as in training."""
    cfg, (train, decode) = work.cfg, layouts()
    publish, policy = jit_publish(cfg, train, decode), make_empty_policy(cfg, decode)()

    def call() -> object:
        nonlocal policy
        policy = publish(params, np.int32(0), policy)
        return policy

    return {f"publish {work.name}": call}


def ceiling(work: Workload, seconds: float) -> float:
    """Return bytes per second."""
    return copy_bandwidth(moved_bytes(work), seconds)


def result(work: Workload, times: dict[str, Timing], bandwidth: float) -> dict:
    time, moved = times[f"publish {work.name}"], moved_bytes(work)
    return {
        "program": "publish",
        "size": work.size,
        "compute": work.compute,
        "shapes": {"parameters": work.num_params()},
        "time": time.as_dict(),
        "bytes": moved,
        "bytes_per_s": moved / time.median,
        "ceiling": {"bytes_per_s": bandwidth},
        "fraction_of_ceiling": moved / time.median / bandwidth,
    }

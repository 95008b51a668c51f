"""Rates of matrix products by torch and NumPy: reads {"products": [[pass, rows, k, n, copies]], "compute": .., "seconds": ..} from
the standard input, writes {library: [FLOP/s of each product]}. Passes as in `jaxrl_llm.perf.ceilings.CONTRACTIONS`."""

import itertools
import json
import statistics
import sys
import time
from functools import partial

import numpy as np
import torch


def rate(product, flops: float, seconds: float) -> float:
    """Return FLOPs per second, the median over calls for `seconds`."""
    product()
    took, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(took) < 5:
        start = time.perf_counter()
        product()
        took.append(time.perf_counter() - start)
    return flops / statistics.median(took)


def shapes(name: str, rows: int, k: int, n: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return {"forward": ((rows, k), (k, n)), "dx": ((rows, n), (k, n)), "dw": ((rows, k), (rows, n))}[name]


def multiply(name: str, a, b):
    return {"forward": lambda: a @ b, "dx": lambda: a @ b.T, "dw": lambda: a.T @ b}[name]()


def operands(library: str, shape: tuple[int, int], compute: str):
    return torch.randn(shape).to(getattr(torch, compute)) if library == "torch" else np.ones(shape, np.float32)


def rates(library: str, given: dict) -> list[float]:
    found = []
    for name, rows, k, n, copies in given["products"]:
        left, right = (partial(operands, library, shape, given["compute"]) for shape in shapes(name, rows, k, n))
        one, many = left(), itertools.cycle([right() for _ in range(copies)])
        product = partial(lambda name, one, many: multiply(name, one, next(many)), name, one, many)
        found.append(rate(product, 2.0 * rows * k * n, given["seconds"]))
    return found


def main() -> None:
    given = json.load(sys.stdin)
    torch.set_grad_enabled(False)
    libraries = ("torch", "numpy") if given["compute"] == "float32" else ("torch",)
    print(json.dumps({library: rates(library, given) for library in libraries}))


if __name__ == "__main__":
    main()

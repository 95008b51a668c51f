"""`python -m benchmarks.products [--sizes S,M] [--compute float32,bfloat16] [--out FILE.json]`: the products of an update and of a
decode step by XLA, torch and NumPy, and the fraction of what they allow that the whole programs reach.

The products are those with weights, as `benchmarks.update` (a group of 8 in one row: 64 + 8 x 128 tokens) and `benchmarks.generate`
(64 and 8 rows) have them: forward, dx = g w', dw = x' g. In a decode step each matrix is another one in memory.

    rate of a library     FLOPs of all products / seconds of all at the library's own rates
    XLA's bound           the seconds of the products at XLA's rates, dw as `model.products` has it / the program's seconds
    the machine's bound   the same, each product at the rate of the fastest library

torch and NumPy run in the environment of `benchmarks.peers.environments transformers`; without it they are left out.
"""

import argparse
import json
import subprocess
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import generate
from benchmarks.clock import alternate
from benchmarks.machine import machine
from benchmarks.models import DTYPES, NEW_TOKENS, PROMPT_SLOTS, SAMPLES, Workload, make_params
from benchmarks.peers import environments
from benchmarks.table import rows_of
from benchmarks.update import Case
from jaxrl_llm.errors import UserError
from jaxrl_llm.model.products import sum_of_outer_products
from jaxrl_llm.perf.ceilings import CONTRACTIONS
from jaxrl_llm.perf.work import weight_products

SECONDS = 0.2
ROOT = Path(__file__).parents[1]
Product = tuple[str, int, int, int, int]
"""pass, rows, inputs, outputs, and how many matrices of that shape there are."""


def xla_rate(product: Product, compute: str) -> float:
    """Return FLOPs per second of one product, over all its matrices in turn; each waits for the whole of the one before."""
    name, rows, k, n, copies = product
    left = {"forward": (rows, k), "dx": (rows, n), "dw": (rows, k)}[name]
    right = (rows, n) if name == "dw" else (k, n)
    rng = np.random.default_rng(0)
    x, *ws = (jnp.asarray(rng.standard_normal(s), compute) for s in (left, *[right] * copies))

    def multiply(x: jax.Array, w: jax.Array) -> jax.Array:
        if name == "dw":
            return sum_of_outer_products(x, w, 1)
        return jax.lax.dot_general(x, w, (CONTRACTIONS[name], ((), ())), preferred_element_type=jnp.float32)

    @jax.jit
    def all_in_turn(x: jax.Array, ws: list[jax.Array]) -> jax.Array:
        largest = jnp.zeros((), jnp.float32)
        for w in ws:
            largest = jnp.max(multiply(x + (0 * largest).astype(x.dtype), w))
        return largest

    jax.block_until_ready(all_in_turn(x, ws))
    took, end = [], time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(took) < 5:
        start = time.perf_counter()
        jax.block_until_ready(all_in_turn(x, ws))
        took.append(time.perf_counter() - start)
    return copies * 2.0 * rows * k * n / float(np.median(took))


def other_rates(products: list[Product], compute: str) -> dict[str, list[float]]:
    """Return the rates of the other libraries; {} without their environment."""
    try:
        python = environments.python("transformers")
    except UserError as error:
        print(error)
        return {}
    asked = json.dumps({"products": products, "compute": compute, "seconds": SECONDS})
    command = [python, "-m", "benchmarks.peers.workers.products"]
    done = subprocess.run(command, input=asked, cwd=ROOT, capture_output=True, text=True, check=True, timeout=600)
    return json.loads(done.stdout)


def update_products(work: Workload) -> list[tuple[Product, float]]:
    """Return the products of one update, and how often it computes each."""
    tokens, scored = PROMPT_SLOTS + SAMPLES * NEW_TOKENS, SAMPLES * NEW_TOKENS
    *layers, (d, vocab, _) = weight_products(work.cfg)
    found = [((name, tokens, k, n, 1), count * work.prompts) for k, n, count in layers for name in CONTRACTIONS]
    # The backward pass computes the logits again.
    head = {"forward": 2 * work.prompts, "dx": work.prompts, "dw": work.prompts}
    return found + [((name, scored, d, vocab, 1), often) for name, often in head.items()]


def step_products(work: Workload) -> list[tuple[Product, float]]:
    """Return the products of one decode step, and how often it computes each."""
    return [(("forward", work.rows, k, n, count), count) for k, n, count in weight_products(work.cfg)]


def measure(of: list[tuple[Product, float]], compute: str, program_seconds: float) -> dict:
    """Return the rates of all libraries over these products, and the bounds that they set."""
    products = [product for product, _ in of]
    flops = np.array([2.0 * rows * k * n * often for (_, rows, k, n, _), often in of])
    rates = {"xla": [xla_rate(product, compute) for product in products]} | other_rates(products, compute)
    seconds = {name: float(np.sum(flops / each)) for name, each in rates.items()}
    best = float(np.sum(flops / np.max(list(rates.values()), axis=0)))
    return {
        "seconds": program_seconds,
        "rates": {name: float(np.sum(flops)) / s for name, s in seconds.items()}
        | {"best": float(np.sum(flops)) / best},
        "of_xla": seconds["xla"] / program_seconds,
        "of_machine": best / program_seconds,
        "products": [[*product, often, *(each[i] for each in rates.values())] for i, (product, often) in enumerate(of)],
        "columns": ["pass", "rows", "inputs", "outputs", "matrices", "times", *rates],
    }


def results(size: str, compute: str, seconds: float) -> list[dict]:
    """Time the update, and the decode step at 64 and 8 rows, of one model in one dtype; then their products."""
    params, found = make_params(size), []
    works = {rows: Workload(size, rows, compute) for rows in (64, 8)}
    calls = {"update": Case(works[64], "shared_prefix").call(params)}
    for work in works.values():
        calls |= generate.calls(work, params)
    times = alternate(calls, seconds)
    found.append({"program": "update", **measure(update_products(works[64]), compute, times["update"].median)})
    for rows, work in works.items():
        step = (times[f"generate {work.name}"].median - times[f"prefill {work.name}"].median) / NEW_TOKENS
        found.append({"program": f"decode step, {rows} rows", **measure(step_products(work), compute, step)})
    return [{"size": size, "compute": compute, **each} for each in found]


def table(found: list[dict]) -> list[str]:
    libraries = ("xla", "torch", "numpy", "best")
    gigaflops = lambda each, name: f"{each['rates'][name] / 1e9:,.0f}" if name in each["rates"] else ""  # noqa: E731
    head = ["", "ms", *(f"{name}, GFLOP/s" for name in libraries), "of XLA's bound", "of the machine's"]
    lines = [
        [
            f"{each['size']} {each['compute']}, {each['program']}",
            f"{1e3 * each['seconds']:,.1f}",
            *map(partial(gigaflops, each), libraries),
            f"{each['of_xla']:.2f}",
            f"{each['of_machine']:.2f}",
        ]
        for each in found
    ]
    return rows_of([head, *lines])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.products", description=__doc__.split("\n\n")[1])
    parser.add_argument("--sizes", default="S,M")
    parser.add_argument("--compute", default=",".join(DTYPES))
    parser.add_argument("--seconds", type=float, default=40, help="of repetitions per model and dtype")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found = [
        each
        for size in given.sizes.split(",")
        for compute in given.compute.split(",")
        for each in results(size, compute, given.seconds)
    ]
    print("\n".join(table(found)))
    if given.out:
        given.out.write_text(json.dumps({"machine": machine(), "results": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""`python -m benchmarks.draw [--rows 8,64] [--vocab 151936] [--seconds 60] [--step 8=0.1,64=0.4] [--out FILE.json]`: sampling.

    plain      from the whole vocabulary
    top_p 0.9, top_k 50, min_p 0.05, and all three together: truncated, with the default `max_kept_tokens`, which are recorded

Each is a loop of `STEPS` samplings on the device, on logits that change between steps, as in decoding. All in one process,
alternating (`clock.alternate`), medians. The four truncated variants are one executable with other arrays.

--rows     numbers of rows
--vocab    of Qwen2.5 by default
--seconds  for repetitions, shared by the rows
--step     seconds per decode step, by rows, from `benchmarks.generate`: also prints the relative cost of truncation
--out      a JSON file for the numbers
"""

import argparse
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.clock import alternate
from benchmarks.machine import machine
from benchmarks.models import layouts
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.rollout.config import RolloutConfig
from jaxrl_llm.rollout.sample import Controls, Decoding, Vocabulary, row_keys, sample_tokens

STEPS = 8
NOTHING = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
VARIANTS = {
    "plain": {},
    "top_p 0.9": {"top_p": 0.9},
    "top_k 50": {"top_k": 50},
    "min_p 0.05": {"min_p": 0.05},
    "all three": {"top_p": 0.9, "top_k": 50, "min_p": 0.05},
}


def controls(rows: int, top_p: float, top_k: int, min_p: float) -> Controls:
    full = lambda value, dtype: jnp.full(rows, value, dtype)  # noqa: E731
    return Controls(
        full(1.0, jnp.float32),
        full(top_p, jnp.float32),
        full(top_k, jnp.int32),
        full(min_p, jnp.float32),
        *(full(0, jnp.int32) for _ in ("min_new_tokens", "control", "budget")),
    )


def make_loop(vocab: int, max_kept_tokens: int) -> Callable:
    """`loop(keys, logits, controls)`: STEPS samplings, each from logits that the previous one changed at its tokens."""
    vocabulary = Vocabulary(size=vocab, pad=0, eos=(vocab - 1,))
    decoding = Decoding(ModelConfig(vocab_size=vocab), layouts()[1], vocabulary, max_kept_tokens=max_kept_tokens)

    def loop(keys: jax.Array, logits: jax.Array, of: Controls) -> tuple:
        def body(t: jax.Array, carry: tuple) -> tuple:
            logits, _ = carry
            slot = jnp.full(keys.shape, t, jnp.int32)
            sampled = sample_tokens(keys, slot, logits, of, t < STEPS, decoding)
            return logits.at[jnp.arange(len(logits)), sampled.token].add(-1e-3), sampled

        start = jax.eval_shape(lambda t: body(t, (logits, None))[1], jnp.int32(0))
        blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), start)
        return jax.lax.fori_loop(0, STEPS, body, (logits, blank))[1]

    return jax.jit(loop)


def measure(rows: int, vocab: int, seconds: float) -> dict[str, float]:
    """Seconds per sampling of all rows, by variant."""
    keys = row_keys(jax.random.key(0), jnp.arange(rows), jnp.zeros(rows, jnp.int32), 1)
    # As in a language model: p falls with the rank to the power 1.5, and half of the probability is on the first three.
    rng = np.random.default_rng(0)
    ranks = np.stack([rng.permutation(vocab) for _ in range(rows)])
    logits = jnp.asarray(-1.5 * np.log1p(ranks) + 0.1 * rng.normal(size=ranks.shape), jnp.float32)
    loops = {k: make_loop(vocab, k) for k in (0, RolloutConfig().max_kept_tokens)}

    def call(changes: dict) -> Callable[[], object]:
        loop, of = loops[RolloutConfig().max_kept_tokens if changes else 0], controls(rows, **(NOTHING | changes))
        return lambda: loop(keys, logits, of)

    times = alternate({name: call(changes) for name, changes in VARIANTS.items()}, seconds)
    return {name: time.median / STEPS for name, time in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="8,64")
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--step", default="")
    parser.add_argument("--out")
    args = parser.parse_args()
    step = {int(rows): float(s) for rows, s in (part.split("=") for part in args.step.split(",") if part)}
    found, result = machine(), {}
    for rows in map(int, args.rows.split(",")):
        result[rows] = measure(rows, args.vocab, args.seconds / len(args.rows.split(",")))
        plain = result[rows]["plain"]
        for name, seconds in result[rows].items():
            beside = f", {(seconds - plain) / step[rows]:+.1%} of a step" if rows in step else ""
            print(f"{rows} rows, {name}: {1e3 * seconds:.2f} ms, {seconds / plain:.2f} of plain{beside}")
    if args.out:
        with open(args.out, "w") as file:
            json.dump(
                {"machine": found, "vocab": args.vocab, "turns": STEPS, "draw_s": result, "step_s": step},
                file,
                indent=1,
            )


if __name__ == "__main__":
    main()

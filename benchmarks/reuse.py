"""`python -m benchmarks.reuse [--size M] [--rows 64] [--tokens 256] [--pairs 5] [--out FILE.json]`: reuse against sampling afresh.

Responses of one policy are reused by others, whose weights are more or less apart, in interleaved pairs with fresh calls.

--size     of the model
--rows     8 per prompt of 64 tokens
--tokens   of each response; none ends early
--pairs    repetitions; ratios are the medians of the pairs'
--out      a JSON file for the numbers
"""

import argparse
import json

import jax
import numpy as np

from benchmarks.generate import make_policy
from benchmarks.machine import machine
from benchmarks.models import PROMPT_SLOTS, SAMPLES, Workload, layouts, make_params
from benchmarks.trees import time_in_turn
from jaxrl_llm.rollout.config import RolloutConfig
from jaxrl_llm.rollout.engine import Engine, EngineModel
from jaxrl_llm.types import PyTree

KEY, OTHER = jax.random.key(1), jax.random.key(2)
CHANGES = (0.0, 1e-4, 1e-3)
"""Size of the change of each weight, in multiples of its own."""
LENIENCY = 0.5


def changed(params: PyTree, change: float) -> PyTree:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x * (1 + change * rng.standard_normal(x.shape).astype(np.float32)), params)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="M")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out")
    args = parser.parse_args()
    work, params = Workload(args.size, args.rows, "float32"), make_params(args.size)
    cfg = RolloutConfig(prompts=work.prompts, samples=SAMPLES, max_new_tokens=args.tokens)
    engine = Engine(EngineModel(work.cfg, layouts()[1], work.vocabulary), cfg, PROMPT_SLOTS)
    prompts, found = work.make_prompts(), []
    known = engine.generate(make_policy(work, params), prompts, KEY)
    for change in CHANGES:
        policy = make_policy(work, changed(params, change))
        forms = {"exact": (KEY, None), "inexact": (OTHER, LENIENCY)}
        calls = {
            name: lambda key=key, leniency=leniency: engine.reuse(policy, known, key, leniency=leniency)  # noqa: B023
            for name, (key, leniency) in forms.items()
        }
        kept = {name: float(call().kept.sum() / known.length.sum()) for name, call in calls.items()}
        calls["fresh"] = lambda: engine.generate(policy, prompts, KEY)  # noqa: B023
        seconds = time_in_turn(calls, args.pairs)
        ratio = {name: float(np.median(np.array(seconds["fresh"]) / seconds[name])) for name in forms}
        found.append({"change": change, "kept": kept, "seconds": seconds, "times_as_fast": ratio})
        print(json.dumps({"change": change, "kept": kept, "times_as_fast": ratio}))
    if args.out:
        with open(args.out, "w") as file:
            json.dump({"machine": machine(), **vars(args), "results": found}, file, indent=1)


if __name__ == "__main__":
    main()

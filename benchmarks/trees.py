"""`python -m benchmarks.trees [--part generate|train] [--size M] [--pairs 5] [--prompts 8] [--out FILE.json]`: leaves per second.

Prompts of 512 tokens; a trunk of 512 tokens for each, which 8 leaves leave at its end with 256 tokens of their own.

generate   trees against 8 independent samples of 768 tokens per prompt, whose prompt is shared, in interleaved pairs
train      one update on these trees, in one row each, against the same leaves with shared prompts, and with nothing shared

--part     both by default
--size     of the model
--pairs    repetitions; ratios are the medians of the pairs'
--prompts  of `generate`; `train` takes two of them
--out      a JSON file for the numbers
"""

import argparse
import json
import time
from collections.abc import Callable

import jax
import numpy as np

from benchmarks.generate import make_policy
from benchmarks.machine import machine
from benchmarks.models import Workload, layouts, make_params
from jaxrl_llm.distribution.score import Scoring
from jaxrl_llm.model import params as model_params
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.losses import make_loss
from jaxrl_llm.rollout.config import NoTree, RolloutConfig, SegmentTree, Tree
from jaxrl_llm.rollout.engine import Engine, EngineModel
from jaxrl_llm.rollout.tree import whole_paths
from jaxrl_llm.types import Batch, Credit, Experience, Policy, Prompts, PyTree, Rollouts, Scores
from jaxrl_llm.update.batch import fill_batch, ungraded
from jaxrl_llm.update.optimizer.config import AdamW
from jaxrl_llm.update.optimizer.state import make_init_state
from jaxrl_llm.update.optimizer.transform import make_optimizer
from jaxrl_llm.update.packing import BatchShape
from jaxrl_llm.update.step import jit_update

PROMPT, TRUNK, OWN, LEAVES = 512, 512, 256, 8
TREE = SegmentTree(tokens=TRUNK, width=LEAVES)


def make_prompts(work: Workload, num: int) -> Prompts:
    number = np.arange(num, dtype=np.int32)
    tokens = np.random.default_rng(0).integers(0, work.cfg.vocab_size, (num, PROMPT)).astype(np.int32)
    return Prompts(tokens, np.full(num, PROMPT, np.int32), number, number)


def make_engine(work: Workload, num: int, tree: Tree) -> Engine:
    cfg = RolloutConfig(prompts=num, samples=LEAVES, max_new_tokens=TRUNK + OWN, tree=tree)
    return Engine(EngineModel(work.cfg, layouts()[1], work.vocabulary), cfg, PROMPT)


def time_in_turn(calls: dict[str, Callable[[], object]], times: int) -> dict[str, list[float]]:
    """Seconds of each call, one after the other, `times` times, after one of each that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(times + 1):
        for name, call in calls.items():
            begun = time.perf_counter()
            jax.block_until_ready(call())
            if turn:
                found[name].append(time.perf_counter() - begun)
    return found


def generation(work: Workload, policy: Policy, num: int, pairs: int) -> dict:
    prompts, engines = (
        make_prompts(work, num),
        {"tree": make_engine(work, num, TREE), "independent": make_engine(work, num, NoTree())},
    )
    calls = {
        name: lambda engine=engine: engine.generate(policy, prompts, jax.random.key(1)).tokens
        for name, engine in engines.items()
    }
    return compared(time_in_turn(calls, pairs), num * LEAVES)


def compared(seconds: dict[str, list[float]], leaves: int) -> dict:
    """Leaves per second, and how many times as many the first has as each other."""
    first, *others = seconds
    ratios = {name: (np.array(seconds[name]) / np.array(seconds[first])).tolist() for name in others}
    return {
        "seconds": seconds,
        "leaves_per_s": {name: leaves / float(np.median(x)) for name, x in seconds.items()},
        "ratio": ratios,
        "median_ratio": {name: float(np.median(x)) for name, x in ratios.items()},
    }


def batches(work: Workload, tree: Rollouts) -> dict[str, Batch]:
    """The same leaves and the same tokens in the loss: in trees, behind shared prompts, and each in a row by itself."""
    paths, prompts = whole_paths(tree), len(tree.prompts.length)
    rng = np.random.default_rng(0)
    advantage = np.where(tree.sampled, rng.standard_normal((len(tree.length), 1)), 0).astype(np.float32)
    apart = tree.replace(trunk=None, fork=None, behavior_logprobs=paths.behavior_logprobs)
    whole, longest = PROMPT + TRUNK + OWN, PROMPT + LEAVES * (TRUNK + OWN)
    shapes = {
        "tree": (tree, BatchShape("shared_prefix", prompts, PROMPT + TRUNK + LEAVES * OWN, prompts)),
        "shared prompts": (apart, BatchShape("shared_prefix", prompts, longest, prompts)),
        "nothing shared": (apart, BatchShape("none", prompts * LEAVES, whole, prompts * LEAVES)),
    }
    return {
        name: fill_batch(Experience(ungraded(rows), Scores(), Credit(advantage)), shape, 0)[0]
        for name, (rows, shape) in shapes.items()
    }


def training(work: Workload, policy: Policy, params: PyTree, pairs: int) -> dict:
    """Seconds of one update; a micro-batch is one row."""
    num, (train, _) = 2, layouts()
    tree = make_engine(work, num, TREE).generate(policy, make_prompts(work, num), jax.random.key(1))
    optimizer, specs = make_optimizer(AdamW(lr=0.0)), model_params.specs(work.cfg)
    start = make_init_state(specs, optimizer, train)

    def call(batch: Batch) -> Callable[[], object]:
        rows = len(batch.tokens)
        update = jit_update(
            specs,
            make_loss(ObjectiveConfig()),
            optimizer,
            Scoring(work.cfg, train, work.cfg.vocab_size),
            micro_batches=rows,
        )
        state = [start(jax.tree.map(np.array, params), np.int32(0))]

        def once() -> object:
            state[0], metrics = update(state[0], batch)
            return metrics

        return once

    laid = batches(work, tree)
    found = compared(time_in_turn({name: call(batch) for name, batch in laid.items()}, pairs), num * LEAVES)
    slots = {name: int(np.count_nonzero(b.until > np.arange(b.until.shape[1]))) for name, b in laid.items()}
    return found | {"tokens_in_batch": slots}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("generate", "train"))
    parser.add_argument("--size", default="M")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--out")
    args = parser.parse_args()
    found, work, params = machine(), Workload(args.size, 8 * args.prompts, "float32"), make_params(args.size)
    policy, result = make_policy(work, params), {}
    if args.part != "train":
        result["generate"] = generation(work, policy, args.prompts, args.pairs)
    if args.part != "generate":
        result["train"] = training(work, policy, params, args.pairs)
    for part, numbers in result.items():
        print(part, json.dumps({name: numbers[name] for name in ("leaves_per_s", "median_ratio")}))
    if args.out:
        with open(args.out, "w") as file:
            json.dump({"machine": found, "size": args.size, "prompts": args.prompts, **result}, file, indent=1)


if __name__ == "__main__":
    main()

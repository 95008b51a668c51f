"""`update`: tokens per second of one optimizer step, and its FLOP/s relative to the measured matmul ceiling.

    python -m benchmarks.update [--packing none,plain,shared_prefix] [--sizes S,M] [--compute float32,bfloat16] [--rows 64]
                                [--prompt 64] [--new 128] [--out FILE.json]

Prompts of 64 tokens with 8 completions of 128 each; the loss is on the completions. `plain` packs four sequences per row,
`shared_prefix` a prompt with all of its completions. A micro-batch is one group, so gradients are accumulated over the groups.

    tokens per second    rows * (prompt + new) / t for every packing: a shared prompt counts once per completion
    FLOPs                `perf.work.train_flops`: of tokens in the batch, a shared prompt once; the head at scored tokens;
                         rematerialization (about a third more) is not counted
    fraction             FLOPs / t / rate of a large square matmul in the compute dtype
    own-shape fraction   `rates.min_seconds` / t: the same FLOPs at the rates of this step's weight matmuls: forward,
                         dx = g w', dw = x' g. A run logs it as `update/ceiling_fraction`.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.clock import Timing, alternate
from benchmarks.machine import machine
from benchmarks.models import DTYPES, NEW_TOKENS, PROMPT_SLOTS, SAMPLES, SIZES, Workload, layouts, make_params
from jaxrl_llm.distribution.score import Scoring
from jaxrl_llm.model import params as model_params
from jaxrl_llm.model.config import ForwardOptions
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.losses import make_loss
from jaxrl_llm.perf.ceilings import matmul_rate
from jaxrl_llm.perf.utilization import UpdateRates, measure_update, min_seconds
from jaxrl_llm.perf.work import TrainFlops, count_tokens, train_flops
from jaxrl_llm.types import Batch, Credit, Experience, Prompts, PyTree, Scores
from jaxrl_llm.update.batch import fill_batch, supervised
from jaxrl_llm.update.optimizer.config import AdamW
from jaxrl_llm.update.optimizer.state import make_init_state
from jaxrl_llm.update.optimizer.transform import make_optimizer
from jaxrl_llm.update.packing import BatchShape, batch_shape, equal_groups
from jaxrl_llm.update.step import jit_update

# Maximum number of tokens at which the ceiling is measured.
CEILING_TOKENS = 4096
PACKINGS = ("none", "plain", "shared_prefix")


@dataclass(frozen=True)
class Case:
    """One update to time."""

    work: Workload
    packing: str = "none"
    prompt: int = PROMPT_SLOTS
    new: int = NEW_TOKENS

    @property
    def slots(self) -> int:
        """Slots of one sequence."""
        return self.prompt + self.new

    @property
    def name(self) -> str:
        return f"update {self.work.name}" + ("" if self.packing == "none" else f" {self.packing}")

    @property
    def shape(self) -> BatchShape:
        slots = 4 * self.slots if self.packing == "plain" else 0
        return batch_shape(
            self.packing, equal_groups(self.work.prompts, SAMPLES), (self.prompt, self.new), slots, self.work.prompts, 1
        )

    def batch(self) -> Batch:
        """Return random tokens with advantages of both signs and behavior log-probs of a uniform policy, for ratios near 1."""
        rng, rows, vocab = np.random.default_rng(0), self.work.rows, self.work.cfg.vocab_size
        number = np.arange(self.work.prompts, dtype=np.int32)
        texts = rng.integers(0, vocab, (len(number), self.prompt)).astype(np.int32)
        prompts = Prompts(texts, np.full(len(number), self.prompt, np.int32), number, number)
        tokens = rng.integers(0, vocab, (rows, self.new)).astype(np.int32)
        groups = supervised(prompts, tokens, np.full(rows, self.new, np.int32)).groups
        rollouts = groups.rollouts.replace(behavior_logprobs=np.full(tokens.shape, -np.log(vocab), np.float32))
        advantage = np.broadcast_to(rng.standard_normal((rows, 1)), tokens.shape).astype(np.float32)
        experience = Experience(groups.replace(rollouts=rollouts), Scores(), Credit(advantage))
        return fill_batch(experience, self.shape, 0)[0]

    def flops(self) -> TrainFlops:
        return train_flops(self.work.cfg, *count_tokens(self.work.cfg, self.batch()))

    def call(self, params: PyTree) -> Callable[[], object]:
        """Return the program to time. Its state is donated, so each call continues from the previous one."""
        cfg, (train, _) = self.work.cfg, layouts()
        specs, optimizer = model_params.specs(cfg), make_optimizer(AdamW(lr=1e-6))
        update = jit_update(
            specs,
            make_loss(ObjectiveConfig()),
            optimizer,
            Scoring(cfg, train, cfg.vocab_size, forward=ForwardOptions(remat="auto")),
            micro_batches=self.shape.num_micro_batches,
        )
        batch = jax.device_put(self.batch(), train.replicated)
        state = make_init_state(specs, optimizer, train)(jax.tree.map(jnp.copy, params), np.int32(0))

        def call() -> object:
            nonlocal state
            state, metrics = update(state, batch)
            return state, metrics

        return call

    def result(self, time: Timing, square_rate: float, own: UpdateRates) -> dict:
        """Return the results. `square_rate`: FLOP/s of a large square matmul; `own`: rates of the step's matmuls."""
        flops, work = self.flops(), self.work
        rate = sum(flops) / time.median
        return {
            "program": "update",
            "size": work.size,
            "compute": work.compute,
            "packing": self.packing,
            "shapes": {
                "rows": self.shape.rows,
                "slots": self.shape.slots,
                "micro_batches": self.shape.num_micro_batches,
            },
            "time": time.as_dict(),
            "tokens_per_s": work.rows * self.slots / time.median,
            "flops": sum(flops),
            "flops_per_s": rate,
            "ceiling": {
                "flops_per_s": square_rate,
                "own_shapes_flops_per_s": sum(flops) / min_seconds(flops, own, 1),
            },
            "fraction_of_ceiling": rate / square_rate,
            "fraction_of_own_shapes": min_seconds(flops, own, 1) / time.median,
        }


def calls(work: Workload, params: PyTree) -> dict[str, Callable[[], object]]:
    case = Case(work)
    return {case.name: case.call(params)}


def result(work: Workload, times: dict[str, Timing], square_rate: float, own: UpdateRates) -> dict:
    case = Case(work)
    return case.result(times[case.name], square_rate, own)


def own_rates(work: Workload, seconds: float) -> UpdateRates:
    """Rates of the matmuls at the number of tokens of one group."""
    return measure_update(work.cfg, min(SAMPLES * (PROMPT_SLOTS + NEW_TOKENS), CEILING_TOKENS), 1, seconds=seconds)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.update", description=__doc__.split("\n")[0])
    parser.add_argument("--packing", default="none")
    parser.add_argument("--sizes", default="S")
    parser.add_argument("--compute", default=",".join(DTYPES))
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=PROMPT_SLOTS)
    parser.add_argument("--new", type=int, default=NEW_TOKENS)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    for name, known in (("packing", PACKINGS), ("sizes", tuple(SIZES)), ("compute", DTYPES)):
        if unknown := [x for x in getattr(given, name).split(",") if x not in known]:
            parser.error(f"--{name}: got {', '.join(unknown)}, want some of {', '.join(known)}")
    results = []
    for size in given.sizes.split(","):
        params = make_params(size)
        works = [Workload(size, given.rows, compute) for compute in given.compute.split(",")]
        cases = [Case(work, packing, given.prompt, given.new) for work in works for packing in given.packing.split(",")]
        rates = {work: own_rates(work, 0.5) for work in works}
        times = alternate({case.name: case.call(params) for case in cases}, given.seconds)
        for case in cases:
            found = case.result(
                times[case.name], matmul_rate([("forward", 2048, 2048, 2048)], case.work.compute), rates[case.work]
            )
            results.append(found)
            print(
                f"{case.name}: {found['time']['median_s']:.3f} s, {found['tokens_per_s']:,.0f} tokens/s, "
                f"{found['flops_per_s'] / 1e9:,.0f} GFLOP/s, {found['fraction_of_own_shapes']:.2f} of the ceiling "
                f"(layers {rates[case.work].layers / 1e9:,.0f}, head {rates[case.work].head / 1e9:,.0f} GFLOP/s)",
                flush=True,
            )
    if given.out:
        given.out.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

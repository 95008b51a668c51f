"""`python -m benchmarks.host [--prompts 1024] [--samples 8] [--tokens 1024] [--unequal] [--out FILE.json]`: host work of a step.

What the host computes between the last token and the update: join (grades to rows), filter, advantage, minibatches, pack. In CPU
seconds of this process, which has one thread for it, best of five; beside it the time of one copy of all columns per token that
travel through these stages, rollouts and advantage, measured in turns.

--prompts, --samples, --tokens  P, G and C; prompts have 64 tokens
--unequal  groups of 1 to 2 G - 1 samples, P * G in all
--out      a JSON file for the numbers
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np

from benchmarks.machine import machine
from jaxrl_llm.environments.grader_pool import Graded
from jaxrl_llm.experience.filters import chain, has_signal
from jaxrl_llm.objective.group_estimators import Grpo
from jaxrl_llm.roles.grading import blank_grades, make_groups
from jaxrl_llm.types import Credit, Experience, Groups, Prompts, Rollouts, Scores, number_rows
from jaxrl_llm.update.batch import fill_batch, minibatches
from jaxrl_llm.update.packing import BatchShape, GroupSizes, batch_shape

PROMPT, REPETITIONS = 64, 5
STAGES = ("join", "filter", "advantage", "minibatches", "pack")


def make_rollouts(size: np.ndarray, slots: int) -> Rollouts:
    """Rollouts of random tokens and lengths."""
    rng, rows, prompts = np.random.default_rng(0), int(size.sum()), len(size)
    length = rng.integers(slots // 8, slots + 1, rows).astype(np.int32)
    sampled = np.arange(slots) < length[:, None]
    number, of_prompt = np.arange(prompts, dtype=np.int32), np.full(prompts, PROMPT, np.int32)
    prompt, sample = number_rows(size)
    random = lambda: np.where(sampled, rng.random(sampled.shape, np.float32), 0)  # noqa: E731
    return Rollouts(
        prompts=Prompts(rng.integers(0, 100, (prompts, PROMPT), np.int32), of_prompt, number, number),
        prompt=prompt, sample=sample, tokens=rng.integers(0, 100, sampled.shape, np.int32), length=length, sampled=sampled,
        behavior_logprobs=-random(), entropy=random(), temperature=np.ones(rows, np.float32),
        version=np.zeros(sampled.shape, np.int32), finish=np.zeros(rows, np.int32),
    )  # fmt: skip


def make_graded(size: np.ndarray) -> Graded:
    """Rewards of 0 and 1, and a vote per sample."""
    rng, shape = np.random.default_rng(1), (len(size), int(size.max()))
    reward = np.where(np.arange(shape[1]) < size[:, None], rng.integers(0, 2, shape), np.nan).astype(np.float32)
    votes = [[str(x) for x in rng.integers(0, 9, n)] for n in size]
    none = np.zeros(len(size), np.int32)
    return Graded(reward, reward[None], none, none - 1, votes)


def join(rollouts: Rollouts, graded: Graded) -> Groups:
    grades = blank_grades(rollouts, 1)
    grades.set(np.arange(len(graded.failure)), graded)
    return make_groups(rollouts, grades, np.zeros(len(graded.failure), int))


def pack(parts: list[Experience], shape: BatchShape) -> None:
    for part in parts:
        fill_batch(part, shape, 0)


def step(rollouts: Rollouts, graded: Graded, shape: BatchShape) -> tuple[dict[str, float], Experience]:
    """Run all stages once. Returns CPU seconds per stage, and what was packed."""
    taken = {}

    def timed(name: str, call: Callable) -> object:
        begun = time.process_time()
        found = call()
        taken[name] = time.process_time() - begun
        return found

    groups = timed("join", partial(join, rollouts, graded))
    groups = timed("filter", lambda: chain(has_signal)(groups))
    credit: Credit = timed("advantage", lambda: Grpo()(groups))
    whole = Experience(groups, Scores(), credit)
    parts = timed("minibatches", lambda: list(minibatches(whole, 2, np.random.default_rng(0))))
    timed("pack", partial(pack, parts, shape))
    return taken, whole


def copy(whole: Experience) -> float:
    """CPU seconds of one copy of the columns per token."""
    shape = whole.groups.rollouts.tokens.shape
    columns = [column for column in jax.tree.leaves(whole) if column.shape == shape]
    begun = time.process_time()
    for column in columns:
        column.copy()
    return time.process_time() - begun


def measure(size: np.ndarray, slots: int) -> dict:
    rollouts, graded = make_rollouts(size, slots), make_graded(size)
    sizes = GroupSizes(len(size) // 2, int(size.sum()) // 2 + int(size.max()), int(size.max()))
    equal = np.ptp(size) == 0
    sizes = GroupSizes(len(size) // 2, int(size.sum()) // 2, int(size.max())) if equal else sizes
    shape = batch_shape("shared_prefix", sizes, (PROMPT, slots), 0, 1, 1)
    _, whole = step(rollouts, graded, shape)
    runs = [(step(rollouts, graded, shape)[0], copy(whole)) for _ in range(REPETITIONS)]
    best = min((stages for stages, _ in runs), key=lambda stages: sum(stages.values()))
    once = min(seconds for _, seconds in runs)
    total = sum(best.values())
    return {
        "cpu_s": total,
        "stages": best,
        "copy_s": once,
        "copies": total / once,
        "runs": [sum(s.values()) for s, _ in runs],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("prompts", 1024), ("samples", 8), ("tokens", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--unequal", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    size = np.full(args.prompts, args.samples)
    if args.unequal:
        size[::2] = np.resize(np.arange(1, args.samples), len(size[::2]))
        size[1::2] = 2 * args.samples - size[::2]
    found = measure(size, args.tokens)
    print(
        f"{int(size.sum()):,} rows x {args.tokens:,} tokens: {found['cpu_s']:.3f} s of CPU time, {found['copies']:.1f} copies"
    )
    for name in STAGES:
        print(f"  {name:12} {found['stages'][name]:.3f} s")
    print(f"  one copy of the columns per token: {found['copy_s']:.3f} s")
    if args.out:
        settings = {**vars(args), "out": None}
        args.out.write_text(json.dumps({"machine": machine(), "settings": settings, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

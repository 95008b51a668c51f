"""`python -m benchmarks.replay [--groups 512] [--draw 64] [--out FILE.json]`: the buffer of the replay, its bytes and its time.

Groups of 16 responses of 512 tokens on average, in a run of up to 8,192 tokens that keeps up to 128 tokens of each; 10 are kept on
average. In CPU seconds of this process, which has one thread for it, best of five.

--groups  in the buffer
--draw    groups that a step adds, and that it draws
--slots   C, to which drawn groups are unpacked
--out     a JSON file for the numbers
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from benchmarks.machine import machine
from jaxrl_llm.experience.buffer import added, empty_buffer
from jaxrl_llm.experience.packed_groups import Packing
from jaxrl_llm.experience.replay import blank_groups, draw
from jaxrl_llm.types import Groups

SAMPLES, PROMPT, MEAN, KEPT, MOST_KEPT, REPETITIONS = 16, 64, 512, 10, 128, 5


def make_groups(groups: int, slots: int, seed: int) -> Groups:
    """Random groups: lengths from 1 to 2 MEAN - 1, kept tokens of an exponential distribution."""
    rng, rows = np.random.default_rng(seed), groups * SAMPLES
    blank = blank_groups(groups, SAMPLES, (PROMPT, slots), 1, ("truncation",), MOST_KEPT)
    length = rng.integers(1, 2 * MEAN, rows).astype(np.int32)
    inside = np.arange(slots) < length[:, None]
    kept = np.full((rows, slots, MOST_KEPT), -1, np.int32)
    for b, n in enumerate(length.tolist()):
        counts = np.minimum(1 + rng.exponential(KEPT - 1, n).astype(int), MOST_KEPT)
        some = rng.integers(0, 150_000, (n, MOST_KEPT), np.int32)
        kept[b, :n] = np.where(np.arange(MOST_KEPT) < counts[:, None], some, -1)
    real = np.where(inside, rng.random(inside.shape, np.float32), 0)
    rollouts = blank.rollouts.replace(
        prompts=blank.rollouts.prompts.replace(length=np.full(groups, PROMPT, np.int32)),
        length=length,
        tokens=np.where(inside, rng.integers(0, 99, inside.shape, np.int32), 0),
        sampled=inside,
        behavior_logprobs=-real,
        entropy=real,
        kept_tokens=kept,
    )
    return blank.replace(rollouts=rollouts, reward=rng.random(rows, np.float32), keep=np.ones(rows, bool))


def real_bytes(groups: Groups) -> int:
    """Id, log-prob, entropy and version of each token, the ids that it kept, and the prompts once."""
    rollouts = groups.rollouts
    return int(4 * (4 * rollouts.length.sum() + (rollouts.kept_tokens >= 0).sum() + rollouts.prompts.length.sum()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=512)
    parser.add_argument("--draw", type=int, default=64)
    parser.add_argument("--slots", type=int, default=2 * MEAN)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    before, buffer, real = machine(), empty_buffer(args.groups), 0
    for seed in range(args.groups // args.draw):
        fresh = make_groups(args.draw, args.slots, seed)
        packing = Packing(fresh, 0)
        buffer, real = added(buffer, fresh, packing.pack(fresh), np.inf), real + real_bytes(fresh)
    known, rng, add, take = buffer.candidates(0), np.random.default_rng(0), [], []
    for _ in range(REPETITIONS):
        begun = time.process_time()
        added(buffer, fresh, packing.pack(fresh), np.inf)
        middle = time.process_time()
        buffer.groups(draw(known, np.ones(len(known.age)), rng, args.draw).tolist(), packing)
        add.append(middle - begun)
        take.append(time.process_time() - middle)
    found = {"bytes": buffer.num_bytes, "ratio": buffer.num_bytes / real, "add_s": min(add), "draw_s": min(take)}
    print(
        f"{args.groups} groups: {found['bytes'] / 1e6:,.0f} MB, {found['ratio']:.3f} of what was sampled; "
        f"{args.draw} groups added in {found['add_s']:.3f} s, drawn in {found['draw_s']:.3f} s of CPU time"
    )
    if args.out:
        settings = {name: value for name, value in vars(args).items() if name != "out"}
        args.out.write_text(json.dumps({"machine": before, "settings": settings, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

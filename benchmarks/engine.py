"""`python -m benchmarks.engine [--parts forms,skew,prompt,soak] [--work M,64,float32 ...] [--seconds N] [--out FILE.json]`

Gain of each part of the rollout engine, variants timed alternately in one process:

forms   128 new tokens for 8 prompts x 8 samples, no row ends early: the default engine, and with one change at a time
skew    useful tokens per second with geometric lengths of mean a quarter of the cap: batch after batch, compaction, and refill,
        with prompt caches shared by whole groups and by pairs; and with 64 different prompts. Tokens must be equal
prompt  64 rows of one prompt of 1,024 tokens: one copy of its keys and values, against one per row
soak    300 calls of random numbers of prompts, lengths and limits: compilations and resident memory after the warm-up
"""

import argparse
import dataclasses
import datetime
import json
import resource
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np

from benchmarks.clock import alternate
from benchmarks.generate import make_engine, make_policy
from benchmarks.machine import machine
from benchmarks.models import NEW_TOKENS, SAMPLES, Workload, layouts, make_params
from jaxrl_llm.metrics.timers import CompileCounter
from jaxrl_llm.rollout import sample
from jaxrl_llm.rollout.config import EngineConfig, RolloutConfig
from jaxrl_llm.rollout.engine import Engine, EngineModel
from jaxrl_llm.rollout.sample import Vocabulary
from jaxrl_llm.types import Policy, Prompts, Rollouts

KEY = jax.random.key(1)
FORMS = {
    "default": {},
    "chunks of 32": {"decode_chunk": 32},
    "window of 64, doubled": {"window": 64},
    "no growth": {"window": NEW_TOKENS},
    "checks every step": {"eos_interval": 1},
    "checks every 4": {"eos_interval": 4},
    "checks every 16": {"eos_interval": 16},
    "a copy of the prompt per row": {"rows_per_prompt_cache": 1},
    "keys by slot": {"attention": "dot"},
    "int8 cache": {"cache": "int8"},
}


def forms(work: Workload, seconds: float) -> dict:
    policy, prompts = make_policy(work, make_params(work.size)), work.make_prompts()
    engines = {name: make_engine(work, **changes) for name, changes in FORMS.items()}
    calls = {name: partial(engine.generate, policy, prompts, KEY) for name, engine in engines.items()}
    blocks = sample.BLOCKS

    def one_level() -> Rollouts:
        return plain.generate(policy, prompts, KEY)

    # Blocks of one token: noise for the whole vocabulary.
    plain = make_engine(work)
    sample.BLOCKS = work.cfg.vocab_size
    plain.warm(policy, work.prompts)
    sample.BLOCKS = blocks
    return rates({**calls, "sample in one level": one_level}, work.rows * NEW_TOKENS, seconds)


def rates(calls: dict[str, Callable[[], object]], tokens: int, seconds: float) -> dict:
    times = alternate(calls, seconds)
    base = next(iter(times.values())).median
    return {
        name: {**t.as_dict(), "tokens_per_s": tokens / t.median, "ratio": base / t.median} for name, t in times.items()
    }


def skew(work: Workload, seconds: float) -> dict:
    """Rows end at any of V / 32 tokens: with random weights about every 32nd step."""
    policy = make_policy(work, make_params(work.size))
    return {
        "8 groups of 8": skewed(work, policy, 8, 32, 8, seconds / 2),
        "64 different prompts": skewed(work, policy, 1, 256, 64, seconds / 2),
    }


def skewed(work: Workload, policy: Policy, samples: int, num: int, batch: int, seconds: float) -> dict:
    cfg = work.cfg
    vocab = Vocabulary(cfg.vocab_size, 0, tuple(range(0, cfg.vocab_size, NEW_TOKENS // 4)))
    prompts = many_prompts(work, num)
    parts = [jax.tree.map(lambda x, i=i: x[i : i + batch], prompts) for i in range(0, num, batch)]

    def engine(prompts: int, **changes: object) -> Engine:
        form = EngineConfig(decode_chunk=16, **changes)
        rollout = RolloutConfig(prompts=prompts, samples=samples, max_new_tokens=NEW_TOKENS, engine=form)
        return Engine(EngineModel(cfg, layouts()[1], vocab), rollout, 64)

    def by_parts(engine: Engine) -> list[Rollouts]:
        return [engine.generate(policy, part, KEY) for part in parts]

    calls = {
        "batch after batch": partial(by_parts, engine(batch, compact=False)),
        "compaction": partial(by_parts, engine(batch)),
        "compaction and refill": partial(engine(num, max_concurrent_prompts=batch).generate, policy, prompts, KEY),
    }
    if samples > 1:
        pairs = engine(num, max_concurrent_prompts=batch, rows_per_prompt_cache=2)
        calls["compaction and refill, pairs"] = partial(pairs.generate, policy, prompts, KEY)
    tokens = {form: joined(call()) for form, call in calls.items()}
    for form, got in tokens.items():
        np.testing.assert_array_equal(got, tokens["batch after batch"], err_msg=form)
    useful = int((tokens["batch after batch"] >= 0).sum())
    return {"mean_length": useful / (num * samples), **rates(calls, useful, seconds)}


def joined(rollouts: Rollouts | list[Rollouts]) -> np.ndarray:
    """Sampled tokens, -1 elsewhere."""
    parts = rollouts if isinstance(rollouts, list) else [rollouts]
    return np.concatenate([np.where(r.sampled, r.tokens, -1) for r in parts])


def many_prompts(work: Workload, num: int, slots: int = 64) -> Prompts:
    rng, count = np.random.default_rng(0), np.arange(num, dtype=np.int32)
    tokens = rng.integers(0, work.cfg.vocab_size, (num, slots)).astype(np.int32)
    return Prompts(tokens=tokens, length=np.full(num, slots, np.int32), uid=count, row=count)


def long_prompt(work: Workload, seconds: float) -> dict:
    policy, prompts = make_policy(work, make_params(work.size)), many_prompts(work, 1, 1024)

    def engine(rows_per_prompt_cache: int) -> Engine:
        rollout = RolloutConfig(
            prompts=1,
            samples=64,
            max_new_tokens=NEW_TOKENS,
            engine=EngineConfig(rows_per_prompt_cache=rows_per_prompt_cache),
        )
        return Engine(EngineModel(work.cfg, layouts()[1], work.vocabulary), rollout, 1024)

    engines = {"one copy": engine(64), "a copy per row": engine(1)}
    calls = {name: partial(e.generate, policy, prompts, KEY) for name, e in engines.items()}
    found = rates(calls, 64 * NEW_TOKENS, seconds)
    for name, e in engines.items():
        session = e.session(policy, KEY)
        session.add(prompts)
        session.advance()
        found[name]["prompt_cache_bytes"] = sum(x.nbytes for x in jax.tree.leaves(session.batch.prompt))
    return found


def soak(work: Workload, num_calls: int = 300) -> dict:
    """Eight concurrent prompts, up to sixteen per call, prompts of 1 to 64 tokens, limits of 1 to 48, chunks of 16."""
    cfg = dataclasses.replace(work.cfg, layers=2)
    policy = Policy({**(p := make_policy(work, make_params(work.size)).params), "layers": p["layers"][:2]}, np.int32(0))
    rollout = RolloutConfig(
        prompts=16, samples=SAMPLES, max_new_tokens=48, engine=EngineConfig(decode_chunk=16, max_concurrent_prompts=8)
    )
    vocab = Vocabulary(cfg.vocab_size, 0, tuple(range(0, cfg.vocab_size, 24)))
    engine = Engine(EngineModel(cfg, layouts()[1], vocab), rollout, 64)
    engine.warm(policy)
    rng, resident, counter = np.random.default_rng(0), [], CompileCounter()
    for i in range(num_calls + 20):
        if i == 20:
            counter.take()
        n = int(rng.integers(1, 17))
        prompts = many_prompts(work, n)
        prompts = prompts.replace(length=rng.integers(1, 65, n).astype(np.int32))
        engine.generate(policy, prompts, KEY, limit=rng.integers(1, 49, n).astype(np.int32))
        resident.append(resident_bytes())
    after = resident[20:]
    return {
        "calls": num_calls,
        "compilations": counter.take()["compiles"],
        "resident_bytes_first_50": float(np.mean(after[:50])),
        "resident_bytes_last_50": float(np.mean(after[-50:])),
        "growth": float(np.mean(after[-50:]) / np.mean(after[:50]) - 1),
    }


def resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


PARTS = {"forms": forms, "skew": skew, "prompt": long_prompt}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="forms,skew,prompt,soak")
    parser.add_argument("--work", nargs="+", default=["S,64,float32", "M,64,float32"])
    parser.add_argument("--seconds", type=float, default=60.0, help="seconds of repetitions for each part and work")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    result = {"command": " ".join(["python -m benchmarks.engine", *sys.argv[1:]]), "machine": machine(), "results": []}
    for text in given.work:
        size, rows, compute = text.split(",")
        work = Workload(size, int(rows), compute)
        for part in given.parts.split(","):
            found = soak(work) if part == "soak" else PARTS[part](work, given.seconds)
            result["results"].append({"part": part, "work": work.name, "found": found})
            print(json.dumps(result["results"][-1], indent=1), flush=True)
            out = given.out or Path(__file__).parent / "results" / f"engine-cpu-{datetime.date.today()}.json"
            out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""`python -m benchmarks.peers.grpo --work S,float32 M,float32 ..`: our whole GRPO step beside TRL's and Tunix's.

8 prompts of 64 tokens x 8 samples of 128 tokens without end token, a trivial reward, one update of lr 1e-6. The same weights (one
safetensors file), tokenizer and prompts; each trainer's training loop in a separate process and environment, on the same
cores; steps in turns. What each includes: docs/benchmarks.md.

--work     SIZE,DTYPE or SIZE,DTYPE,BETA, one or several: S or M of benchmarks/models.py; float32 or bfloat16; beta is the weight of
           KL to a reference, default 0
--peers    PEER or PEER/VARIANT, with commas; default ours/shared, trl/plain, tunix/plain (in bfloat16 trl/cast too)
--rounds   timed steps of each, after one that compiles and one that warms up; default 3
--seconds  time limit per work to find that many quiet rounds, in which other processes used at most a tenth of the machine;
           after it the quietest rounds count; default 120
--threads  number of cores for every process; default all
--build    build missing environments
--out      default benchmarks/results/grpo-<device>-<cores>core-<date>.json; its results of other works are kept
"""

import argparse
import datetime
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from benchmarks.machine import HERE, file_name, machine
from benchmarks.models import DTYPES, NEW_TOKENS, PROMPT_SLOTS, SAMPLES
from benchmarks.peers import environments, weights, words
from benchmarks.peers.compare import best, entry, quietest, ratio
from benchmarks.peers.generate import cores, facts_of, ready
from benchmarks.peers.processes import Worker, WorkerError, disturbance, in_turns
from benchmarks.table import rows_of
from jaxrl_llm.errors import UserError

GROUPS = 8
TOKENS = GROUPS * SAMPLES * NEW_TOKENS
VARIANTS = {"ours": ("shared", "apart"), "trl": ("plain", "checkpointing", "cast"), "tunix": ("plain",)}


@dataclass(frozen=True)
class StepWork:
    size: str
    compute: str
    beta: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.size} {self.compute}" + (f", beta {self.beta:g}" if self.beta else "")

    def as_dict(self) -> dict:
        shape = {"prompts": GROUPS, "samples": SAMPLES, "prompt": PROMPT_SLOTS, "new_tokens": NEW_TOKENS}
        return asdict(self) | shape


def parse(text: str) -> StepWork:
    """Return the work of "M,float32" or "M,float32,0.04". Raises UserError for any other form."""
    size, compute, beta = (*text.split(","), "", "")[:3]
    try:
        weight = float(beta or 0)
    except ValueError:
        weight = -1.0
    if text.count(",") > 2 or size not in ("S", "M") or compute not in DTYPES or not 0 <= weight < 1:
        raise UserError(
            f"--work: got {text}, want SIZE,DTYPE or SIZE,DTYPE,BETA: S or M; {' or '.join(DTYPES)}; less than 1"
        )
    return StepWork(size, compute, weight)


def trainers_of(text: str) -> list[str]:
    """Return every variant named by `text` ("ours,trl/plain"), as peer/variant. Raises UserError for unknown ones."""
    found = []
    for part in text.split(","):
        peer, _, variant = part.partition("/")
        if peer not in VARIANTS or (variant and variant not in VARIANTS[peer]):
            known = ", ".join(f"{p}/{v}" for p, variants in VARIANTS.items() for v in variants)
            raise UserError(f"--peers: got {part}, want some of {known}")
        found += [f"{peer}/{v}" for v in ([variant] if variant else VARIANTS[peer])]
    return found


def default_trainers(work: StepWork) -> list[str]:
    return ["ours/shared", "trl/plain", *(["trl/cast"] if work.compute == "bfloat16" else []), "tunix/plain"]


def start(name: str, work: StepWork, threads: int) -> tuple[Worker, dict]:
    """Start a worker and prepare its first step; return it with its facts. `start_s` is from the process's start."""
    peer, variant = name.split("/")
    began = time.perf_counter()
    worker = Worker(environments.python(peer), f"benchmarks.peers.workers.{peer}_step", threads, {})
    given = {
        "directory": str(weights.directory(work.size)),
        "words": str(words.directory(work.size)),
        "compute": work.compute,
        "variant": variant,
        "beta": work.beta,
    }
    try:
        facts = worker.ask(load=given)
    except WorkerError:
        worker.close()
        raise
    return worker, facts_of(facts) | {"start_s": time.perf_counter() - began}


def step(worker: Worker, name: str, turn: int) -> dict:
    answer = worker.ask(step={})
    if answer["tokens"] != TOKENS or answer["updates"] != turn + 1:
        raise WorkerError(
            f"{name}: got {answer['tokens']} tokens and {answer['updates']} updates, want {TOKENS} and {turn + 1}"
        )
    print(f"{name}, turn {turn}: {answer['seconds']:.2f} s, others {answer['others']:.0%}", file=sys.stderr, flush=True)
    return answer


def measure(work: StepWork, names: list[str], rounds: int, seconds: float, threads: int) -> dict:
    """Time every trainer at one work."""
    workers, facts, failed = {}, {}, {}
    try:
        for name in names:
            try:
                workers[name], facts[name] = start(name, work, threads)
            except WorkerError as error:
                failed[name] = str(error)
                print(f"{name}: {error}", file=sys.stderr, flush=True)
        calls = {name: partial(step, worker, name) for name, worker in workers.items()}
        answers, fell = in_turns(calls, rounds, time.monotonic() + seconds)
    finally:
        for worker in workers.values():
            worker.close()
    others = disturbance(answers)
    chosen = quietest(others, rounds)
    return {
        "name": work.name,
        "work": work.as_dict(),
        "tokens": TOKENS,
        "rounds": len(chosen),
        "rounds_run": max(len(others) - 2, 0),
        "entries": {
            name: facts[name] | entry_of(each, chosen, facts[name]["start_s"]) for name, each in answers.items()
        },
        "failed": failed | fell,
    }


def entry_of(answers: list[dict], chosen: list[int], start_s: float) -> dict:
    """Return `entry` of one trainer with the seconds of sampling, and of the first step's end from the process's start."""
    sampling = [answers[turn]["rollout_s"] for turn in chosen]
    return entry(answers, chosen, TOKENS) | {
        "rollout_s": sampling,
        "median_rollout_s": statistics.median(sampling),
        "first_step_after_start_s": start_s + answers[0]["seconds"],
        "stages": [answers[turn]["stages"] for turn in chosen if "stages" in answers[turn]],
    }


def table(result: dict) -> list[str]:
    """Return the table of one work. Seconds are medians; `ours to it`: our speedup, from steps of the same round."""
    entries = result["entries"]
    ours = best(entries, "ours")
    head = [
        "", "s per step", "lowest to highest", "of which rollout", "ours to it", "others had", "first step, s", "from start, s",
        "peak, MiB",
    ]  # fmt: skip
    lines = [
        [
            name,
            f"{e['median_s']:.2f}",
            f"{min(e['seconds']):.2f} to {max(e['seconds']):.2f}",
            f"{e['median_rollout_s']:.2f}",
            f"{ratio(entries[ours], e):.2f}" if ours else "",
            f"{max(e['others']):.0%}",
            f"{e['first_call_s']:.1f}",
            f"{e['first_step_after_start_s']:.1f}",
            f"{e['peak_bytes'] / 2**20:,.0f}",
        ]
        for name, e in entries.items()
    ]
    quiet = f"the quietest {result['rounds']} of {result['rounds_run']} rounds"
    found = [
        f"{result['name']}, {result['tokens']:,} new tokens per step, {quiet}",
        "",
        *rows_of([head, *lines]),
    ]
    return found + [f"{name} failed: {why.splitlines()[-1] if why else ''}" for name, why in result["failed"].items()]


def keep(out: Path, result: dict, about: dict) -> None:
    """Write one work's result to the file, keeping those of other works."""
    before = json.loads(out.read_text(encoding="utf-8"))["results"] if out.exists() else []
    others = [each for each in before if each["name"] != result["name"]]
    out.parent.mkdir(parents=True, exist_ok=True)
    whole = {"results": [*others, result | about]}
    out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.grpo", description=__doc__.split("\n\n")[1])
    parser.add_argument("--work", nargs="+", required=True)
    parser.add_argument("--peers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--build", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    try:
        works = [parse(text) for text in given.work]
        chosen = [trainers_of(given.peers) if given.peers else default_trainers(work) for work in works]
        for peer in sorted({name.split("/")[0] for names in chosen for name in names}):
            ready(peer, given.build)
    except UserError as error:
        parser.error(str(error))
    threads = cores(given.threads)
    date, found = datetime.date.today().isoformat(), machine()
    out = given.out or HERE / "results" / f"grpo-{file_name(found)}-{date}.json"
    command = f"python -m benchmarks.peers.grpo {' '.join(sys.argv[1:])}".strip()
    for work, names in zip(works, chosen, strict=True):
        result = measure(work, names, given.rounds, given.seconds, threads)
        about = {"date": date, "command": command, "threads": threads}
        keep(out, result, about | {"machine": found | {"load_after": os.getloadavg()[0]}})
        print("\n".join(table(result)), end="\n\n", flush=True)
    print(out)


if __name__ == "__main__":
    main()

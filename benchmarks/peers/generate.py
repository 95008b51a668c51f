"""`python -m benchmarks.peers.generate --work M,64,float32 ..`: our engine beside transformers, TRL's path and Tunix's sampler.

The same weights (one safetensors file), prompts and number of new tokens, none of which ends a row; each generator
in a separate process and environment, on the same cores; calls in turns. What each includes: docs/benchmarks.md.

--work     SIZE,ROWS,DTYPE, one or several: S, M or L of benchmarks/models.py
--prompts  groups: 8 rows per prompt; different: one; or both
--top-p    default 1, plain sampling at temperature 1
--peers    PEER or PEER/VARIANT, with commas; default ours, transformers/dynamic and /static, waiting and spinning, tunix/plain
--rounds   timed calls of each, after one that compiles and one that warms up; default 5
--seconds  time limit per work to find that many quiet rounds, in which other processes used at most a tenth of the machine;
           after it the quietest rounds count; default 120
--threads  number of cores for every process; default all
--build    build missing environments
--out      default benchmarks/results/peers-<device>-<cores>core-<date>.json
"""

import argparse
import datetime
import json
import os
import sys
import time
from functools import partial
from pathlib import Path

from benchmarks.machine import HERE, file_name, machine
from benchmarks.peers import environments, weights
from benchmarks.peers.compare import agreement, entry, quietest, ratios, table
from benchmarks.peers.processes import Worker, WorkerError, disturbance, in_turns
from benchmarks.peers.work import DIFFERENT, GROUPS, Work, parse
from jaxrl_llm.errors import UserError

MODULES = {"ours": "ours", "transformers": "transformers_generate", "trl": "trl_grpo", "tunix": "tunix_sampler"}
PASSIVE = "-passive"
"""OpenMP threads sleep while waiting. By default they spin, and then any other process on a core slows torch tenfold."""
SETTINGS = {"": {}, PASSIVE: {"OMP_WAIT_POLICY": "PASSIVE"}}
TORCH = {"transformers": ("dynamic", "static", "compile"), "trl": ("generate", "logprobs")}
VARIANTS = {
    "ours": ("default",),
    "tunix": ("plain", "logprobs"),
    **{peer: tuple(v + wait for v in variants for wait in SETTINGS) for peer, variants in TORCH.items()},
}
DEFAULT = ",".join(
    ["ours", *(f"transformers/{v}{wait}" for v in ("dynamic", "static") for wait in SETTINGS), "tunix/plain"]
)


def entries_of(text: str) -> list[str]:
    """Return every variant named by `text` ("ours,transformers"), as peer/variant. Raises UserError for unknown ones."""
    found = []
    for part in text.split(","):
        peer, _, variant = part.partition("/")
        if peer not in VARIANTS or (variant and variant not in VARIANTS[peer]):
            known = ", ".join(f"{p}/{v}" for p, variants in VARIANTS.items() for v in variants)
            raise UserError(f"--peers: got {part}, want some of {known}")
        found += [f"{peer}/{v}" for v in ([variant] if variant else VARIANTS[peer])]
    return found


def start(name: str, work: Work, threads: int) -> tuple[Worker, dict]:
    """Start a worker and load the weights; return it with its facts."""
    peer, variant = name.split("/")
    plain = variant.removesuffix(PASSIVE)
    settings = SETTINGS[variant.removeprefix(plain)]
    worker = Worker(environments.python(peer), f"benchmarks.peers.workers.{MODULES[peer]}", threads, settings)
    try:
        given = {"directory": str(weights.directory(work.size)), "compute": work.compute, "variant": plain}
        return worker, worker.ask(load=given)
    except WorkerError:
        worker.close()
        raise


def measure(work: Work, names: list[str], rounds: int, seconds: float, threads: int) -> dict:
    """Time every generator at one work."""
    workers, facts, failed = {}, {}, {}
    try:
        for name in names:
            try:
                workers[name], facts[name] = start(name, work, threads)
            except WorkerError as error:
                failed[name] = str(error)
                print(f"{name}: {error}", file=sys.stderr, flush=True)
        calls = {name: partial(generate, worker, work, name) for name, worker in workers.items()}
        answers, fell = in_turns(calls, rounds, time.monotonic() + seconds)
        others = disturbance(answers)
        chosen = quietest(others, rounds)
        found = {name: facts_of(facts[name]) | entry(a, chosen, work.tokens) for name, a in answers.items()}
        if work.compute == "float32":
            check(found, {name: workers[name] for name in found}, work)
    finally:
        for worker in workers.values():
            worker.close()
    return {
        "name": work.name,
        "work": work.as_dict(),
        "tokens": work.tokens,
        "rounds": len(chosen),
        "rounds_run": max(len(others) - 2, 0),
        "entries": found,
        "ours_to": ratios(found),
        "failed": failed | fell,
    }


def facts_of(answer: dict) -> dict:
    return answer["facts"] | {"load_s": answer["seconds"], "loaded_peak_bytes": answer["peak_bytes"]}


def generate(worker: Worker, work: Work, name: str, turn: int) -> dict:
    answer = worker.ask(generate=work.call(seed=turn))
    tokens = sum(map(len, answer["tokens"]))
    if len(answer["tokens"]) != work.rows or tokens != work.tokens:
        raise WorkerError(
            f"{name}: got {tokens} tokens in {len(answer['tokens'])} rows, want {work.tokens} in {work.rows}"
        )
    print(f"{name}, turn {turn}: {answer['seconds']:.2f} s, others {answer['others']:.0%}", file=sys.stderr, flush=True)
    return answer


def check(found: dict[str, dict], workers: dict[str, Worker], work: Work) -> None:
    """Compare the greedy tokens of every generator with ours, after the timed calls, to verify that the weights are the same.

    Only in f32: in bf16 each rounds differently, which decides near ties.
    """
    ours = next((name for name in found if name.startswith("ours/")), None)
    if ours is None:
        return
    greedy = {name: worker.ask(generate=work.call(0, greedy=True))["tokens"] for name, worker in workers.items()}
    for name, tokens in greedy.items():
        found[name]["greedy_agreement"] = agreement(greedy[ours], tokens)


def cores(threads: int | None) -> int:
    """Restrict this process, and so its workers, to `threads` cores; return the number of cores."""
    there = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, there[: threads or len(there)])
    return len(os.sched_getaffinity(0))


def run(works: list[Work], names: list[str], rounds: int, seconds: float, threads: int, out: Path | None) -> dict:
    date = datetime.date.today().isoformat()
    result = {
        "date": date,
        "command": f"python -m benchmarks.peers.generate {' '.join(sys.argv[1:])}".strip(),
        "machine": machine(),
        "threads": threads,
        "results": [],
    }
    out = out or HERE / "results" / f"peers-{file_name(result['machine'])}-{date}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    for work in works:
        result["results"].append(measure(work, names, rounds, seconds, threads))
        result["machine"]["load_after"] = os.getloadavg()[0]
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print("\n".join(table(result["results"][-1])), end="\n\n", flush=True)
    print(out)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.generate", description=__doc__.split("\n\n")[1])
    parser.add_argument("--work", nargs="+", required=True)
    parser.add_argument("--prompts", choices=(GROUPS, DIFFERENT, "both"), default=GROUPS)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--peers", default=DEFAULT)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--build", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    forms = (GROUPS, DIFFERENT) if given.prompts == "both" else (given.prompts,)
    try:
        works = [parse(text, form, given.top_p) for text in given.work for form in forms]
        names = entries_of(given.peers)
        for peer in sorted({name.split("/")[0] for name in names}):
            ready(peer, given.build)
    except UserError as error:
        parser.error(str(error))
    run(works, names, given.rounds, given.seconds, cores(given.threads), given.out)


def ready(peer: str, build: bool) -> None:
    """Check that `peer` has an environment, or build it. Raises UserError if it has none and `build` is False."""
    try:
        environments.python(peer)
    except UserError:
        if not build:
            raise
        environments.build(peer)


if __name__ == "__main__":
    main()

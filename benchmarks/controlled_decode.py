"""`python -m benchmarks.controlled_decode [--size L] [--rows 8,64] [--pairs 5] [--out FILE.json]`: decode steps under a control.

Each pair is a chunk of decode steps of free rows and one of rows under an automaton of 1,000 states and 90 classes, in two sessions
of one model, one after the other. Prompts are prefilled before. The ratio is the median of the pairs'.

--size   of the model; L has the shape of Qwen2.5-0.5B, 151,936 tokens
--rows   numbers of rows
--pairs  of chunks
--out    a JSON file for the numbers
"""

import argparse
import json
import time

import jax
import numpy as np

from benchmarks.generate import make_policy
from benchmarks.machine import machine
from benchmarks.models import PROMPT_SLOTS, SAMPLES, SIZES, Workload, layouts, make_params
from jaxrl_llm.control.automaton import REFUSED, TokenAutomaton, token_automaton
from jaxrl_llm.control.config import RegexControl
from jaxrl_llm.rollout.config import EngineConfig, RolloutConfig
from jaxrl_llm.rollout.control_set import ControlSet
from jaxrl_llm.rollout.engine import Engine, EngineModel
from jaxrl_llm.rollout.session import Session
from jaxrl_llm.types import Policy

STATES, CLASSES, STEPS = 1000, 90, 8


def automaton(vocab: int) -> TokenAutomaton:
    """A random one, in which a third of all tokens is allowed, and which never ends."""
    rng = np.random.default_rng(0)
    allowed = rng.random((STATES, CLASSES)) < 1 / 3
    following = np.where(allowed, rng.integers(0, STATES, (STATES, CLASSES)), REFUSED)
    none = np.zeros(STATES, bool)
    return token_automaton(rng.integers(0, CLASSES, vocab), following, none.astype(np.int32), 0, none)


def open_session(work: Workload, policy: Policy, chunks: int, controlled: bool) -> Session:
    """A session whose rows have all been prefilled."""
    cfg = RolloutConfig(
        prompts=work.prompts, samples=SAMPLES, max_new_tokens=STEPS * (chunks + 1),
        engine=EngineConfig(decode_chunk=STEPS, window=STEPS * (chunks + 1)),
    )  # fmt: skip
    engine = Engine(EngineModel(work.cfg, layouts()[1], work.vocabulary), cfg, PROMPT_SLOTS)
    engine.control_set = ControlSet(work.vocabulary, work.cfg.vocab_size, lambda _: automaton(work.cfg.vocab_size))
    session = engine.session(policy, jax.random.key(0))
    control = RegexControl(pattern=".") if controlled else None
    session.add(work.make_prompts(), controls=engine.controls(work.prompts, control=control))
    session.advance()
    return session


def seconds_per_step(session: Session) -> float:
    before, begun = session.stats.steps, time.perf_counter()
    session.advance()
    return (time.perf_counter() - begun) / (session.stats.steps - before)


def measure(work: Workload, policy: Policy, pairs: int) -> dict:
    """Seconds per step, free and controlled, and the ratio of each pair."""
    sessions = [open_session(work, policy, pairs, controlled) for controlled in (False, True)]
    free, controlled = np.array([[seconds_per_step(session) for session in sessions] for _ in range(pairs)]).T
    return {"free_s": free.tolist(), "controlled_s": controlled.tolist(), "ratio": (controlled / free).tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="L")
    parser.add_argument("--rows", default="8,64")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out")
    args = parser.parse_args()
    found, result = machine(), {}
    params = make_params(args.size)
    for rows in map(int, args.rows.split(",")):
        work = Workload(args.size, rows, "float32")
        result[rows] = measure(work, make_policy(work, params), args.pairs)
        free, controlled, ratio = (np.median(result[rows][name]) for name in ("free_s", "controlled_s", "ratio"))
        print(f"{work.name}: {1e3 * free:.0f} ms a step, controlled {1e3 * controlled:.0f} ms, ratio {ratio:.3f}")
    if args.out:
        with open(args.out, "w") as file:
            json.dump(
                {"machine": found, "size": args.size, "steps": STEPS, "states": STATES, "rows": result}, file, indent=1
            )


if __name__ == "__main__":
    main()

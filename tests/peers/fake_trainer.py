"""A worker that trains nothing: `python -m fake_trainer` from this directory. Variant `apart` exits at its second step."""

import sys

from benchmarks.peers.paced import Paced
from benchmarks.peers.serve import Step, serve_steps


def load(directory: str, words: str, compute: str, variant: str, beta: float) -> tuple[Step, dict]:
    updates = []

    def loop(pause) -> None:
        while True:
            updates.append(len(updates) + 1)
            pause()

    run = Paced(loop)

    def step() -> dict:
        run.step()
        if variant == "apart" and len(updates) == 2:
            sys.exit("out of everything")
        return {"rollout_s": 0.25, "tokens": 8192, "updates": updates[-1], "stages": {"time/update": 0.5}}

    return step, {"dtype": compute, "words": words, "beta": beta}


if __name__ == "__main__":
    serve_steps(load)

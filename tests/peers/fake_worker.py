"""A worker without a model: `python -m fake_worker` from this directory. Each row counts up from its prompt's last id.

Variant `dies` exits at its second call; `prints` writes to the stream of the answers.
"""

import os
import sys

from benchmarks.peers.serve import Call, Generate, serve


def load(directory: str, compute: str, variant: str) -> tuple[Generate, dict]:
    calls = []

    def generate(call: Call) -> list[list[int]]:
        calls.append(call)
        if variant == "prints":
            print("not an answer")
            os.write(1, b"nor this\n")
        if variant == "dies" and len(calls) == 2:
            sys.exit("out of everything")
        return [[p[-1] + 1 + i for i in range(call.new_tokens)] for p in call.prompts for _ in range(call.samples)]

    return generate, {"dtype": compute, "directory": directory}


if __name__ == "__main__":
    serve(load)

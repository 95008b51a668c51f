"""Terminal output of a short run, and of Ctrl-C at five moments: the excerpts of docs/quickstart.md.

python docs/experiments/first_hour.py terminal 40
python docs/experiments/first_hour.py terminal 80
python docs/experiments/first_hour.py ctrl-c
"""

import fcntl
import os
import pty
import re
import struct
import sys
import tempfile
import termios
import time
from pathlib import Path
from typing import NamedTuple

CONFIG = Path(__file__).parents[2] / "configs/arithmetic.yaml"
RUN = "--warm_start.steps 100 --warm_start.optimizer.decay_steps 80 --steps 50 --metrics.samples_every 0"
# Many responses, so that there is time to press a key while they are sampled.
LARGE = f"{RUN} --warm_start.steps 2 --steps 3 --rollout.prompts 800 --rollout.samples 64"
MOMENTS = (  # name, pattern of the line, options of the run
    ("compiling at the start", r"compiling the update of the warm start", RUN),
    ("in the warm start", r" 4\d/150", RUN),
    ("sampling", r"sampling (?!the first)", LARGE),
    ("updating", r"100/150 compiling the update", RUN),
    ("at the end", r"150/150 (reward|saving)", RUN),
)
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Seen(NamedTuple):
    before: list[str]
    """Before Ctrl-C: complete lines, and the last progress line of each kind."""
    after: list[str]
    code: int
    seconds: float
    """From Ctrl-C to the end; from the start if there is no Ctrl-C."""


def watch(arguments: str, columns: int, stop_at: str = "") -> Seen:
    """Run `jaxrl train configs/arithmetic.yaml` in a terminal of its own; press Ctrl-C when new output matches `stop_at`."""
    pid, terminal = pty.fork()
    if not pid:
        command = ["jaxrl", "train", str(CONFIG), *arguments.split()]
        os.execvpe(command[0], command, os.environ | {"JAX_PLATFORMS": "cpu", "TERM": "xterm"})
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    shown, pressed, since = b"", None, time.monotonic()
    while True:
        try:
            new = os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
        if stop_at and re.search(stop_at, ESCAPES.sub("", new.decode(errors="replace"))):
            os.write(terminal, b"\x03")
            stop_at, pressed, since = "", len(shown) + len(new), time.monotonic()
        shown += new
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    before, after = (
        condensed(part.decode(errors="replace"), columns)
        for part in (shown[:pressed], shown[pressed:] if pressed else b"")
    )
    return Seen(before, after, code, time.monotonic() - since)


def condensed(shown: str, columns: int) -> list[str]:
    """Complete lines, and the last progress line of each kind."""
    kept: list[tuple[str, str]] = []
    progress = ""
    for line, end in re.findall(r"([^\r\n]*)([\r\n]+|$)", ESCAPES.sub("", shown)):
        line, is_ended = line.rstrip(), "\n" in end
        kind = "" if is_ended else " ".join(re.findall(r"[a-z]+", line))
        if not line or (line == progress and not is_ended):
            continue
        progress = progress if is_ended else line
        if kept and (kept[-1][1] == line or (kind and kept[-1][0] == kind)):
            kept.pop()
        kept += [(kind, line[n : n + columns]) for n in range(0, len(line), columns)]
    return [line for _, line in kept]


def main(what: str, columns: str = "80") -> None:
    with tempfile.TemporaryDirectory() as made:
        os.chdir(made)
        if what == "terminal":
            seen = watch(f"{RUN} --run-dir runs/short", int(columns))
            print(*seen.before, f"exit code {seen.code}, {seen.seconds:.0f} s", sep="\n")
        for n, (moment, pattern, run) in enumerate(MOMENTS if what == "ctrl-c" else ()):
            seen = watch(f"{run} --run-dir runs/{n}", int(columns), pattern)
            print(
                f"== {moment}",
                seen.before[-1],
                *seen.after,
                f"exit code {seen.code} after {seen.seconds:.1f} s",
                sep="\n",
            )
            again = watch(f"{run} --run-dir runs/{n}", int(columns), r"\d/(150|5) (?!saving)|held-out accuracy \(")
            print("-- the same command again", *again.before, sep="\n", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Program of the process that calls wandb; `weights_and_biases.py` starts and feeds it. Imports nothing of the package.

Reads JSON lines [kind, content] from a socket: first the arguments of `wandb.init`, then scalars and tables, at last "close".
Writes what the user should know, one line each. If the trainer dies, there is no "close", and the run is finished as failed.
"""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

INIT_S, FINISH_S = 30, 20
"""Seconds for W&B to answer at the start, and to take what is left at the end."""


def serve(lines: Iterator[bytes], say: Callable[[str], None]) -> None:
    """Record one run."""
    import wandb

    messages = whole(lines)
    try:
        _, options = next(messages)
        run = start(wandb, options, say)
        failed = record(wandb, run, messages, say)
        try:
            run.finish(exit_code=int(failed))
        except TimeoutError:
            say(
                f"the upload was not finished {FINISH_S} s after the end of the run; "
                f"`wandb sync --include-online {options['dir']}/wandb` uploads the rest"
            )
    finally:
        wandb.teardown()


def start(wandb: Any, options: dict[str, Any], say: Callable[[str], None]) -> Any:
    """The run; offline where W&B cannot be reached."""
    settings = wandb.Settings(
        silent=True, console="off", disable_code=True, x_stats_pid=os.getppid(),
        init_timeout=INIT_S, finish_timeout=FINISH_S, finish_timeout_raises=True,
    )  # fmt: skip
    try:
        run = wandb.init(**options, settings=settings)
    except Exception as error:
        if options["mode"] == "offline":
            raise
        upload = f"`WANDB_RESUME=allow wandb sync {options['dir']}/wandb` uploads it"
        say(f"no upload: {first_line(error)}; the run is recorded offline, {upload}")
        wandb.teardown()  # the first attempt still holds the run's id
        run = wandb.init(**options | {"mode": "offline"}, settings=settings)
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def record(wandb: Any, run: Any, messages: Iterator[tuple[str, Any]], say: Callable[[str], None]) -> bool:
    """Log all scalars and tables; the user hears of the first error only. Returns whether the trainer failed.

    Args:
        wandb: the package.
        run: of wandb.
        messages: from the trainer.
        say: shows the user a message.
    """
    has_complained, number = False, 0
    for kind, content in messages:
        if kind == "close":
            return content
        try:
            if kind == "table":
                table = wandb.Table(columns=content["columns"], data=content["rows"], allow_mixed_types=True)
                content = {"step": content["step"], "samples": table}
            # wandb numbers the rows of every offline session from 0, so a resumed run would be uploaded with several of each.
            number = max(number + 1, int(10 * time.time()))
            run.log(content, step=number if run.offline else None, commit=True)
        except Exception as error:
            if not has_complained:
                say(f"step {content['step']} was not recorded: {first_line(error)}; later failures are not shown")
            has_complained = True
    return True


def whole(lines: Iterator[bytes]) -> Iterator[tuple[str, Any]]:
    """The messages; a line that the trainer's death cut short is none."""
    for line in lines:
        if line.endswith(b"\n"):
            yield tuple(json.loads(line))


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # how wandb passes on the button "Stop run" of its page
    with socket.socket(fileno=int(sys.argv[1])) as trainer, trainer.makefile("rb") as lines:

        def say(text: str) -> None:
            with suppress(OSError):  # the trainer is gone
                trainer.sendall(text.encode("utf-8", "replace") + b"\n")

        try:
            serve(lines, say)
        except Exception as error:  # wandb may raise anything
            say(f"{first_line(error)}; nothing more is recorded there")
            for _ in lines:  # until the trainer closes
                pass


if __name__ == "__main__":
    main()

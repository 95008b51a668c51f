"""Start one jaxrl command as n processes on this machine, like a cluster does, on a laptop and in tests.

    python launch/local.py --processes 2 --devices 4 -- train configs/arithmetic.yaml --mesh.fsdp 8

Process 0 writes to this terminal, the others to `<log-dir>/process_<i>.log`. The first process that fails ends the
others (SIGTERM, then SIGKILL after `--grace` seconds) and determines the exit code. SIGTERM and SIGINT are passed on once,
and the launcher then waits: a run that saves and exits 75 makes the launcher exit 75. A second signal kills at once.
"""

import argparse
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

PREEMPTED = 75  # EX_TEMPFAIL: state was saved, the same command resumes
POLL_SECONDS = 0.05
TAIL_LINES = 20
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here, since loading after a fork is unsafe


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split at the first `--` into the launcher's options and the jaxrl command."""
    parser = argparse.ArgumentParser(
        description="Start one jaxrl command as n processes on this machine.",
        usage="%(prog)s [-h] [--processes N] [--devices N] [--log-dir DIR] [--grace SECONDS] [--module NAME] -- ARGS",
    )
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="processes to start (default 2)")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="CPU devices in each process (default 1)")
    parser.add_argument(
        "--log-dir", type=Path, metavar="DIR", help="for the output of processes 1.. (default: a temp dir)"
    )
    parser.add_argument(
        "--grace", type=float, default=5.0, metavar="SECONDS", help="between SIGTERM and SIGKILL (default 5)"
    )
    parser.add_argument("--module", default="jaxrl_llm.cli", metavar="NAME", help="a module, or a path ending in .py")
    split = argv.index("--") if "--" in argv else len(argv)
    options, command = parser.parse_args(argv[:split]), argv[split + 1 :]
    if options.processes < 1 or options.devices < 1:
        parser.error(f"--processes and --devices must be at least 1, got {options.processes} and {options.devices}")
    if not command and options.module == "jaxrl_llm.cli":
        parser.error("nothing to run: put the jaxrl command after --, for example `-- train configs/arithmetic.yaml`")
    return options, command


def free_port() -> int:
    """Return a loopback port that is free now; another program may still take it before process 0 binds it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def child_environment(base: Mapping[str, str], *, port: int, processes: int, process_id: int, devices: int) -> dict:
    """Return the environment of one process, without proxies: gRPC would send loopback traffic through them and hang."""
    kept = {name: value for name, value in base.items() if not name.lower().endswith("_proxy")}
    return kept | {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",  # JAX listens on every interface by default
        "JAXRL_NUM_PROCESSES": str(processes),
        "JAXRL_PROCESS_ID": str(process_id),
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": "1",
    }


def log_path(log_dir: Path, process_id: int) -> Path:
    return log_dir / f"process_{process_id}.log"


def spawn(
    options: argparse.Namespace, command: list[str], log_dir: Path, port: int, process_id: int
) -> subprocess.Popen:
    """Start one process in a new session, so that Ctrl-C reaches it only once, through the launcher."""
    target = [options.module] if options.module.endswith(".py") else ["-m", options.module]
    environment = child_environment(
        os.environ, port=port, processes=options.processes, process_id=process_id, devices=options.devices
    )
    log = None if process_id == 0 else log_path(log_dir, process_id).open("wb")
    try:
        return subprocess.Popen(
            [sys.executable, "-u", *target, *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=None if log is None else subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent if LIBC else None,
        )
    finally:
        if log is not None:
            log.close()


def die_with_parent() -> None:
    """Run in the child before exec, so that a launcher killed by SIGKILL leaves no orphans (Linux only)."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def send(children: list[subprocess.Popen], signum: int) -> None:
    for child in children:
        if child.poll() is None:
            child.send_signal(signum)


def kill_sessions(children: list[subprocess.Popen]) -> None:
    """Send SIGKILL to each running child and its subprocesses. (Reward workers notice and exit.)"""
    for child in children:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)


def supervise(children: list[subprocess.Popen], received: list[int], grace: float) -> tuple[int, int]:
    """Wait for all processes. Return the first that failed and its return code, or (-1, 0) if none failed.

    Args:
        children: The processes.
        received: Signals received so far, filled by the signal handlers.
        grace: Seconds between SIGTERM and SIGKILL after a failure. Exit 75 after a signal is no failure: the others may still
            be writing their part of the same checkpoint.
    """
    passed_on, deadline, first = 0, None, (-1, 0)
    while True:
        running = [child for child in children if child.poll() is None]
        failed = [(i, child.returncode) for i, child in enumerate(children) if child.returncode]
        if failed and first == (-1, 0):
            first = failed[0]
        if not running:
            return first
        unexpected = [code for _, code in failed if not (code == PREEMPTED and passed_on)]
        if unexpected and deadline is None:
            send(children, signal.SIGTERM)
            deadline = time.monotonic() + grace
        if len(received) > passed_on:
            passed_on += 1
            if passed_on == 1:
                send(children, received[0])
            else:
                deadline = time.monotonic()
        if deadline is not None and time.monotonic() >= deadline:
            kill_sessions(children)
        time.sleep(POLL_SECONDS)


def print_tails(log_dir: Path, processes: int) -> None:
    for process_id in range(1, processes):
        path = log_path(log_dir, process_id)
        tail = path.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        print(f"--- last {len(tail)} lines of {path}", *tail, sep="\n", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    options, command = parse(sys.argv[1:] if argv is None else argv)
    log_dir = options.log_dir or Path(tempfile.mkdtemp(prefix="jaxrl_launch_"))
    log_dir.mkdir(parents=True, exist_ok=True)
    received: list[int] = []
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda number, _frame: received.append(number))

    port = free_port()
    children: list[subprocess.Popen] = []
    try:
        for process_id in range(options.processes):
            children.append(spawn(options, command, log_dir, port, process_id))
        who, code = supervise(children, received, options.grace)
    finally:
        kill_sessions(children)

    ended = f"signal {-code}" if code < 0 else f"code {code}"
    exit_code = 128 - code if code < 0 else code  # the shell's convention: 137 is SIGKILL
    if code and not (code == PREEMPTED and received):
        print(f"launch/local.py: process {who} of {options.processes} failed first, with {ended}", file=sys.stderr)
        print_tails(log_dir, options.processes)
    elif options.log_dir is None:
        shutil.rmtree(log_dir)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())

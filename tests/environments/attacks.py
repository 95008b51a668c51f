"""Graders that attack the process that runs them, on purpose or not. The completion names the attack."""

import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
import time


def _fork_and_exit():
    if os.fork() == 0:
        time.sleep(600)
    os._exit(0)


def _fork_and_continue():
    os.fork()
    return 1


def _fork_and_answer_late():
    if os.fork() == 0:
        time.sleep(0.3)
    return 1


def _daemonize(then=lambda: 1):
    """Fork twice, in a new session, and ignore signals, as a daemon does."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(signum, signal.SIG_IGN)
            time.sleep(600)
        os._exit(0)
    os.wait()
    return then()


def _start(*command, **options):
    subprocess.Popen(command, **options)
    return 1


def _thread():
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    return 1


def _fork_many():
    """Forty processes, half of them grandchildren."""
    for _ in range(20):
        if os.fork() == 0:
            os.fork()
            time.sleep(600)
    return 1


def _chain():
    """A process that forks and ends, again and again, until it is killed."""
    if os.fork() == 0:
        os.setsid()
        end = time.monotonic() + 600
        while time.monotonic() < end:
            if os.fork():
                os._exit(0)
    return 1


def _connections():
    return [fd for fd in range(256) if _is_socket(fd)]


def _is_socket(fd):
    try:
        return stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError:
        return False


def _send(text, then=lambda: time.sleep(600)):
    for fd in _connections():
        with socket.socket(fileno=os.dup(fd)) as connection:
            connection.sendall(text)
    return then()


def _close_everything():
    os.closerange(0, 1024)
    return 1


def _flood_stderr():
    for _ in range(1000):
        os.write(2, b"\x1b[2J a line of a million\n" * 1000)
    return 1


def _lower_limits():
    os.chdir("/")
    resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
    resource.setrlimit(resource.RLIMIT_CPU, (3600, 3600))
    return 1


def _allocate():
    """Allocate one GiB, unless the limit is lower."""
    return len([bytearray(2**24) for _ in range(64)])


def _recurse():
    return _recurse() + 1


def _signal(pid, signum, then=lambda: 1):
    os.kill(pid, signum)
    return then()


ATTACKS = {
    "fork, exit": _fork_and_exit,
    "fork, both continue": _fork_and_continue,
    "fork, the child continues later": _fork_and_answer_late,
    "daemon": _daemonize,
    "daemon, sleep": lambda: _daemonize(lambda: time.sleep(600)),
    "daemon, exit": lambda: _daemonize(lambda: os._exit(0)),
    "child": lambda: _start("sleep", "600"),
    "child without environment": lambda: _start(
        sys.executable, "-c", f"import time; time.sleep(600)  # {os.environ['JAXRL_TEST_MARK']}", env={}
    ),
    "shell with a background job": lambda: _start("sh", "-c", "sleep 600 & sleep 600 & wait", start_new_session=True),
    "thread": _thread,
    "fork many": _fork_many,
    "chain": _chain,
    "close everything": _close_everything,
    "send garbage": lambda: _send(b"\x80\x04}\xff garbage \n"),
    "send a number": lambda: _send(b"7\n"),
    "send another verdict": lambda: _send(b'{"components": [[1e999]], "votes": [], "failure": 0}\n'),
    "send half a message": lambda: _send(b'{"components": [[1.0'),
    "send without end": lambda: _send(b"1" * 100_000_000),
    "stop": lambda: _signal(os.getpid(), signal.SIGSTOP),
    "kill the group": lambda: _signal(0, signal.SIGKILL),
    "kill the watchdog": lambda: _signal(os.getppid(), signal.SIGKILL, lambda: time.sleep(600)),
    "terminate the watchdog": lambda: _signal(os.getppid(), signal.SIGTERM),
    "stop the watchdog": lambda: _signal(os.getppid(), signal.SIGSTOP, lambda: time.sleep(600)),
    "flood stderr": _flood_stderr,
    "long line on stderr": lambda: bool(os.write(2, b"x" * 20_000)),
    "lower limits": _lower_limits,
    "allocate": _allocate,
    "recurse": _recurse,
    "pid": os.getpid,
    "exit code": lambda: os._exit(3),
    "abort": os.abort,
}


def attack(sample):
    return ATTACKS[sample.completion]() if sample.completion in ATTACKS else float(sample.completion)

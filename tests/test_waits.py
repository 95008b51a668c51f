"""Every blocking call in the sources has a timeout, or a reason in REASONS why it ends without one."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DIRECTORIES = "jaxrl_llm", "launch", "benchmarks", "experiments"

# Blocking calls without a timeout: file -> {called function, as written by `ast.unparse`: why it ends}.
HEARTBEAT = (
    "a collective: JAX's coordination service ends all processes when one is gone, and parallel/job.py when one failed"
)
COMPUTES = "our threads, which compute, compile or read files and block on nothing"
REASONS = {
    "jaxrl_llm/checkpoint/store.py": {
        "self._manager.wait_until_finished": "Orbax's own timeout_secs",
        "multihost_utils.sync_global_devices": HEARTBEAT,
        "self.wait": "our own method, which waits for Orbax",
        "time.sleep": "between looks at Orbax's save, until its deadline, and between the tries of a read, which are counted",
    },
    "jaxrl_llm/roles/collector.py": {"job.result": "the pool's thread waits by its own deadlines"},
    "jaxrl_llm/run_context.py": {
        "context.checkpoints.wait": "our own method, which waits for Orbax",
        "checkpoints.wait": "the same",
        "context.checkpoints.poll": "our own method, which does not wait",
    },
    "jaxrl_llm/checkpoint/stopping.py": {
        "os.read": "from a pipe that is ready",
        "os.write": "to a pipe that does not block, or an error's last line",
    },
    "jaxrl_llm/metrics/wandb_process.py": {
        "trainer.sendall": "a few lines, less than a socket holds; and the trainer kills this process in the end"
    },
    "jaxrl_llm/metrics/weights_and_biases.py": {
        "self._socket.recv": "a socket that does not block",
        "self._socket.send": "a socket that does not block",
        "self._socket.shutdown": "does not wait",
    },
    "jaxrl_llm/model/grouped_blocks.py": {
        "x.at[row].get": "entries of an array",
        "matrices.at[index].get": "entries of an array",
    },
    "jaxrl_llm/model/hf/export.py": {"multihost_utils.sync_global_devices": HEARTBEAT},
    "jaxrl_llm/model/hf/load.py": {"with ThreadPoolExecutor": COMPUTES},
    "jaxrl_llm/parallel/compiled_ahead.py": {"self._compiled.result": COMPUTES},
    "jaxrl_llm/parallel/hosts.py": {"multihost_utils.process_allgather": HEARTBEAT},
    "jaxrl_llm/plan/programs.py": {"with ThreadPoolExecutor": COMPUTES},
    "jaxrl_llm/tasks/renderer.py": {
        "pipe.recv": "the trainer's end is closed when the trainer ends, or gives up",
        "pipe.send_bytes": "the same; and SIGALRM ends the process",
        "self._pipe.send": "the process reads all before it renders, or SIGALRM ends it",
        "self._pipe.recv_bytes": "behind a poll with a limit; an answer that has begun comes whole, or SIGALRM ends the process",
        "self._process.poll": "Popen.poll does not wait",
    },
    "jaxrl_llm/environments/watchdog.py": {
        "os.read": "from pipes that are ready or do not block",
        "os.write": "to a pipe that does not block",
    },
    "jaxrl_llm/environments/worker_handle.py": {
        "self._connection.recv": "a socket that does not block",
        "self._connection.send": "a socket that does not block",
    },
    "jaxrl_llm/environments/worker.py": {
        "connection.sendall": "the watchdog ends a worker that the trainer no longer waits for"
    },
    "jaxrl_llm/rollout/programs.py": {"with ThreadPoolExecutor": COMPUTES, "ahead.result": COMPUTES},
    "launch/local.py": {
        "child.poll": "Popen.poll does not wait",
        "time.sleep": "the launcher's own loop, which lasts as long as the job: a signal ends it",
    },
    "benchmarks/peers/processes.py": {"os.read": "from a pipe that is ready"},
    "benchmarks/peers/paced.py": {
        "self._go.acquire": "a daemon thread, which waits for requests and ends with the process"
    },
}

# These block forever without arguments; with arguments they are other functions (str.join, dict.get) or have a timeout.
BLOCKING_WITHOUT_ARGUMENTS = {
    "join",
    "get",
    "acquire",
    "wait",
    "poll",
    "result",
    "exception",
    "recv_bytes",
    "shutdown",
    "select",
}
# These block forever unless they have a timeout argument.
ALWAYS = {
    "recv", "recv_into", "send", "sendall", "send_bytes", "accept", "communicate", "sigwait", "pause", "serve_forever",
    "as_completed",
    "wait_until_finished", "sync_global_devices", "process_allgather", "broadcast_one_to_all", "wait_at_barrier",
    "blocking_key_value_get",
}  # fmt: skip
SUBPROCESS = {"run", "call", "check_call", "check_output"}
POOLS = {"ThreadPoolExecutor", "ProcessPoolExecutor", "Pool"}
LIMITS = {"timeout", "timeout_s", "timeout_ms", "timeout_in_ms"}
# Module functions with a positional timeout: its position, counted from 1.
TIMEOUT_POSITION = {
    "select.select": 4,
    "connection.wait": 2,
    "futures.wait": 2,
    "blocking_key_value_get": 2,
    "wait_at_barrier": 2,
}


def waits(source: str) -> list[str]:
    """Return the blocking calls without a timeout in a source file, named as in REASONS."""
    tree = ast.parse(source)
    limited = {id(node) for loop in ast.walk(tree) if _has_limit(loop) for node in ast.walk(loop)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.withitem) and isinstance(node.context_expr, ast.Call):
            name = _name(node.context_expr)
            found += [f"with {name}"] if name.rpartition(".")[2] in POOLS else []
        elif isinstance(node, ast.Call) and _blocks_forever(node, id(node) in limited):
            found.append(_name(node))
    return found


def _has_limit(node: ast.AST) -> bool:
    """True for a loop that checks the clock before each iteration."""
    return isinstance(node, ast.While) and "monotonic()" in ast.unparse(node.test)


def _blocks_forever(call: ast.Call, is_limited: bool) -> bool:
    name, text = _name(call), ast.unparse(call)
    last = name.rpartition(".")[2]
    if {keyword.arg for keyword in call.keywords} & LIMITS:
        return False
    for function, place in TIMEOUT_POSITION.items():
        if name == function or name.endswith(f".{function}"):
            return len(call.args) < place
    if last == "sleep":
        return not is_limited
    if last in ("flock", "lockf"):
        return "LOCK_NB" not in text and "LOCK_UN" not in text
    if last in ("waitpid", "waitid"):
        return "WNOHANG" not in text
    if name.startswith("subprocess."):
        return last in SUBPROCESS
    if name in ("os.read", "os.write", "os.wait", "signal.pause"):
        return True
    if name == "select.poll":
        return False
    if last == "shutdown":
        return "wait=False" not in text
    if last == "acquire":
        return "blocking=False" not in text and not call.args
    if last == "get" and "block=False" in text:
        return False
    is_method = isinstance(call.func, ast.Attribute)
    return is_method and (last in ALWAYS or (last in BLOCKING_WITHOUT_ARGUMENTS and not call.args))


def _name(call: ast.Call) -> str:
    return ast.unparse(call.func)


def test_every_wait_has_a_deadline_or_a_reason():
    found = {}
    for place in DIRECTORIES:
        for path in sorted((ROOT / place).rglob("*.py")):
            if calls := waits(path.read_text(encoding="utf-8")):
                found[str(path.relative_to(ROOT))] = set(calls)
    assert found == {file: set(calls) for file, calls in REASONS.items()}


@pytest.mark.parametrize(
    ("source", "found"),
    {
        "thread.join()": ["thread.join"],
        "thread.join(timeout=1)": [],
        "thread.join(1.0)": [],
        "', '.join(names)": [],
        "queue.get()": ["queue.get"],
        "queue.get(block=True)": ["queue.get"],
        "queue.get(block=False)": [],
        "queue.get(timeout=1)": [],
        "values.get('a')": [],
        "pipe.recv()": ["pipe.recv"],
        "pipe.recv(4096)": ["pipe.recv"],
        "pipe.send(value)": ["pipe.send"],
        "lock.acquire()": ["lock.acquire"],
        "lock.acquire(blocking=True)": ["lock.acquire"],
        "lock.acquire(blocking=False)": [],
        "lock.acquire(timeout=3)": [],
        "event.wait()": ["event.wait"],
        "event.wait(0.5)": [],
        "connection.wait(pipes)": ["connection.wait"],
        "multiprocessing.connection.wait(pipes, 1.0)": [],
        "select.select(a, b, c)": ["select.select"],
        "select.select(a, b, c, 1.0)": [],
        "selector.select()": ["selector.select"],
        "selector.select(1.0)": [],
        "poll = select.poll()": [],
        "poll.poll()": ["poll.poll"],
        "poll.poll(1000)": [],
        "future.result()": ["future.result"],
        "future.result(timeout=3)": [],
        "case.result(times, rate)": [],
        "process.communicate(b'x')": ["process.communicate"],
        "process.communicate(timeout=3)": [],
        "listener.accept()": ["listener.accept"],
        "fcntl.flock(file, fcntl.LOCK_EX)": ["fcntl.flock"],
        "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)": [],
        "subprocess.run(command, check=True)": ["subprocess.run"],
        "subprocess.check_output(command)": ["subprocess.check_output"],
        "subprocess.run(command, timeout=9)": [],
        "os.waitpid(pid, 0)": ["os.waitpid"],
        "os.waitpid(pid, os.WNOHANG)": [],
        "os.wait()": ["os.wait"],
        "with ThreadPoolExecutor(2) as pool: pass": ["with ThreadPoolExecutor"],
        "with futures.ProcessPoolExecutor() as pool: pass": ["with futures.ProcessPoolExecutor"],
        "pool.shutdown()": ["pool.shutdown"],
        "pool.shutdown(wait=False)": [],
        "while not done(): time.sleep(1)": ["time.sleep"],
        "while not done() and time.monotonic() < limit: time.sleep(1)": [],
        "multihost_utils.sync_global_devices('a')": ["multihost_utils.sync_global_devices"],
        "multihost_utils.process_allgather(x)": ["multihost_utils.process_allgather"],
        "manager.wait_until_finished()": ["manager.wait_until_finished"],
        "client.blocking_key_value_get('a')": ["client.blocking_key_value_get"],
        "client.blocking_key_value_get('a', 1000)": [],
    }.items(),
)
def test_blocking_calls_are_detected(source, found):
    assert waits(source) == found

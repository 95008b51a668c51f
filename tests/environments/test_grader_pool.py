"""The pool of workers: rewards, failures, deadlines, and the life cycle of its processes."""

import logging
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from jaxrl_llm.environments.config import GraderConfig, RewardConfig
from jaxrl_llm.environments.grader import Sample
from jaxrl_llm.environments.grader_pool import Failure, GraderPool
from jaxrl_llm.errors import UserError

HERE = Path(__file__).parent
GOOD = ["0.5", "2"]


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(HERE)


def groups_of(*completions):
    """Groups of samples with these completions, one list per group."""
    return [[Sample("<prompt>", text, "", "eos") for text in group] for group in completions]


def pool_of(function, workers=2, deadline_s=30.0):
    return GraderPool(single(f"bad_graders:{function}", workers, deadline_s))


def single(grader, workers=2, deadline_s=10.0):
    """Config of one grader without options."""
    return RewardConfig((GraderConfig(grader),), workers, deadline_s)


EARLIER = set()
"""Child processes from before the test, such as the one that renders chat templates."""


@pytest.fixture(autouse=True)
def note_earlier_children():
    EARLIER.clear()
    EARLIER.update(children())


def children():
    """Pids of running child processes of this test: one watchdog per worker."""
    pids = [int(pid) for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()]
    return [pid for pid in pids if not is_gone(pid) and pid not in EARLIER]


def is_gone(pid):
    """True if there is no such process, or it is a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def run_python(*arguments):
    env = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, timeout=60)


def test_exact_match_of_two_groups():
    with GraderPool(RewardConfig()) as pool:
        graded = pool.grade(
            [
                [Sample("<3+4>", "7#", "7#", "eos"), Sample("<3+4>", "7", "7#", "length")],
                [Sample("<1+1>", "3#", "2#", "eos"), Sample("<1+1>", "2#", "2#", "eos")],
            ]
        )
    np.testing.assert_array_equal(graded.reward, [[1, 0], [0, 1]])
    np.testing.assert_array_equal(graded.failure, [Failure.NONE, Failure.NONE])
    assert (graded.reward.dtype, graded.failure.dtype) == (np.float32, np.int32)


def test_workers_that_nobody_waited_for_are_not_late():
    """A model may compile for minutes between the pool and its first group."""
    with pool_of("by_completion") as pool:
        for worker in pool._workers:
            worker.deadline = time.monotonic() - 1
        assert pool.grade(groups_of(GOOD)).reward.tolist() == [[0.5, 2]]


def test_real_numbers_of_every_type_are_rewards():
    with pool_of("by_completion", workers=1) as pool:
        graded = pool.grade(groups_of(["bool", "int", "np.bool"], ["np.int8", "np.float16", "fraction"]))
    np.testing.assert_array_equal(graded.reward, [[1, 3, 1], [-2, 0.5, 0.25]])


BAD = {
    "raise": Failure.RAISED,
    "unprintable": Failure.RAISED,
    "sys.exit": Failure.RAISED,
    "nan": Failure.NOT_FINITE,
    "inf": Failure.NOT_FINITE,
    "too large for f32": Failure.NOT_FINITE,
    "huge int": Failure.NOT_FINITE,
    "f16 inf": Failure.NOT_FINITE,
    "none": Failure.WRONG_TYPE,
    "str": Failure.WRONG_TYPE,
    "complex": Failure.WRONG_TYPE,
    "list": Failure.WRONG_TYPE,
    "array": Failure.WRONG_TYPE,
    "os._exit": Failure.DIED,
    "SIGKILL": Failure.DIED,
    "SIGSEGV": Failure.DIED,
}


def test_a_failure_costs_its_own_group_and_no_other():
    completions, want = [], []
    for bad, failure in BAD.items():
        completions += [GOOD, ["1", bad]]
        want += [Failure.NONE, failure]
    with pool_of("by_completion") as pool:
        for _ in range(2):
            graded = pool.grade(groups_of(*completions))
            np.testing.assert_array_equal(graded.failure, want)
            np.testing.assert_array_equal(graded.reward[0::2], [[0.5, 2]] * len(BAD))
            assert np.isnan(graded.reward[1::2]).all()


@pytest.mark.parametrize("hang", ["spin", "spin ignoring SIGTERM", "sleep"])
def test_a_hang_is_killed_at_the_deadline(hang):
    with pool_of("by_completion", deadline_s=1.0) as pool:
        pool.grade(groups_of(GOOD))
        start = time.monotonic()
        graded = pool.grade(groups_of(GOOD, ["1", hang], GOOD, GOOD))
        # The deadline is 1 s; the rest is for a loaded machine.
        assert 1.0 <= time.monotonic() - start < 5.0
        np.testing.assert_array_equal(graded.failure, [0, Failure.TIMED_OUT, 0, 0])
        np.testing.assert_array_equal(graded.reward[[0, 2, 3]], [[0.5, 2]] * 3)
        np.testing.assert_array_equal(pool.grade(groups_of(GOOD)).reward, [[0.5, 2]])


def test_the_deadline_does_not_include_the_start_of_a_worker(tmp_path, monkeypatch):
    (tmp_path / "slow_to_import.py").write_text("import time; time.sleep(1)\ndef f(sample): return 1")
    monkeypatch.syspath_prepend(tmp_path)
    with GraderPool(single("slow_to_import:f", workers=1, deadline_s=0.5)) as pool:
        np.testing.assert_array_equal(pool.grade(groups_of(GOOD)).reward, [[1, 1]])


def test_many_hangs_leave_no_processes():
    with pool_of("by_completion", deadline_s=0.05) as pool:
        graded = pool.grade(groups_of(*[["spin ignoring SIGTERM"]] * 12))
        np.testing.assert_array_equal(graded.failure, [Failure.TIMED_OUT] * 12)
        # The last two were replaced just now, and have not called exec yet.
        wait_until(lambda: len(children()) == 2)
    assert children() == []


def test_a_child_of_a_hanging_grader_dies_with_it(tmp_path, monkeypatch):
    file = tmp_path / "pid"
    monkeypatch.setenv("CHILD_PID_FILE", str(file))
    with pool_of("by_completion", workers=1, deadline_s=1.0) as pool:
        graded = pool.grade(groups_of(["sleep with a child"]))
    np.testing.assert_array_equal(graded.failure, [Failure.TIMED_OUT])
    wait_until(lambda: is_gone(file.read_text()))


def test_rewards_keep_the_order_of_the_groups():
    with pool_of("by_completion", workers=3) as pool:
        graded = pool.grade(groups_of(*[[str(2 * i), str(2 * i + 1)] for i in range(200)]))
    np.testing.assert_array_equal(graded.reward, np.arange(400).reshape(200, 2))
    np.testing.assert_array_equal(graded.failure, np.zeros(200))


def test_a_large_group_passes_through_the_pipe():
    text = "1" + "0" * 20 + " " * 5_000_000
    with pool_of("by_completion", workers=1) as pool:
        np.testing.assert_array_equal(pool.grade(groups_of([text, "1"])).reward, np.float32([[1e20, 1]]))


def test_a_worker_that_died_idle_is_replaced_and_no_group_fails():
    with pool_of("by_completion", workers=1) as pool:
        pool.grade(groups_of(GOOD))
        [watchdog] = children()
        [worker] = map(int, Path(f"/proc/{watchdog}/task/{watchdog}/children").read_text().split())
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: is_gone(watchdog))
        graded = pool.grade(groups_of(GOOD))
    np.testing.assert_array_equal(graded.failure, [0])
    np.testing.assert_array_equal(graded.reward, [[0.5, 2]])


def test_workers_import_little_and_handle_signals():
    with pool_of("surroundings", workers=1) as pool:
        np.testing.assert_array_equal(pool.grade(groups_of([""])).reward, [[1]])


def test_output_and_state_of_a_grader_stay_in_its_worker(capfd):
    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), os.getcwd(), dict(os.environ)
    for function in "prints_a_lot", "disturbs":
        with pool_of(function, workers=1) as pool:
            np.testing.assert_array_equal(pool.grade(groups_of([""])).reward, [[1]])
    assert (random.getstate(), np.random.get_state()[1].tolist(), os.getcwd(), dict(os.environ)) == before
    assert capfd.readouterr().out == ""


def test_the_first_five_failures_of_each_kind_are_logged(caplog):
    caplog.set_level(logging.WARNING, "jaxrl_llm.environments")
    with pool_of("by_completion", workers=1) as pool:
        pool.grade(groups_of(*[["raise"]] * 7, ["none"], ["os._exit"]))
    lines = [record.getMessage() for record in caplog.records]
    raised = [line for line in lines if "RAISED" in line]
    assert len(raised) == 5
    assert raised[0] == "grader by_completion: RAISED: 'ValueError: no number\\nin sight'; prompt '<prompt>'"
    assert raised[4].endswith("(further ones are counted, not logged)")
    assert [line.split(": ", 1)[1] for line in lines if "RAISED" not in line] == [
        "WRONG_TYPE: 'returned a NoneType, want a real number'; prompt '<prompt>'",
        "DIED: 'exit code 0'; prompt '<prompt>'",
    ]


def test_groups_may_differ_in_size():
    with pool_of("by_completion", workers=2) as pool:
        graded = pool.grade(groups_of(["1"], GOOD, [], ["3", "raise", "4"], ["5", "6", "7"]))
    nan = np.nan
    want = [[1, nan, nan], [0.5, 2, nan], [nan] * 3, [nan] * 3, [5, 6, 7]]
    np.testing.assert_array_equal(graded.reward, want)
    np.testing.assert_array_equal(graded.components, [want])
    assert graded.failure.tolist() == [0, 0, 0, Failure.RAISED, 0]
    assert [len(votes) for votes in graded.votes] == [1, 2, 0, 3, 3]


def test_wrong_use_raises():
    with pytest.raises(UserError, match="Perhaps"):
        GraderPool(single("exact_mtch"))
    pool = pool_of("by_completion", workers=1)
    assert pool.grade([]).reward.shape == (0, 0)
    pool.close()
    pool.close()
    with pytest.raises(ValueError, match="closed"):
        pool.grade(groups_of(GOOD))


def test_a_pool_that_is_closed_while_it_grades_leaves_no_process():
    pool = pool_of("by_completion", workers=2)
    pool.grade(groups_of(GOOD, GOOD))
    job = pool.submit(groups_of(["spin"], ["sleep"], ["1"]))
    wait_until(job.running)
    pool.close()
    assert isinstance(job.exception(timeout=10), ValueError)
    wait_until(lambda: children() == [])


def test_a_process_that_cannot_start_is_an_error_and_leaks_no_descriptors(monkeypatch):
    def no_more(*_, **__):
        raise OSError(11, "Resource temporarily unavailable")

    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(subprocess, "Popen", no_more)
    with pytest.raises(UserError, match=r"reward.workers: a worker could not start: .*temporarily unavailable"):
        pool_of("by_completion")
    assert os.listdir("/proc/self/fd") == before


def test_a_grader_that_workers_cannot_import_raises(tmp_path, monkeypatch):
    module = tmp_path / "short_lived.py"
    module.write_text("def f(sample): return 1")
    monkeypatch.syspath_prepend(tmp_path)
    __import__("short_lived")
    module.write_text("raise OSError('license server down')")
    with GraderPool(single("short_lived:f", workers=1)) as pool:
        with pytest.raises(UserError, match=r"could not start.*license server down"):
            pool.grade(groups_of(GOOD))
    assert children() == []


SCRIPT = """
from jaxrl_llm.environments.config import RewardConfig
from jaxrl_llm.environments.grader import Sample
from jaxrl_llm.environments.grader_pool import GraderPool
print("once")
with GraderPool(RewardConfig(workers=1)) as pool:
    print(pool.grade([[Sample("", "7#", "7#", "eos")]]).reward)
"""


@pytest.mark.parametrize("way", ["file", "-c"])
def test_scripts_need_no_main_guard(way, tmp_path):
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    done = run_python(*([str(file)] if way == "file" else ["-c", SCRIPT]))
    assert (done.stdout, done.stderr, done.returncode) == ("once\n[[1.]]\n", "", 0)


@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signals are Linux's")
def test_workers_die_with_a_parent_that_is_killed(tmp_path):
    file = tmp_path / "pid"
    code = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
from jaxrl_llm.environments.config import GraderConfig, RewardConfig
from jaxrl_llm.environments.grader import Sample
from jaxrl_llm.environments.grader_pool import GraderPool
GraderPool(RewardConfig((GraderConfig("bad_graders:write_pid"),), 1, 600.0)).grade([[Sample({str(file)!r}, "", "", "eos")]])
"""
    env = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    with subprocess.Popen([sys.executable, "-c", code], env=env) as parent:
        wait_until(lambda: file.exists() and file.read_text().endswith("\n"))
        worker = int(file.read_text())
        assert not is_gone(worker)
        parent.kill()
    try:
        wait_until(lambda: is_gone(worker))
    finally:
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)

"""benchmarks/peers without a peer: requests and answers between processes, turns, ratios, agreement, the table."""

import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks.peers import environments, serve
from benchmarks.peers.compare import agreement, best, entry, quietest, ratio, ratios, table
from benchmarks.peers.generate import entries_of
from benchmarks.peers.processes import Worker, WorkerError, disturbance, in_turns, quiet
from benchmarks.peers.work import parse
from jaxrl_llm.errors import UserError

QUESTION = {"prompts": [[3, 5], [2, 9]], "samples": 2, "new_tokens": 3, "top_p": 1.0, "greedy": False, "seed": 0}
COUNTED = [[6, 7, 8], [6, 7, 8], [10, 11, 12], [10, 11, 12]]


@pytest.fixture
def worker(monkeypatch):
    made = []

    def make(variant):
        settings = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])}
        made.append(Worker(Path(sys.executable), "fake_worker", 1, settings))
        made[-1].ask(load={"directory": "somewhere", "compute": "float32", "variant": variant})
        return made[-1]

    yield make
    for each in made:
        each.close()


def answer(seconds, others=0.0, tokens=((1, 2),), peak=100):
    return {"seconds": seconds, "others": others, "tokens": [list(row) for row in tokens], "peak_bytes": peak}


def test_output_of_a_library_is_not_an_answer(worker):
    asked = worker("prints")
    for _ in range(2):
        found = asked.ask(generate=QUESTION)
        assert found["tokens"] == COUNTED
        assert found["seconds"] > 0 and found["others"] >= 0
        # A running Python takes more than 4 MB, and this worker less than 1 GB.
        assert 4e6 < found["peak_bytes"] < 1e9


def test_a_worker_that_exits_reports_why_and_the_others_continue(worker):
    dies, plain = worker("dies"), worker("plain")
    calls = {n: (lambda turn, w=w: w.ask(generate=QUESTION)) for n, w in (("dies", dies), ("plain", plain))}
    answers, failed = in_turns(calls, rounds=2, deadline=0.0)
    assert list(failed) == ["dies"] and "out of everything" in failed["dies"]
    assert [a["tokens"] for a in answers["plain"]] == [COUNTED] * 4
    with pytest.raises(WorkerError, match="out of everything"):
        dies.ask(generate=QUESTION)


def test_turns_rotate():
    order = []

    def call(name):
        return lambda turn: order.append((turn, name)) or answer(1.0)

    answers, failed = in_turns({n: call(n) for n in "abc"}, rounds=2, deadline=0.0)
    assert not failed and {n: len(a) for n, a in answers.items()} == {"a": 4, "b": 4, "c": 4}
    assert order == [(turn, name) for turn, names in enumerate(("abc", "bca", "cab", "abc")) for name in names]


def test_rounds_continue_until_enough_are_quiet():
    others = [0.0, 0.0, 0.5, 0.05, 0.9, 0.1, 0.0]
    calls = {"a": lambda turn: answer(1.0, others[turn]), "b": lambda turn: answer(2.0)}
    answers, _ = in_turns(calls, rounds=2, deadline=time.monotonic() + 600)
    assert disturbance(answers) == [0.0, 0.0, 0.5, 0.05, 0.9, 0.1]
    assert quiet(answers) == [True, True, False, True, False, True]
    assert quietest(disturbance(answers), 2) == [3, 5]
    # The first two turns compile and warm up: they never count.
    assert quietest([0.0, 0.0, 0.5, 0.4, 0.3], 2) == [3, 4]


def test_nothing_answers():
    def call(turn):
        raise WorkerError("no")

    assert in_turns({"a": call}, rounds=2, deadline=0.0) == ({}, {"a": "no"})


def test_entry_excludes_the_first_two_calls():
    answers = [answer(9.0, peak=5), answer(8.0), answer(1.0), answer(7.0, 0.8, peak=300), answer(3.0), answer(2.0)]
    found = entry(answers, [2, 4, 5], tokens=12)
    assert found["first_call_s"] == 9.0 and found["second_call_s"] == 8.0
    assert found["seconds"] == [1.0, 3.0, 2.0] and found["all_seconds"] == [1.0, 7.0, 3.0, 2.0]
    assert found["median_s"] == 2.0 and found["tokens_per_s"] == 6.0 and found["peak_bytes"] == 300
    assert found["others"] == [0.0, 0.0, 0.0]


def numbers(*seconds):
    return entry([answer(9.0), answer(9.0), *map(answer, seconds)], list(range(2, 2 + len(seconds))), tokens=600)


def test_ratios_compare_calls_of_the_same_round():
    # Both are slow in round 2: the ratio of medians would be 3 / 2, those per round are 3, 3 and 1.
    assert ratio(numbers(1.0, 10.0, 2.0), numbers(3.0, 30.0, 2.0)) == 3.0
    entries = {
        "transformers/dynamic": numbers(4.0, 4.0, 4.0),
        "ours/default": numbers(1.0, 2.0, 2.0),
        "transformers/static": numbers(3.0, 3.0, 3.0),
        "tunix/plain": numbers(5.0, 6.0, 9.0),
    }
    assert best(entries, "transformers") == "transformers/static" and best(entries, "trl") is None
    assert ratios(entries) == {"transformers/static": 1.5, "tunix/plain": 4.5}
    assert ratios({"tunix/plain": numbers(1.0)}) == {}


def test_agreement_ends_at_the_first_difference():
    assert agreement([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 3, 4], [5, 9, 7, 8]]) == 5 / 8
    assert agreement([[1, 2]], [[1, 2]]) == 1.0
    assert agreement([[1, 2]], [[1]]) == 0.0


def test_table():
    entries = {"ours/default": numbers(1.0, 2.0, 3.0), "tunix/plain": numbers(4.0, 4.0, 4.0)}
    entries["tunix/plain"]["greedy_agreement"] = 0.995
    work = {"name": "M", "tokens": 600, "rounds": 3, "rounds_run": 7, "entries": entries}
    lines = table(work | {"failed": {"trl/generate": "Traceback\nMemoryError: all of it"}})
    assert lines[0] == "M, 600 new tokens per call, the quietest 3 of 7 rounds"
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[4:6]]
    assert cells[0] == ["ours/default", "300", "200 to 600", "1.00", "0%", "9.0", "0", ""]
    assert cells[1] == ["tunix/plain", "150", "150 to 150", "2.00", "0%", "9.0", "0", "99.5%"]
    assert lines[-1] == "trl/generate failed: MemoryError: all of it"


def test_work():
    groups, different = parse("M,64,float32"), parse("L,8,bfloat16", "different", 0.95)
    call = groups.call(seed=3)
    assert len(call["prompts"]) == 8 and call["samples"] == 8 and call["new_tokens"] == 128 and groups.tokens == 8192
    assert {len(p) for p in call["prompts"]} == {64} and max(max(p) for p in call["prompts"]) < 4096
    assert call["seed"] == 3 and groups.call(4)["prompts"] == call["prompts"]
    call = different.call(0, greedy=True)
    assert len(call["prompts"]) == 8 and call["samples"] == 1 and call["new_tokens"] == 16 and call["greedy"]
    for text in ("X,8,float32", "M,12,float32", "M,0,float32", "M,8,f32", "M,8"):
        with pytest.raises(UserError, match=r"--work: got .* want SIZE,ROWS,DTYPE"):
            parse(text)


def test_entries():
    assert entries_of("ours,transformers/static-passive,tunix") == [
        "ours/default", "transformers/static-passive", "tunix/plain", "tunix/logprobs",
    ]  # fmt: skip
    for text in ("vllm", "transformers/paged"):
        with pytest.raises(UserError, match=f"--peers: got {text}"):
            entries_of(text)


def test_environments(monkeypatch, tmp_path):
    monkeypatch.setattr(environments, "HERE", tmp_path)
    monkeypatch.delenv("JAXRL_TUNIX_PYTHON", raising=False)
    assert environments.python("ours") == Path(sys.executable)
    with pytest.raises(UserError, match=r"benchmarks\.peers\.environments tunix"):
        environments.python("tunix")
    (tmp_path / "tunix").mkdir()
    stamp = tmp_path / "tunix" / "packages.txt"
    stamp.write_text("\n".join(environments.packages("tunix")))
    assert environments.python("tunix") == tmp_path / "tunix" / "bin" / "python"
    # Built with other versions.
    stamp.write_text("google-tunix==0.0.1")
    with pytest.raises(UserError, match="tunix: got no environment"):
        environments.python("tunix")
    monkeypatch.setenv("JAXRL_TUNIX_PYTHON", sys.executable)
    assert environments.python("tunix") == Path(sys.executable)
    monkeypatch.setenv("JAXRL_TUNIX_PYTHON", str(tmp_path / "none"))
    with pytest.raises(UserError, match="JAXRL_TUNIX_PYTHON: got"):
        environments.python("tunix")


def test_others_is_the_cpu_time_of_other_processes(monkeypatch):
    """Two cores for 2 s, 3 of the 4 s busy, 1 of them ours; then less than our own time (/proc/stat is coarse); then no /proc."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for worked, want in (([100.0, 103.0], 0.5), ([100.0, 100.5], 0.0), ([None, None], 0.0)):
        readings = {
            (serve, "machine_seconds"): iter(worked),
            (time, "process_time"): iter([5.0, 6.0]),
            (time, "perf_counter"): iter([10.0, 12.0]),
        }
        with monkeypatch.context() as patch:
            for (module, name), values in readings.items():
                patch.setattr(module, name, values.__next__)
            with serve.Clock() as clock:
                pass
        assert (clock.seconds, clock.others) == (2.0, want)


def test_machine_seconds_grow():
    before = serve.machine_seconds()
    assert before is None or 0 < before <= serve.machine_seconds()

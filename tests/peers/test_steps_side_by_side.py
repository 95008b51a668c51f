"""benchmarks/peers/grpo without a peer: the paced loop, works, entries, the table, the file of results."""

import json
import os
from pathlib import Path

import pytest

from benchmarks.peers import grpo, weights, words
from benchmarks.peers.grpo import default_trainers, entry_of, keep, parse, step, table, trainers_of
from benchmarks.peers.paced import Paced
from benchmarks.peers.processes import Worker, WorkerError
from benchmarks.peers.reward import rewards
from jaxrl_llm.errors import UserError


def test_a_paced_loop_runs_one_step_at_a_time():
    done = []

    def loop(pause):
        for i in range(3):
            done.append(i)
            pause()

    paced = Paced(loop)
    assert done == []
    for n in (1, 2, 3):
        paced.step()
        assert done == list(range(n))
    with pytest.raises(RuntimeError, match="the training loop ended"):
        paced.step()


def test_an_exception_of_the_loop_is_raised_by_the_step():
    def loop(pause):
        pause()
        raise ValueError("no memory")

    paced = Paced(loop)
    paced.step()
    with pytest.raises(ValueError, match="no memory"):
        paced.step()


def test_works_and_trainers():
    assert parse("M,bfloat16").name == "M bfloat16" and parse("S,float32,0.04").name == "S float32, beta 0.04"
    assert default_trainers(parse("S,float32")) == ["ours/shared", "trl/plain", "tunix/plain"]
    assert default_trainers(parse("S,bfloat16")) == ["ours/shared", "trl/plain", "trl/cast", "tunix/plain"]
    for text in ("S", "L,float32", "S,f32", "S,float32,x", "S,float32,-1", "S,float32,0,0"):
        with pytest.raises(UserError, match=r"--work: got .* want SIZE,DTYPE"):
            parse(text)
    assert trainers_of("ours/apart,trl") == ["ours/apart", "trl/plain", "trl/checkpointing", "trl/cast"]
    for text in ("vllm", "tunix/cast"):
        with pytest.raises(UserError, match=f"--peers: got {text}"):
            trainers_of(text)


def test_rewards():
    assert rewards(completions=["w7 w17 w3", "w1"], prompts=[]) == [2 / 128, 0.0]


class Answers:
    def __init__(self, answer):
        self.answer = answer

    def ask(self, **question):
        assert question == {"step": {}}
        return self.answer


def answer(seconds, rollout=1.0, tokens=8192, updates=1, peak=2**20):
    return {
        "seconds": seconds, "rollout_s": rollout, "tokens": tokens, "updates": updates, "others": 0.05, "peak_bytes": peak,
    }  # fmt: skip


def test_a_step_with_missing_work_is_an_error():
    assert step(Answers(answer(2.0)), "a", 0)["seconds"] == 2.0
    for wrong, turn in ((answer(2.0, tokens=8191), 0), (answer(2.0, updates=1), 1)):
        with pytest.raises(WorkerError, match="want 8192"):
            step(Answers(wrong), "a", turn)


def result():
    slow = [answer(9.0), answer(8.0), answer(4.0, 3.0), answer(6.0, 2.0), answer(5.0, 1.0, peak=2**22)]
    fast = [answer(7.0), answer(6.0), answer(2.0), answer(2.0), answer(2.0)]
    entries = {"ours/shared": entry_of(fast, [2, 3, 4], 1.5), "trl/plain": entry_of(slow, [2, 3, 4], 4.5)}
    return {
        "name": "S float32", "tokens": 8192, "rounds": 3, "rounds_run": 3, "entries": entries,
        "failed": {"tunix/plain": "Traceback\nMemoryError: all of it"},
    }  # fmt: skip


def test_table():
    lines = table(result())
    assert lines[0] == "S float32, 8,192 new tokens per step, the quietest 3 of 3 rounds"
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[4:6]]
    assert cells[0] == ["ours/shared", "2.00", "2.00 to 2.00", "1.00", "1.00", "5%", "7.0", "8.5", "1"]
    assert cells[1] == ["trl/plain", "5.00", "4.00 to 6.00", "2.00", "2.50", "5%", "9.0", "13.5", "4"]
    assert lines[-1] == "tunix/plain failed: MemoryError: all of it"


def test_results_of_other_works_are_kept(tmp_path):
    out = tmp_path / "new" / "grpo.json"
    for name, rounds in (("S", 1), ("M", 1), ("S", 2)):
        keep(out, {"name": name, "rounds": rounds}, {"date": "today"})
    found = json.loads(out.read_text())["results"]
    assert [(each["name"], each["rounds"], each["date"]) for each in found] == [("M", 1, "today"), ("S", 2, "today")]


def test_trainers_in_turns(monkeypatch, tmp_path):
    """Two workers, one of which exits: the other's steps count, in the order of their turns."""

    def fake(python, module, threads, settings):
        assert module == "benchmarks.peers.workers.ours_step"
        path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
        return Worker(python, "fake_trainer", threads, {"PYTHONPATH": path})

    monkeypatch.setattr(grpo, "Worker", fake)
    monkeypatch.setattr(weights, "directory", lambda size: tmp_path / size)
    monkeypatch.setattr(words, "directory", lambda size: tmp_path / "words")
    found = grpo.measure(parse("S,float32,0.04"), ["ours/shared", "ours/apart"], rounds=2, seconds=0.0, threads=1)
    assert list(found["failed"]) == ["ours/apart"] and "out of everything" in found["failed"]["ours/apart"]
    assert found["rounds"] == found["rounds_run"] == 2 and found["work"]["beta"] == 0.04
    [(name, ours)] = found["entries"].items()
    assert name == "ours/shared" and ours["beta"] == 0.04 and ours["words"] == str(tmp_path / "words")
    assert ours["median_rollout_s"] == 0.25 and ours["stages"] == [{"time/update": 0.5}] * 2
    assert 0 < ours["start_s"] < ours["first_step_after_start_s"]
    assert table(found)[0] == "S float32, beta 0.04, 8,192 new tokens per step, the quietest 2 of 2 rounds"

"""Settings of a replay that cannot work, or do nothing."""

import pytest

from jaxrl_llm.config.consistency import cautions, training_problems
from jaxrl_llm.config.loading import validate


def of(replay, samples=4, **objective):
    values = {"reward": "exact_match", "rollout": {"samples": samples}, "objective": objective}
    return validate(values | {"experience": {"replay": {"capacity": 8} | replay}}, "x")


@pytest.mark.parametrize(
    "replay, samples, message",
    [
        ({"groups": 9}, 4, "replay.groups: got 9, want 8 at most, all that the buffer holds (experience.replay.capacity)"),
        ({"join": {"least": 17}}, 4, "replay.join.least: got 17, want 16 at most, experience.replay.join.window"),
        ({"join": {"swap": True}}, 1, "replay.join.swap: got true with rollout.samples 1, want 2 or more: a fresh response stays"),
        ({"store_fresh": False}, 4, "replay.store_fresh: got false, want true, or a file in start: nothing is stored"),
        ({"max_uses": 1}, 4, "replay.max_uses: got 1, want 2 or more, or 0 for any number: the step that sampled it counts, "
         "so that no group comes back"),
    ],
)  # fmt: skip
def test_what_can_never_come_back_is_refused(replay, samples, message):
    assert f"experience.{message}" in training_problems(of(replay, samples))


def test_a_file_may_be_all_that_is_stored_and_used_once():
    assert training_problems(of({"start": "x.jsonl", "store_fresh": False, "max_uses": 1, "groups": 8})) == []


def test_what_is_stored_and_hardly_used_is_told():
    [leaves] = cautions(of({"start": "x.jsonl", "store_fresh": False}))
    assert leaves == "experience.replay.max_age: the responses of x.jsonl leave after 8 updates; 0 keeps them"
    assert (
        cautions(of({"start": "x.jsonl", "store_fresh": False, "max_age": 0}))
        == cautions(of({"start": "x.jsonl"}))
        == []
    )
    [baseline] = cautions(of({"join": {"right": True}}, reused_rows="split"))
    assert baseline.startswith("objective.reused_rows: split with experience.replay.join.right: ")
    assert cautions(of({"join": {"right": True}})) == cautions(of({"join": {}}, reused_rows="split")) == []
    for by, num in (("visit", 1), ("row", 0)):
        examples = {"number": 1, "by": by}
        task = {"kind": "file", "path": "x", "held_out": 1, "prompting": {"examples": examples}}
        values = {"task": task, "reward": "exact_match", "experience": {"replay": {"capacity": 8, "join": {}}}}
        assert len(found := cautions(validate(values, "x"))) == num
        assert all(line.startswith("task.prompting.examples.by: visit with experience.replay.join: ") for line in found)
    # Without a buffer it is the other settings that nothing reads.
    assert all(
        "nothing reads this" in line
        for line in cautions(of({"capacity": 0, "join": {"right": True}}, reused_rows="split"))
    )

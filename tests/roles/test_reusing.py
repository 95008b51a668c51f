"""Reuse in a run: which visit repeats which noise, what its requests begin with, and what a checkpoint holds of it."""

import numpy as np
import pytest
from fakes import groups_of, state_of, sums

from jaxrl_llm.experience.packed_groups import Packing
from jaxrl_llm.roles.collector import Asked, Collected
from jaxrl_llm.roles.reusing import NEVER, NoReusing, Reusing
from jaxrl_llm.roles.sampler import SourceState
from jaxrl_llm.roles.state import joined, split
from jaxrl_llm.rollout.config import ExactReuse, InexactReuse
from jaxrl_llm.rollout.session import Stats
from jaxrl_llm.tasks.stream import make_prompts
from jaxrl_llm.types import Finish, Groups, Prompts, check

TASK, SLOTS = sums(), 5


def reusing(rule) -> Reusing:
    return Reusing(rule, TASK, Packing(groups_of(np.zeros((1, 1))), TASK.pad), SLOTS)


def prompts_of(rows, first_uid: int) -> Prompts:
    return make_prompts(TASK, TASK.train, np.array(rows), first_uid + np.arange(len(rows)))


def visited(step, prompts: Prompts, samples: int = 2, number: int = 0) -> tuple[Asked, Groups]:
    """The requests of a visit, and their groups: each response is two tokens, `number` and the uid."""
    num = len(prompts.length)
    asked = step.add(Asked(prompts, np.arange(num), np.full(num, samples), np.zeros(num, int)))
    groups = groups_of(np.zeros((num, samples)))
    tokens = groups.rollouts.tokens.copy()
    tokens[:, 0], tokens[:, 1] = number, np.repeat(prompts.uid, samples)
    return asked, groups.replace(rollouts=groups.rollouts.replace(prompts=prompts, tokens=tokens))


def run(rule, visits) -> list[tuple[list[int], list[int] | None]]:
    """Visit these rows, one list per step. Returns the uids and the first tokens that the requests begin with."""
    stage, found = reusing(rule), []
    state = stage.init(len(TASK.train))
    for number, rows in enumerate(visits):
        step = stage.start(state)
        prompts = step.visit(prompts_of(rows, 10 * number))
        asked, groups = visited(step, prompts, number=number + 1)
        state = step.finish(groups)
        known = None if asked.known is None else check(asked.known).tokens[:, 0].tolist()
        found.append((prompts.uid.tolist(), known))
    return found


def test_a_visit_repeats_the_noise_of_the_last_one_and_begins_with_its_responses():
    assert run(ExactReuse(), [[3, 4], [4, 5], [3, 4]]) == [
        ([0, 1], None),
        ([1, 11], [1, 1, 0, 0]),
        ([0, 1], [1, 1, 2, 2]),
    ]


def test_the_inexact_form_has_new_noise_at_every_visit():
    assert run(InexactReuse(), [[3], [3], [3]]) == [([0], None), ([10], [1, 1]), ([20], [2, 2])]


def test_noise_is_repeated_for_as_many_visits_as_configured():
    assert run(ExactReuse(max_repeats=2), [[3]] * 5) == [
        ([0], None), ([0], [1, 1]), ([0], [2, 2]), ([30], None), ([30], [4, 4]),
    ]  # fmt: skip


@pytest.mark.parametrize("rule", [ExactReuse(), InexactReuse()])
def test_a_second_visit_in_the_same_step_samples_afresh(rule):
    """Else its responses would be the same ones again."""
    _, (uid, known), _ = run(rule, [[3], [3, 3], [4]])
    assert len(set(uid)) == 2 and uid[1] == 11 and known == [1, 1, 0, 0]


def test_what_requests_begin_with_goes_by_sample_number():
    stage = reusing(ExactReuse())
    step = stage.start(stage.init(len(TASK.train)))
    prompts = step.visit(prompts_of([3, 4], 0))
    _, groups = visited(step, prompts, samples=3)
    rollouts = groups.rollouts
    tokens, length = rollouts.tokens.copy(), np.array([1, 2, 1, 2, 2, 0], np.int32)
    tokens[:, 0] = 1 + np.arange(6)
    finish = np.array([0, 1, 2, 3, 2, 3], np.int32)
    groups = groups.replace(rollouts=rollouts.replace(tokens=tokens, length=length, finish=finish))
    step = stage.start(step.finish(groups))
    again = step.visit(prompts_of([5, 4, 3], 10))
    assert again.uid.tolist() == [10, 1, 0]
    # Two of row 5, samples 1 to 4 of row 4, of which 0 to 2 are known, one of row 3.
    known = step.add(Asked(again, np.arange(3), np.array([2, 4, 1]), np.array([0, 1, 0]))).known
    assert check(known).prompts is again and known.tokens.shape == (7, SLOTS)
    assert known.prompt.tolist() == [0, 0, 1, 1, 1, 1, 2] and known.sample.tolist() == [0, 1, 1, 2, 3, 4, 0]
    assert known.length.tolist() == [0, 0, 2, 0, 0, 0, 1]
    assert known.tokens[:, 0].tolist() == [0, 0, 5, 0, 0, 0, 1]
    new = Finish.UNFINISHED
    assert known.finish.tolist() == [new, new, 2, new, new, new, 0]


def test_kept_tokens_are_as_wide_as_the_runs():
    """A stored group is as wide as the most tokens that one of its own kept."""
    groups = groups_of(np.zeros((1, 2)))
    kept = np.full((2, 2, 3), -1, np.int32)
    kept[:, 0, :2] = [[7, 8], [9, 1]]
    groups = groups.replace(rollouts=groups.rollouts.replace(prompts=prompts_of([3], 0), kept_tokens=kept))
    stage = Reusing(InexactReuse(), TASK, Packing(groups, TASK.pad), SLOTS, 3)
    step = stage.start(stage.init(len(TASK.train)))
    step.visit(prompts_of([3], 0))
    step = stage.start(step.finish(groups))
    known = step.add(Asked(step.visit(prompts_of([3], 1)), np.arange(1), np.array([2]), np.array([0]))).known
    assert check(known).kept_tokens.shape == (2, SLOTS, 3)
    assert known.kept_tokens[:, 0].tolist() == [[7, 8, -1], [9, 1, -1]]


def test_metrics_by_hand():
    stage = reusing(ExactReuse())
    step = stage.start(stage.init(len(TASK.train)))
    _, groups = visited(step, step.visit(prompts_of([3, 4], 0)))
    step = stage.start(step.finish(groups))
    prompts = step.visit(prompts_of([3, 5], 10))
    _, groups = visited(step, prompts)
    kept = np.array([2, 1, 0, 0])
    assert step.describe(Collected(groups, Stats(tokens=5), 0.0, kept)) == {
        "reuse/prompts": 0.5, "reuse/tokens": 3 / 8, "reuse/whole": 0.25, "reuse/decoded": 5,
    }  # fmt: skip
    none = NoReusing()
    assert none.start(none.init(5)).describe(Collected(groups, Stats(), 0.0)) == {}


def test_a_checkpoint_writes_each_visit_once_and_gets_it_back():
    stage = reusing(ExactReuse())
    step = stage.start(stage.init(len(TASK.train)))
    _, groups = visited(step, step.visit(prompts_of([3, 4], 0)))
    state = step.finish(groups)
    source = SourceState(None, None, None, np.zeros(1), np.array(0), reuse=state)
    tree, blobs = split(state_of(source=source))
    assert tree.source.reuse.packed == {} and blobs.keys() == {"visit/3", "visit/4"}
    assert all(blobs[f"visit/{row}"] is state.packed[row] for row in ("3", "4"))
    assert joined(tree, blobs).source.reuse is not state
    again = joined(tree, blobs).source.reuse
    assert again.packed.keys() == state.packed.keys() and again.uid is state.uid
    assert (again.uid >= 0).sum() == 2 and (again.uid == NEVER).sum() == len(TASK.train) - 2
    # A later visit of one row leaves the other's bytes as they are.
    step = stage.start(again)
    _, groups = visited(step, step.visit(prompts_of([3], 10)), number=5)
    later = step.finish(groups)
    assert later.packed["4"] is state.packed["4"] and later.packed["3"] is not state.packed["3"]

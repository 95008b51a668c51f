"""What a step asks for, whatever the order in which requests finish: prompts until enough are accepted, budgets in whole rounds."""

import numpy as np
import pytest
from fakes import groups_of
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.errors import UserError
from jaxrl_llm.experience.filters import stateless_filter
from jaxrl_llm.roles.asking import ByBudget, UntilAccepted
from jaxrl_llm.roles.collector import Asked
from jaxrl_llm.roles.grading import merge_requests
from jaxrl_llm.types import Groups, Prompts, check, join_groups, select_groups

G, P = 4, 3
any_order = settings(max_examples=60, deadline=None, derandomize=True, database=None)


class Stream:
    """Prompts whose uid and row count up."""

    def __init__(self):
        self.calls = []

    def __call__(self, n: int) -> Prompts:
        number = sum(self.calls) + np.arange(n, dtype=np.int32)
        self.calls.append(n)
        return Prompts(np.tile(np.int32([9, 0, 0]), (n, 1)), np.ones(n, np.int32), number, number)


def answered(asked: Asked, reward) -> list[Groups]:
    """A graded group per request. `reward(row, sample)`: a number, NaN where the group cannot be graded."""
    found = []
    for i, size in enumerate(asked.samples.tolist()):
        number = asked.prompts.row[i]
        made = groups_of(np.array([[reward(number, asked.first_sample[i] + j) for j in range(size)]]))
        prompt = Prompts(*(getattr(asked.prompts, name)[i : i + 1] for name in ("tokens", "length", "uid", "row")))
        rollouts = made.rollouts
        rollouts = rollouts.replace(prompts=prompt, sample=rollouts.sample + np.int32(asked.first_sample[i]))
        found.append(made.replace(rollouts=rollouts))
    return found


def play(asking, state, reward, order: np.random.Generator, seen=None):
    """A step in which random requests finish together, in random order. Returns what was taken, the requests and the step."""
    step, draw = asking.start(state), Stream()
    asked, log = step.first(draw), []
    waiting, done = [], []
    while asked or waiting:
        if asked:
            log.append(asked)
            assert len(asked.group) == len(asked.samples) and (asked.samples > 0).all()
            waiting += list(zip(asked.group.tolist(), answered(asked, reward), strict=True))
        num = int(order.integers(1, len(waiting) + 1))
        now = sorted(order.choice(len(waiting), num, replace=False).tolist())
        finished, waiting = [waiting[i] for i in now], [x for i, x in enumerate(waiting) if i not in now]
        done += finished
        asked = step.more(join_groups(*(x for _, x in finished)), np.array([n for n, _ in finished]))
    done.sort(key=lambda numbered: (numbered[0], numbered[1].rollouts.sample[0]))
    whole = merge_requests(join_groups(*(x for _, x in done)), np.array([n for n, _ in done]))
    return step.finish(whole), log, step


def differing(groups: Groups) -> np.ndarray:
    by_prompt = [groups.reward[groups.rollouts.prompt == p] for p in range(len(groups.failure))]
    return np.array([np.ptp(x) > 0 for x in by_prompt])[groups.rollouts.prompt]


JUDGE = stateless_filter(differing)


def until(attempts=10) -> UntilAccepted:
    return UntilAccepted(JUDGE, P, G, attempts)


@any_order
@given(st.lists(st.booleans(), min_size=40, max_size=40), st.integers(0, 2**31))
def test_a_step_takes_the_first_accepted_prompts_in_whichever_order_they_finish(teaches, seed):
    """And asks for no prompt beyond the last of them."""
    teaches = np.array([*teaches, *[True] * P])
    taken, log, _ = play(until(20), (), lambda row, sample: sample if teaches[row] else 1, np.random.default_rng(seed))
    want = np.flatnonzero(teaches)[:P]
    fresh = check(taken.fresh)
    assert fresh.rollouts.prompts.row.tolist() == want.tolist() and fresh.keep.all() and len(fresh.keep) == P * G
    asked = np.concatenate([x.prompts.row for x in log])
    assert asked.tolist() == list(range(max(want[-1] + 1, P)))
    rejected = [] if taken.rejected is None else taken.rejected.rollouts.prompts.row.tolist()
    assert sorted([*want, *rejected]) == asked.tolist()
    assert taken.rejected is None or not taken.rejected.keep.any()
    assert taken.metrics == {
        "refill/prompts": len(asked), "refill/attempts": len(asked) / P, "refill/accepted": P / len(asked), "refill/missing": 0,
    }  # fmt: skip


def test_accepted_groups_are_kept_when_the_attempts_run_out():
    """One of nine teaches: it is trained on beside two rejected ones, of which nothing is kept (OpenRLHF #1310 lost it)."""
    taken, log, _ = play(until(3), (), lambda row, sample: sample if row == 7 else 0, np.random.default_rng(0))
    assert sum(len(asked.group) for asked in log) == 9
    assert taken.fresh.rollouts.prompts.row.tolist() == [0, 1, 7]
    assert taken.fresh.keep.tolist() == [False] * 2 * G + [True] * G
    assert taken.metrics["refill/missing"] == 2 and len(taken.rejected.failure) == 6


def test_what_cannot_be_graded_is_replaced_and_never_a_zero():
    """Its rewards are missing: as zeros beside a one they would be a group that teaches (TRL #7364)."""
    taken, _, _ = play(until(), (), lambda row, sample: np.nan if row == 1 else sample, np.random.default_rng(0))
    assert taken.fresh.rollouts.prompts.row.tolist() == [0, 2, 3]
    assert np.isnan(taken.rejected.reward).all()


class Doubling:
    """One sample each, then one more for each prompt that has no right answer yet; the state counts the rounds."""

    in_rounds = True

    def init(self, num_rows):
        return np.array(0)

    def allocate(self, state, row, seen, left):
        if seen is None:
            return state + 1, np.ones(len(row), int)
        assert seen.rollouts.prompts.row.tolist() == row.tolist()
        solved = np.array([seen.reward[seen.rollouts.prompt == p].max() for p in range(len(row))]) > 0
        samples = np.where(solved, 0, 1)
        samples[np.cumsum(samples) > left] = 0
        return state + 1, samples

    def observe(self, state, groups):
        return state + 100


@any_order
@given(st.lists(st.integers(0, 9), min_size=P, max_size=P), st.integers(0, 2**31))
def test_rounds_of_a_budget_see_whole_rounds_in_whichever_order_requests_finish(needs, seed):
    """Prompt p is right from its sample `needs[p]` on. Against a loop over rounds."""
    asking = ByBudget(Doubling(), P, P * G)
    state = asking.init(7)
    taken, log, step = play(asking, state, lambda row, sample: float(sample >= needs[row]), np.random.default_rng(seed))
    size, left = np.zeros(P, int), P * G
    rounds = 0
    while left:
        more = np.array([int(size[p] == 0 or size[p] - 1 < needs[p]) for p in range(P)])
        more[np.cumsum(more) > left] = 0
        rounds += 1
        if not more.any():
            break
        size, left = size + more, left - more.sum()
    fresh = check(taken.fresh)
    assert fresh.rollouts.size.tolist() == size.tolist() and len(fresh.keep) == P * G
    assert fresh.keep.sum() == size.sum() and fresh.rollouts.prompts.row.tolist() == [0, 1, 2]
    # Samples are numbered on: no noise is used twice.
    assert fresh.rollouts.sample[fresh.keep].tolist() == [i for n in size for i in range(n)]
    assert int(step.state) == rounds and len(log) <= rounds
    assert taken.metrics == {
        "budget/min_samples": min(size),
        "budget/max_samples": max(size),
        "budget/share_at_min": size.tolist().count(min(size)) / P,
    }
    assert int(asking.observe(step.state, fresh)) == rounds + 100


def test_a_group_of_several_requests_fails_as_a_whole():
    """Grading its second round failed: its first is no group to learn from, and none of it is a zero."""
    parts = groups_of(np.array([[1.0, 2.0], [np.nan, np.nan], [3.0, 4.0]]))
    whole = check(merge_requests(parts, np.array([0, 0, 1])))
    assert whole.failure.tolist() == [1, 0] and whole.failed_by.tolist() == [0, -1]
    assert np.isnan(whole.reward[:4]).all() and whole.reward[4:].tolist() == [3, 4]
    assert whole.keep.tolist() == [False] * 4 + [True] * 2 and whole.rollouts.size.tolist() == [4, 2]


def test_a_budget_without_samples_for_a_prompt_is_refused():
    class Stingy(Doubling):
        def allocate(self, state, row, seen, left):
            return state, np.array([2, 0, 1])

    with pytest.raises(
        UserError, match=r"experience\.budget: got 0 samples for a prompt in the first round, want 1 or more"
    ):
        ByBudget(Stingy(), P, P * G).start(0).first(Stream())


def test_selecting_from_what_was_taken_keeps_its_rows():
    taken, _, _ = play(until(), (), lambda row, sample: sample, np.random.default_rng(0))
    np.testing.assert_array_equal(select_groups(taken.fresh, np.array([1])).reward, np.arange(G, dtype=np.float32))

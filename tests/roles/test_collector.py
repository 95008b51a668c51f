"""The collector with a fake engine and a fake pool: groups go to the graders as they finish, and grades come to their rows."""

import dataclasses
import zlib
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from fakes import groups_of, sums

from jaxrl_llm.environments.grader_pool import Failure, Graded
from jaxrl_llm.roles.collector import Collected, Collector, GivenUp, ask, never
from jaxrl_llm.rollout.config import NoTree
from jaxrl_llm.rollout.session import Stats
from jaxrl_llm.tasks.stream import make_prompts
from jaxrl_llm.types import Finish, check

TASK, G, MOST = sums(), 2, 3
SAYS = ["12#", "3", "45#", "6", "7#", "8"]
"""A row each; what has no end ran to its length."""
STATS = Stats(seconds=1.5, tokens=13)


def rollouts_of(prompts):
    """Three prompts with two samples each, whose texts are SAYS."""
    groups = groups_of(np.zeros((len(prompts.length), G)))
    tokens = np.zeros((len(SAYS), 3), np.int32)
    spelled = [TASK.tokenizer.encode(text) for text in SAYS]
    for b, ids in enumerate(spelled):
        tokens[b, : len(ids)] = ids
    length = np.array([len(ids) for ids in spelled], np.int32)
    wide = np.zeros(tokens.shape, np.float32)
    return groups.rollouts.replace(
        prompts=prompts, tokens=tokens, length=length, sampled=np.arange(3) < length[:, None], behavior_logprobs=wide,
        entropy=wide, version=np.zeros(tokens.shape, np.int32),
        finish=np.array([Finish.EOS if text.endswith("#") else Finish.LENGTH for text in SAYS], np.int32),
    )  # fmt: skip


class Session:
    """Finishes groups in a given order, and logs each request for the next."""

    def __init__(self, order, log):
        self.order, self.log, self.stats = list(order), log, STATS

    @property
    def pending(self):
        return bool(self.order)

    def add(self, prompts, samples, controls, limit, known, first_sample):
        assert known is None
        assert samples.tolist() == [G] * 3 and not first_sample.any()
        self.log += [f"limits {limit.tolist()}"] if {*limit.tolist()} != {MOST} else []
        self.log.append(("add", prompts, controls))
        self.prompts = prompts
        return np.arange(len(prompts.length))

    def advance(self):
        self.log.append(f"decoded {self.order[0]}")
        return np.array(self.order.pop(0), int)

    def take(self, ids):
        assert ids.tolist() == list(range(len(self.prompts.length)))
        return rollouts_of(self.prompts)

    def rollouts(self, groups):
        whole = rollouts_of(self.prompts)
        rows = (np.array(groups)[:, None] * G + np.arange(G)).reshape(-1)
        cut = {name: x[rows] for name, x in vars(whole).items() if isinstance(x, np.ndarray)}
        cut["prompt"] = np.repeat(np.arange(len(groups), dtype=np.int32), G)
        return whole.replace(prompts=jax.tree.map(lambda x: x[groups], self.prompts), **cut)


class Pool:
    """Grades by length and by whether the end is there, weights 1 and 10; a group with a 6 in it fails at the second grader."""

    names = ("long", "ended")
    has_steps = False

    def __init__(self, log):
        self.log, self.samples = log, []

    def submit(self, groups):
        self.log.append(f"submitted {[sample.answer for group in groups for sample in group[:1]]}")
        self.samples += [sample for group in groups for sample in group]
        return SimpleNamespace(result=lambda: self._grade(groups))

    def _grade(self, groups):
        self.log.append("waited")
        lost = np.array([any(s.completion == "6" for s in group) for group in groups])
        parts = np.array(
            [
                [[len(s.completion) for s in group] for group in groups],
                [[s.finish == "eos" for s in group] for group in groups],
            ],
            np.float32,
        )
        parts[:, lost] = np.nan
        return Graded(
            reward=(parts[0] + 10 * parts[1]).astype(np.float32),
            components=parts,
            failure=np.where(lost, Failure.TIMED_OUT, Failure.NONE).astype(np.int32),
            failed_by=np.where(lost, 1, -1).astype(np.int32),
            votes=[
                ["" if fails else s.completion.strip("#") for s in group]
                for group, fails in zip(groups, lost, strict=True)
            ],
        )


class StepPool(Pool):
    """A step per character, worth its place in the response: 1, 2, ..."""

    has_steps = True

    def _grade(self, groups):
        graded = super()._grade(groups)
        return dataclasses.replace(
            graded,
            earned=[
                [{} if fails else {n + 1: n + 1.0 for n in range(len(s.completion))} for s in group]
                for group, fails in zip(groups, graded.failure, strict=True)
            ],
        )


def collect(order, give_up=never, index=(5, 0, 8), asks=lambda prompts: prompts, pool_of=Pool, rows=TASK.train):
    log = []
    prompts = make_prompts(TASK, TASK.train, np.array(index), np.arange(3))

    def session(*given):
        log.append(("session", *given))
        return Session(order, log)

    engine = SimpleNamespace(
        session=session,
        cfg=SimpleNamespace(samples=G, max_new_tokens=MOST, tree=NoTree()),
        controls="the same {}".format,
    )
    pool = pool_of(log)
    try:
        return Collector(engine, pool, TASK)("policy", asks(prompts), rows, "key", give_up), log, pool, prompts
    except GivenUp:
        return None, log, pool, prompts


def test_groups_are_submitted_as_they_finish_while_the_rest_decodes():
    _, log, _, prompts = collect([[2], [], [0, 1]])
    answers = [TASK.train[row].answer for row in (5, 0, 8)]
    assert log == [
        ("session", "policy", "key"), ("add", prompts, "the same 3"), "decoded [2]", f"submitted {answers[2:]}", "decoded []",
        "decoded [0, 1]", f"submitted {answers[:2]}", "waited", "waited",
    ]  # fmt: skip


def test_prompts_have_equal_sampling_parameters_and_requests_those_of_their_samples():
    """Evaluations hand over prompts; training hands over requests, which the session gives each sample its own temperature."""
    _, log, _, prompts = collect([[0, 1, 2]], asks=lambda prompts: ask(prompts, G))
    assert log[1] == ("add", prompts, None)


@pytest.mark.parametrize("asks", [lambda prompts: prompts, lambda prompts: ask(prompts, G)])
def test_a_row_with_a_limit_of_its_own_is_asked_for_with_it(asks):
    """In training and in evaluations; graders learn the row's task."""
    rows = [
        dataclasses.replace(row, task="easy", max_new_tokens=2 if i == 5 else None) for i, row in enumerate(TASK.train)
    ]
    _, log, pool, _ = collect([[0, 1, 2]], asks=asks, rows=rows)
    assert "limits [2, 3, 3]" in log and {sample.task for sample in pool.samples} == {"easy"}


def test_grades_come_to_the_rows_of_their_group_whatever_finished_first():
    """By hand: characters + 10 where the end is there. The second group could not be graded."""
    by_order = [collect(order)[0] for order in ([[0, 1, 2]], [[2], [0], [1]], [[1], [2, 0]])]
    for found in by_order:
        assert isinstance(found, Collected) and found.stats is STATS and found.waited >= 0
        groups = check(found.groups)
        nan = np.nan
        np.testing.assert_array_equal(groups.reward, np.float32([13, 1, nan, nan, 12, 1]))
        want = [[3, 1], [1, 0], [nan, nan], [nan, nan], [2, 1], [1, 0]]
        np.testing.assert_array_equal(groups.components, np.float32(want))
        assert groups.keep.tolist() == [True, True, False, False, True, True]
        assert groups.failure.tolist() == [Failure.NONE, Failure.TIMED_OUT, Failure.NONE]
        assert groups.failed_by.tolist() == [-1, 1, -1]
    for other in by_order[1:]:
        jax.tree.map(np.testing.assert_array_equal, by_order[0].groups, other.groups)


def test_graders_read_the_rows_answer_its_columns_and_the_whole_response():
    found, _, pool, _ = collect([[0, 1, 2]])
    rows = [TASK.train[row] for row in (5, 5, 0, 0, 8, 8)]
    for sample, row, text in zip(pool.samples, rows, SAYS, strict=True):
        assert (sample.prompt, sample.answer, sample.columns) == (row.prompt, row.answer, row.columns)
        assert (sample.completion, sample.num_tokens) == (text, len(text))
        assert sample.finish == ("eos" if text.endswith("#") else "length")
    np.testing.assert_array_equal(found.groups.rollouts.tokens, rollouts_of(found.groups.rollouts.prompts).tokens)


def test_votes_are_equal_for_equal_answers_and_0_where_there_is_none():
    groups = collect([[0, 1, 2]])[0].groups
    assert groups.vote.tolist() == [
        *(zlib.crc32(answer) >> 1 for answer in (b"12", b"3")), 0, 0, *(zlib.crc32(x) >> 1 for x in (b"7", b"8")),
    ]  # fmt: skip


def test_give_up_is_called_after_each_chunk_and_waits_for_no_grader():
    asked = iter([False, True])
    found, log, _, _ = collect([[0], [1], [2]], give_up=lambda: next(asked))
    assert found is None and [line for line in log if isinstance(line, str)][-2:] == [
        "decoded [1]",
        f"submitted ['{TASK.train[0].answer}']",
    ]
    assert "decoded [2]" not in log and "waited" not in log


@pytest.mark.parametrize("me", [0, 1])
def test_each_host_grades_its_share(me, monkeypatch):
    """Two hosts: one grades groups 0 and 2, the other group 1; `hosts.each_from` joins the grades."""
    joined = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: me)
    monkeypatch.setattr(
        "jaxrl_llm.parallel.hosts.each_from", lambda tree, owner: joined.append((tree, owner.tolist())) or tree
    )
    found, _, pool, _ = collect([[2, 1], [0]])
    mine = [[0, 2], [1]][me]
    assert {sample.answer for sample in pool.samples} == {TASK.train[(5, 0, 8)[group]].answer for group in mine}
    [(grades, owner)] = joined
    assert owner == [0, 1, 0]
    # What is not this host's is not graded here, and says nothing.
    others = [group for group in range(3) if group not in mine]
    assert np.isnan(grades.reward[others]).all() and not grades.vote[others].any()
    assert np.isnan(found.groups.reward.reshape(3, G)[others]).all()


@pytest.mark.parametrize("me", [0, 1, 2, 3])
def test_each_host_puts_the_steps_of_its_share_at_tokens(me, monkeypatch):
    """Four hosts, of which the last has no group: the arrays to join have one shape on all of them."""
    joined = []
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(jax, "process_index", lambda: me)
    monkeypatch.setattr("jaxrl_llm.parallel.hosts.each_from", lambda tree, owner: joined.append(tree) or tree)
    found = collect([[2, 1], [0]], pool_of=StepPool)[0].groups
    [grades], rollouts = joined, found.rollouts
    slots = rollouts.tokens.shape[1]
    assert grades.step_reward.shape == (3, G, slots) and grades.step_reward.dtype == np.float32
    of_rows = grades.step_reward.reshape(3 * G, slots)
    for b, p in enumerate(rollouts.prompt):
        want = np.full(slots, np.nan)
        if p == me and not found.failure[p]:
            want[: rollouts.length[b]] = np.arange(rollouts.length[b]) + 1
        np.testing.assert_array_equal(of_rows[b], want)
    np.testing.assert_array_equal(found.step_reward, of_rows)

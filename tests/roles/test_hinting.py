"""Hints in a run: the tokens that requests get, and that nothing which judges the policy sees what came of them."""

import dataclasses

import jax
import numpy as np
import pytest
from fakes import blueprint, groups_of, sums

from jaxrl_llm.experience.budgets import UniformBudget
from jaxrl_llm.experience.buffer import describe as describe_stored
from jaxrl_llm.experience.curricula import Curriculum, counted
from jaxrl_llm.experience.gates import AdmitAll, ExcludeSolved
from jaxrl_llm.experience.hints import CosineHints, LevelHints, OwnHints, StagedHints
from jaxrl_llm.experience.joining import JoinConfig, asking_groups
from jaxrl_llm.experience.replay import right_share, solved
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.credit import make_advantage
from jaxrl_llm.objective.group_estimators import Rloo
from jaxrl_llm.roles import build
from jaxrl_llm.roles import sampler as sampler_module
from jaxrl_llm.roles.asking import ByBudget
from jaxrl_llm.roles.collector import Asked, Collected
from jaxrl_llm.roles.hinting import NONE, RIGHT, WRONG, Hinting, NoHinting
from jaxrl_llm.roles.inputs import hint_problems
from jaxrl_llm.roles.sampler import Sampler, Stages
from jaxrl_llm.roles.stage_metrics import describe_hints, describe_stages
from jaxrl_llm.roles.summary import describe
from jaxrl_llm.rollout.session import Stats
from jaxrl_llm.tasks.stream import make_prompts
from jaxrl_llm.types import Experience, Prompts, Scores, check

TASK = sums()
EOS = TASK.eos[0]
# Rows whose sum has two digits, and one whose sum has one.
TWO = [i for i, row in enumerate(TASK.train) if len(row.response) == 2][:3]
ONE = next(i for i, row in enumerate(TASK.train) if len(row.response) == 1)
ALL = CosineHints(first=1.0, last=1.0, samples=0)


def with_responses(*texts: str):
    """The task with these responses to its first rows; their last token is the end token."""
    encode = TASK.tokenizer.encode
    rows = [
        dataclasses.replace(row, response=text, target=np.array([*encode(text), EOS], np.int32))
        for row, text in zip(TASK.train, texts, strict=False)
    ]
    return dataclasses.replace(TASK, train=tuple(rows))


def requests(rows, samples=2, task=TASK) -> Asked:
    n = len(rows)
    prompts = make_prompts(task, task.train, np.array(rows), np.arange(n))
    return Asked(prompts, np.arange(n), np.full(n, samples), np.zeros(n, int))


def hints(rule, rows, samples=2, task=TASK, most=8, state=(), step=3) -> list[str]:
    """Texts of the hints of a run whose RL begins at step 3 and has 11 steps."""
    asked = Hinting(rule, task, most, 3, 11).add(requests(rows, samples, task), state, step)
    assert len(asked.hints) == samples * len(rows)
    return [TASK.tokenizer.decode(ids) for ids in asked.hints]


def test_a_hint_is_the_beginning_of_the_rows_own_response():
    texts = [TASK.train[i].response for i in TWO]
    assert hints(CosineHints(first=0.5), TWO) == [x for text in texts for x in (text[0], "")]


def test_a_hint_is_never_the_whole_demonstration():
    """Two digits leave one, one digit all; the end token is no part of it."""
    assert hints(ALL, [TWO[0], ONE], samples=1) == [TASK.train[TWO[0]].response[0], ""]
    assert hints(ALL, [0], samples=1, task=with_responses("1 2 3 4")) == ["1 2 3 "]


def test_a_hint_leaves_a_token_of_the_rows_limit():
    task = with_responses("1 2 3 4", "1 2 3 4")
    assert hints(ALL, [0], samples=1, task=task, most=4) == ["1 2"]
    assert hints(ALL, [0], samples=1, task=task, most=1) == [""]
    of_its_task = dataclasses.replace(task.train[1], max_new_tokens=3)
    task = dataclasses.replace(task, train=(task.train[0], of_its_task))
    assert hints(ALL, [0, 1], samples=1, task=task, most=7) == ["1 2 3 ", "1 "]


def test_a_row_without_a_response_has_no_hint():
    row = dataclasses.replace(TASK.train[0], response=None, target=None)
    task = dataclasses.replace(TASK, train=(row, *TASK.train[1:]))
    assert hints(ALL, [0], task=task) == ["", ""]


def test_steps_count_from_the_beginning_of_rl():
    rule, task = CosineHints(first=1.0, last=0.0, samples=0), with_responses("0123456789")
    assert [hints(rule, [0], 1, task, 12, step=step) for step in (3, 8, 13)] == [["012345678"], ["01234"], [""]]


def test_levels_end_where_the_text_says():
    """The steps of "3 12 4 9" are "3 ", "12 ", "4 " and "9"."""
    task = with_responses("3 12 4 9")
    assert hints(LevelHints(step_end=" "), [0], 4, task) == ["", "3 ", "3 12 ", "3 12 4 "]
    # A step that ends with the demonstration is no hint: it would be the whole of it.
    assert hints(LevelHints(levels=2, step_end="9"), [0], 2, task) == ["", ""]
    assert hints(OwnHints(function="own_stages:last_step_end", step_end=" "), [0], 1, task) == ["3 12 4 "]


def test_ends_of_steps_that_no_response_has_are_refused():
    want = "experience.hints.step_end: got 'x', which is in no known response"
    assert [text[: len(want)] for text in hint_problems(LevelHints(step_end="x"), TASK)] == [want]
    assert hint_problems(LevelHints(step_end="1"), TASK) == hint_problems(LevelHints(), TASK) == []


def test_only_unsolved_prompts_have_hints_if_the_rule_says_so():
    """Responses without a hint decide: none at all, a wrong one, a right one; a right one with a hint does not."""
    rule = dataclasses.replace(ALL, only_unsolved=True)
    hinting = Hinting(rule, TASK, 8, 0, 11)
    state = hinting.init(len(TASK.train))
    assert hints(rule, TWO, 1, state=state) == ["", "", ""]
    groups = groups_of(np.array([[0.0, 0.0], [1.0, 0.0], [np.nan, np.nan]]))
    prompts = groups.rollouts.prompts.replace(row=np.array(TWO, np.int32))
    groups = groups.replace(rollouts=groups.rollouts.replace(prompts=prompts))
    after = hinting.observe(state, groups)
    assert after[TWO].tolist() == [WRONG, RIGHT, NONE] and not state.any() and after.dtype == np.int8
    assert np.count_nonzero(after) == 2
    assert hints(rule, TWO, 1, state=after) == [TASK.train[TWO[0]].response[0], "", ""]
    # Who was right once stays so.
    wrong = groups.replace(components=np.zeros_like(groups.components))
    assert hinting.observe(after, wrong)[TWO].tolist() == [WRONG, RIGHT, WRONG]


class Collect:
    """A collector whose responses begin as they are asked to; each response with a hint is right, all others are wrong."""

    def __init__(self):
        self.asked = []

    def __call__(self, policy, asked, rows, key, give_up, more):
        self.asked.append(asked)
        hint = np.array([len(ids) for ids in asked.hints or []], np.int32)
        right = (hint > 0).astype(float) if len(hint) else np.zeros(asked.samples.sum())
        groups = groups_of(right.reshape(len(asked.samples), -1))
        rollouts = groups.rollouts
        if asked.hints is not None:
            forced = np.arange(rollouts.sampled.shape[1]) < hint[:, None]
            groups = groups.replace(hint=hint)
            rollouts = rollouts.replace(sampled=rollouts.sampled & ~forced)
        return Collected(groups.replace(rollouts=rollouts.replace(prompts=asked.prompts)), Stats(), 0.0)


class Judges:
    """A curriculum, a gate and a budget in one, which note what they see."""

    def __init__(self):
        self.seen = []

    def observe(self, state, groups):
        self.seen.append(groups.measure("success").tolist())
        return state


def make(rule, judges, samples=2, gate=None):
    curriculum = Curriculum(lambda n: 0, lambda state, rng, n: (state, np.array(TWO[:n])), judges.observe)
    gate = gate or type("Gate", (AdmitAll,), {"observe": lambda self, *args: judges.observe(*args)})()
    budget = type("Budget", (UniformBudget,), {"observe": lambda self, *args: judges.observe(*args)})()
    hinting = NoHinting() if rule is None else Hinting(rule, TASK, 8, 0, 11)
    stages = Stages(counted(curriculum), gate, ByBudget(budget, 2, 2 * samples), hinting)
    return Sampler(TASK, stages, Collect(), jax.random.key(1), 3)


def test_who_judges_prompts_sees_no_response_that_began_with_a_hint():
    judges = Judges()
    sampler = make(CosineHints(first=0.5), judges)
    groups = sampler.take(0)
    assert groups.measure("success").tolist() == [1, 0, 1, 0]
    sampler.observe(groups)
    assert judges.seen == [[0, 0]] * 3


def test_a_gate_that_sees_hinted_responses_takes_hopeless_prompts_for_solved_ones(monkeypatch):
    """The mutant: what is observed has the rows with a hint. All responses without one are wrong."""

    def streaks():
        gate = ExcludeSolved(visits=5, solved=0.5)
        sampler = make(CosineHints(first=0.5), Judges(), gate=gate)
        sampler.observe(sampler.take(0))
        return sampler.state.gate.streak[:, TWO[:2]].tolist()

    solved_and_hopeless = [[0, 0], [1, 1]]
    assert streaks() == solved_and_hopeless
    monkeypatch.setattr(sampler_module, "independent_rows", lambda groups: groups)
    assert streaks() == [[1, 1], [0, 0]]


def test_without_a_rule_requests_are_as_they_were():
    judges = Judges()
    plain, none = make(None, judges), make(StagedHints(shares=(0.0,)), judges)
    one, other = plain.take(0), none.take(0)
    assert plain.collect.asked[0].hints is None and one.hint is None and plain.state.hints == ()
    assert other.hint.tolist() == [0, 0, 0, 0] and other.taught is None
    jax.tree.map(np.testing.assert_array_equal, one.rollouts, other.rollouts)
    # What is compiled before the first step: with hints, rows that continue from known tokens.
    assert plain.stages.asks_at_once == 2 and none.stages.asks_at_once is None


def test_an_evaluation_has_no_hints():
    """It asks for prompts alone, which a collector never gives hints (tests/roles/test_collector.py), in a run whose rule gives the
    same rows some."""
    run, asked = blueprint(experience={"hints": {"kind": "cosine", "samples": 0}}), []

    def collect(policy, prompts, rows, key):
        asked.append((prompts, rows))
        return Collected(groups_of(np.zeros((len(rows), 4))), Stats(), 0.0)

    task = dataclasses.replace(TASK, held_out=tuple(TASK.train[i] for i in TWO))
    build.make_evaluator(run, task, collect, None, jax.random.key(0)).answers("policy")
    [(prompts, rows)] = asked
    assert isinstance(prompts, Prompts) and rows is task.held_out
    hinting = build.hinting_for(run.cfg, dataclasses.replace(task, train=task.held_out))
    assert [len(ids) for ids in hinting.add(requests([0, 1, 2], 1, task), (), 0).hints] == [1, 1, 1]


def test_tokens_of_hints_are_not_counted_as_sampled():
    sampler = make(CosineHints(first=0.5), Judges())
    sampler.take(0)
    # Four rows of two tokens, two of which begin with a forced one.
    assert int(sampler.state.num_tokens) == 6


def hinted_groups(reward, hint):
    groups, hint = groups_of(np.array(reward)), np.array(hint, np.int32)
    forced = np.arange(groups.rollouts.sampled.shape[1]) < hint[:, None]
    return check(groups.replace(hint=hint, rollouts=groups.rollouts.replace(sampled=groups.rollouts.sampled & ~forced)))


MIXED = [[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]], [1, 0, 1, 0, 1, 1]
"""Right with a hint and wrong without; right with and without; both with."""


def test_logged_rewards_are_of_responses_without_a_hint():
    """The one of each of the first two groups: 0 and 1. That all differ or are equal is said of all, since all are learned from."""
    groups = hinted_groups(*MIXED)
    found = describe(groups, ["exact"])
    assert (found["reward"], found["rewards/exact/mean"], found["kept/success"]) == (0.5, 0.5, 0.5)
    assert found["frac_reward_zero_std"] == pytest.approx(2 / 3) and found["kept/rows"] == 6
    names = ("share", "tokens", "success", "success_without")
    assert [found[f"hints/{name}"] for name in names] == [pytest.approx(4 / 6), 1.0, 1.0, 0.5]
    assert not any(name.startswith("hints/") for name in describe(groups_of(np.array(MIXED[0])), ["exact"]))


def test_a_mean_over_no_response_is_absent():
    groups = hinted_groups([[1.0, 1.0]], [1, 1])
    assert describe_hints(groups) == {"hints/share": 1.0, "hints/tokens": 1.0, "hints/success": 1.0}
    found = describe(groups, ["exact"]) | describe_stages(groups)
    assert not {"reward", "rewards/exact/mean", "kept/success"} & found.keys() and found["kept/rows"] == 2
    assert describe_hints(hinted_groups([[0.0, 1.0]], [0, 0])) == {"hints/share": 0.0, "hints/success_without": 0.5}


def test_the_replay_judges_by_responses_without_a_hint():
    groups = hinted_groups(*MIXED)
    assert right_share(groups) == 0.5
    assert solved(groups).tolist() == [False, True, False]
    assert describe_stored(groups, 0).success.tolist() == [0, 1, 0]
    assert asking_groups(JoinConfig(when="all_wrong"), groups) == [0, 2]
    assert asking_groups(JoinConfig(), groups) == [0, 1, 2]


def test_tokens_of_hints_are_never_trained_on_unless_the_rule_says_so():
    """And then with the advantage of their row, beside the sampled ones."""
    objective = ObjectiveConfig(advantage=Rloo())
    groups = hinted_groups([[1.0, 0.0]], [1, 0])
    for rule, taught in ((CosineHints(), False), (CosineHints(train=True), True)):
        marked = Hinting(rule, TASK, 8, 0, 11).mark(groups)
        credit = make_advantage(objective)(marked, Scores())
        assert marked.trainable_tokens.tolist() == [[taught, True], [True, True]]
        np.testing.assert_array_equal(Experience(marked, Scores(), credit).loss_mask, marked.trainable_tokens)
        assert credit.advantage.tolist() == [[1.0 * taught, 1.0], [-1.0, -1.0]]
        # What the policy drew stays what it drew.
        np.testing.assert_array_equal(marked.rollouts.sampled, groups.rollouts.sampled)
    dropped = Hinting(CosineHints(train=True), TASK, 8, 0, 11).mark(groups.replace(keep=np.array([False, True])))
    assert dropped.trainable_tokens.tolist() == [[False, False], [True, True]]

"""The sampler, with a fake in the place of engine and graders: the rows it asks for, their numbers, and what it remembers."""

import jax
import numpy as np
import pytest
from fakes import groups_of, sums

from jaxrl_llm.errors import UserError
from jaxrl_llm.experience.budgets import UniformBudget
from jaxrl_llm.experience.curricula import Curriculum, counted, in_order
from jaxrl_llm.experience.gates import AdmitAll
from jaxrl_llm.roles.asking import ByBudget
from jaxrl_llm.roles.collector import Collected, GivenUp, never
from jaxrl_llm.roles.sampler import CURRICULUM, Sampler, Stages
from jaxrl_llm.rollout.session import Stats

TASK, KEY = sums(), jax.random.key(1)
ORDER = (4, 1, 7, 0, 2, 9)


class Collect:
    """A collector with fixed rewards, which gives up on request."""

    def __init__(self, reward=((1.0, 0.0), (np.nan, np.nan))):
        self.reward, self.asked, self.gives_up = np.array(reward), [], False

    def __call__(self, policy, asked, rows, key, give_up, more):
        prompts = asked.prompts
        self.asked.append((policy, prompts, rows, key, give_up))
        if self.gives_up or give_up():
            raise GivenUp
        groups = groups_of(self.reward)
        return Collected(groups.replace(rollouts=groups.rollouts.replace(prompts=prompts)), Stats(), 0.0)


def make(collect, curriculum=None, prompts=2, seed=3):
    stages = Stages(
        counted(curriculum or in_order(ORDER.__getitem__)), AdmitAll(), ByBudget(UniformBudget(), prompts, 2 * prompts)
    )
    return Sampler(TASK, stages, collect, KEY, seed)


def test_rows_come_in_the_curriculums_order_and_each_visit_has_a_number_of_its_own():
    collect = Collect()
    sampler = make(collect)
    sampler.use("policy")
    groups = [sampler.take(step) for step in range(3)]
    asked = [prompts for _, prompts, *_ in collect.asked]
    assert [p.row.tolist() for p in asked] == [[4, 1], [7, 0], [2, 9]]
    assert [p.uid.tolist() for p in asked] == [[0, 1], [2, 3], [4, 5]]
    for prompts in asked:
        for tokens, length, row in zip(prompts.tokens, prompts.length, prompts.row, strict=True):
            np.testing.assert_array_equal(tokens[:length], TASK.train[row].tokens)
    assert int(sampler.state.choice.visits) == 6 and int(sampler.state.choice.curriculum) == 6
    assert sampler.last.groups is groups[-1]


def test_the_policy_is_the_last_one_named_and_all_rows_and_the_key_go_along():
    collect = Collect()
    sampler = make(collect)
    for policy in ("first", "second", "third"):
        sampler.use(policy)
        if policy != "second":
            sampler.take(0)
    assert [policy for policy, *_ in collect.asked] == ["first", "third"]
    # Four rows of two tokens, twice.
    assert int(sampler.state.num_tokens) == 16
    for _, _, rows, key, give_up in collect.asked:
        assert rows is TASK.train and key is KEY and give_up is never


def test_given_up_leaves_the_state_as_it_was_and_the_same_prompts_come_again():
    collect = Collect()
    sampler = make(collect)
    sampler.take(0)
    before, last = sampler.state, sampler.last
    sampler.give_up = lambda: True
    with pytest.raises(GivenUp):
        sampler.take(1)
    assert sampler.state is before and sampler.last is last
    sampler.give_up = never
    sampler.take(1)
    refused, again = (prompts for _, prompts, *_ in collect.asked[1:])
    jax.tree.map(np.testing.assert_array_equal, refused, again)
    assert again.uid.tolist() == [2, 3]


def by_reward():
    """The state: rewards so far of each row. The next: the rows with the lowest."""

    def observe(state, groups):
        state = state.copy()
        state[groups.rollouts.prompts.row] = np.nanmean(groups.reward.reshape(len(groups.failure), -1), axis=1)
        return state

    return Curriculum(np.zeros, lambda state, rng, n: (state, np.argsort(state, kind="stable")[:n]), observe)


def test_a_curriculum_sees_the_groups_and_chooses_by_them():
    collect = Collect(((2.0, 4.0), (-1.0, -2.0)))
    sampler = make(collect, by_reward())
    sampler.observe(sampler.take(0))
    assert sampler.state.choice.curriculum[:3].tolist() == [3, -1.5, 0] and len(sampler.state.choice.curriculum) == len(
        TASK.train
    )
    sampler.take(1)
    # The row that was worst, then the first unseen one.
    assert [prompts.row.tolist() for _, prompts, *_ in collect.asked] == [[0, 1], [1, 2]]
    assert int(sampler.state.choice.visits) == 4


def test_observed_groups_are_all_of_the_step_the_dropped_ones_too():
    seen = []
    curriculum = in_order(ORDER.__getitem__)._replace(observe=lambda state, groups: seen.append(groups) or "seen")
    sampler = make(Collect(), curriculum)
    groups = sampler.take(0)
    filtered = groups.replace(keep=np.zeros(4, bool))
    sampler.observe(filtered)
    [observed] = seen
    assert (
        observed is filtered
        and observed.rollouts.prompts.row.tolist() == [4, 1]
        and np.isnan(observed.reward[2:]).all()
    )
    assert sampler.state.choice.curriculum == "seen" and int(sampler.state.choice.visits) == 2


def test_a_curriculums_generator_depends_on_seed_and_step_alone():
    numbers = []

    def choose(state, rng, n):
        numbers.append(rng.random())
        return state, np.arange(n)

    for seed, step in ((3, 0), (3, 1), (3, 0), (4, 0)):
        make(Collect(), Curriculum(lambda n: 0, choose, lambda state, groups: state), seed=seed).take(step)
    assert numbers[0] == numbers[2] and len(set(numbers)) == 3
    assert numbers[0] == np.random.default_rng((3, 0, CURRICULUM)).random()
    # The generator of filter and replay.
    assert numbers[0] != np.random.default_rng((3, 0)).random()


def test_what_a_curriculum_says_of_the_rows_that_were_sampled_is_logged_under_its_name():
    """By the state that chose them, with the choice behind it and what came of them not yet in it."""
    curriculum = in_order(ORDER.__getitem__)._replace(
        describe=lambda state, rows: {"place": float(state), "sum": float(rows.sum())}
    )
    sampler = make(Collect(), curriculum)
    found = []
    for step in range(2):
        sampler.take(step)
        found.append({name: x for name, x in sampler.metrics.items() if name.startswith("curriculum/")})
    assert found == [
        {"curriculum/place": 2, "curriculum/sum": 5},
        {"curriculum/place": 4, "curriculum/sum": 7},
    ]


@pytest.mark.parametrize(
    ("rows", "got"),
    [
        ([0, 1, 2], "[0, 1, 2]"),
        ([[0, 1]], "[[0, 1]]"),
        ([0, 97], "[0, 97]"),
        ([-1, 0], "[-1, 0]"),
        ([0.0, 1.0], "[0.0, 1.0]"),
        ([True, False], "[True, False]"),
        (5, "5"),
        ([], "[]"),
    ],
)
def test_nonsense_of_a_curriculum_is_refused_with_what_it_gave(rows, got):
    collect = Collect()
    sampler = make(collect, Curriculum(lambda n: 0, lambda state, rng, n: (state, rows), lambda state, groups: state))
    before = sampler.state
    with pytest.raises(UserError) as refused:
        sampler.take(0)
    assert str(refused.value) == f"curriculum: got rows {got}, want 2 indices of the task's 97 rows"
    assert sampler.state is before and not collect.asked

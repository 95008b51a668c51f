"""The sampler on the endless stream of a task's rows; with fakes: test_sampler_role.py."""

from types import SimpleNamespace

import jax
import numpy as np
from fakes import groups_of

from jaxrl_llm.experience.budgets import UniformBudget
from jaxrl_llm.experience.curricula import VisitCount, counted, in_order, make_order
from jaxrl_llm.experience.gates import AdmitAll
from jaxrl_llm.roles.asking import ByBudget
from jaxrl_llm.roles.sampler import Sampler, Stages
from jaxrl_llm.tasks.config import ArithmeticTask, CharacterTokenizer
from jaxrl_llm.tasks.task import load_task
from jaxrl_llm.tasks.tokenizer import load_tokenizer
from jaxrl_llm.types import check

ROWS = 20
TASK = load_task(ArithmeticTask(terms=2, held_out=100 - ROWS), load_tokenizer(CharacterTokenizer()), seed=0)
KEY = jax.random.key(5)


class Drawn(list):
    """A collector that records its calls and returns the prompts as groups."""

    def __call__(self, policy, asked, rows, key, give_up, more):
        assert more is None
        prompts = asked.prompts
        self.append((policy, prompts, rows, key))
        groups = groups_of(np.zeros((len(prompts.length), 2)))
        return SimpleNamespace(groups=groups.replace(rollouts=groups.rollouts.replace(prompts=prompts)))


def sampler(prompts: int) -> Sampler:
    stages = Stages(counted(in_order(make_order(ROWS, 1))), AdmitAll(), ByBudget(UniformBudget(), prompts, 2 * prompts))
    return Sampler(TASK, stages, Drawn(), KEY, seed=1)


def test_prompts_of_a_step_by_hand():
    order, source = make_order(ROWS, 1), sampler(8)
    # Over the end of the first epoch.
    source.state = source.state._replace(choice=VisitCount(np.array(16), np.array(16)))
    source.use("policy")
    prompts = check(source.take(3).rollouts.prompts)
    assert source.state.choice == (24, 24)
    # One row is in both epochs.
    assert source.state.visits.sum() == 8 and source.metrics["prompts/never_seen"] == (ROWS - 7) / ROWS
    np.testing.assert_array_equal(prompts.uid, np.arange(16, 24))
    np.testing.assert_array_equal(prompts.row, [order(i) for i in range(16, 24)])
    texts = TASK.decode(prompts.tokens, prompts.length)
    assert texts == [TASK.train[order(i)].prompt for i in range(16, 24)]
    assert prompts.tokens.shape == (8, TASK.prompt_slots)
    ((policy, asked, rows, key),) = source.collect
    assert policy == "policy" and rows is TASK.train and key is KEY
    jax.tree.map(np.testing.assert_array_equal, asked, prompts)
    assert source.last.groups.rollouts.prompts is prompts


def test_a_sampler_resumed_from_its_state_equals_an_uninterrupted_one():
    source, uninterrupted, states = sampler(6), [], []
    for step in range(7):
        states.append(source.state)
        taken = source.take(step)
        uninterrupted.append(taken.rollouts.prompts)
        source.observe(taken)
    other = sampler(6)
    other.state = states[4]
    assert other.state.choice.visits == 4 * 6
    again = other.take(4).rollouts.prompts
    for name in ("tokens", "length", "uid", "row"):
        np.testing.assert_array_equal(getattr(again, name), getattr(uninterrupted[4], name))
    assert other.state.choice.visits == 5 * 6
    uids = np.concatenate([p.uid for p in uninterrupted])
    assert len(set(uids)) == len(uids)

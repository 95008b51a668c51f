"""The sampler: which prompts it draws, what it remembers, and what it leaves as it was where it is given up."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxrl_llm.errors import UserError
from jaxrl_llm.experience.curriculum import Curriculum, in_order
from jaxrl_llm.prompts.config import ArithmeticTask, CharacterTokenizer
from jaxrl_llm.prompts.stream import make_order
from jaxrl_llm.prompts.task import load_task
from jaxrl_llm.prompts.tokenizer import load_tokenizer
from jaxrl_llm.roles.collect import GivenUp
from jaxrl_llm.roles.sampler import Sampler, SamplerState
from jaxrl_llm.types import check

ROWS = 20
TASK = load_task(ArithmeticTask(terms=2, held_out=100 - ROWS), load_tokenizer(CharacterTokenizer()), seed=0)
KEY = jax.random.key(5)


class Drawn(list):
    """In the place of a collector: remembers what it was asked for, and gives the prompts back as groups."""

    def __call__(self, policy, prompts, rows, key, give_up):
        if give_up():
            raise GivenUp
        self.append((policy, prompts, rows, key))
        return SimpleNamespace(groups=prompts)


def sampler(prompts: int, curriculum: Curriculum | None = None, seed: int = 1) -> Sampler:
    return Sampler(TASK, curriculum or in_order(make_order(ROWS, 1)), Drawn(), KEY, prompts, seed)


def test_prompts_of_a_step_by_hand():
    order, source = make_order(ROWS, 1), sampler(8)
    source.state = SamplerState(np.array(16), np.array(16))  # over the end of the first epoch
    source.use("policy")
    prompts = check(source.take(3))
    assert source.state == (24, 24)
    np.testing.assert_array_equal(prompts.uid, np.arange(16, 24))
    np.testing.assert_array_equal(prompts.row, [order(i) for i in range(16, 24)])
    texts = TASK.decode(prompts.tokens, prompts.length)
    assert texts == [TASK.train[order(i)].prompt for i in range(16, 24)]
    assert prompts.tokens.shape == (8, TASK.prompt_slots)
    ((policy, asked, rows, key),) = source.collect
    assert policy == "policy" and asked is prompts and rows is TASK.train and key is KEY
    assert source.last.groups is prompts


def test_going_on_from_the_state_equals_never_having_stopped():
    source, steady, states = sampler(6), [], []
    for step in range(7):
        states.append(source.state)
        steady.append(source.take(step))
        source.observe(steady[-1])
    other = sampler(6)
    other.state = states[4]
    assert other.state.visits == 4 * 6
    again = other.take(4)
    for name in ("tokens", "length", "uid", "row"):
        np.testing.assert_array_equal(getattr(again, name), getattr(steady[4], name))
    assert other.state.visits == 5 * 6
    uids = np.concatenate([p.uid for p in steady])
    assert len(set(uids)) == len(uids)


def test_given_up_it_is_as_it_was_and_takes_the_same_prompts_again():
    source = sampler(6)
    source.take(0)
    before, source.give_up = source.state, lambda: True
    with pytest.raises(GivenUp):
        source.take(1)
    assert source.state is before and len(source.collect) == 1
    source.give_up = lambda: False
    np.testing.assert_array_equal(source.take(1).uid, np.arange(6, 12))


def drawn_by_chance() -> Curriculum:
    """Counts what it is told of; any rows, by its noise."""

    def choose(state, rng, n):
        return state, rng.integers(0, ROWS, n)

    return Curriculum(lambda num_rows: np.array(num_rows), choose, lambda state, groups: state + len(groups.uid))


def test_the_noise_of_a_curriculum_is_a_function_of_seed_and_step():
    rows = [
        sampler(8, drawn_by_chance(), seed).take(step).row.tolist() for seed, step in [(1, 0), (1, 0), (1, 1), (2, 0)]
    ]
    assert rows[0] == rows[1] and rows[0] != rows[2] != rows[3] != rows[0]


def test_a_curriculum_starts_from_the_rows_and_hears_of_groups():
    source = sampler(8, drawn_by_chance())
    assert source.state == (0, ROWS)
    source.observe(source.take(0))
    assert source.state == (8, ROWS + 8)


@pytest.mark.parametrize("chosen", [[0, 1], [0, 1, ROWS], [0, 1, -1], [0.0, 1.0, 2.0], [[0, 1, 2]]])
def test_rows_that_there_are_not_are_refused(chosen):
    source = sampler(3, Curriculum(lambda num_rows: None, lambda state, rng, n: (state, np.array(chosen)), None))
    with pytest.raises(UserError, match=r"^curriculum: got rows .*, want 3 indices of the task's 20 rows$"):
        source.take(0)
    assert source.state == (0, None) and not source.collect

"""Noisy answers: as many as asked for, drawn anew at each visit, a function of seed and place."""

import numpy as np

from jaxrl_llm.prompts.config import ArithmeticTask
from jaxrl_llm.prompts.stream import make_order
from jaxrl_llm.prompts.supervised import noisy_rows
from jaxrl_llm.prompts.task import load_task

TASK = load_task(ArithmeticTask(), seed=0)
ORDER = make_order(len(TASK.train), 1)
EPOCH = len(TASK.train)


def test_without_noise_the_rows_are_the_tasks():
    assert noisy_rows(TASK, ORDER, range(50), 0.0, 0) == [TASK.train[ORDER(i)] for i in range(50)]


def test_prompts_stay_and_the_share_of_wrong_answers_is_as_asked():
    places = range(3000)
    rows, true = noisy_rows(TASK, ORDER, places, 0.5, 0), [TASK.train[ORDER(i)] for i in places]
    assert [row.prompt for row in rows] == [row.prompt for row in true]
    answers = np.array([row.answer for row in TASK.train])
    assert {row.answer for row in rows} <= set(answers)
    # A random row has the right answer by chance: sum over answers of their share squared, 0.058 for three digits.
    chance = np.mean([np.mean(answers == a) for a in answers])
    wrong = np.mean([a.answer != b.answer for a, b in zip(rows, true, strict=True)])
    # Four standard deviations of a share in 3000 draws.
    assert abs(wrong - 0.5 * (1 - chance)) < 4 * np.sqrt(0.25 / 3000)


def test_all_noise_replaces_every_answer():
    places = range(1000)
    rows, true = noisy_rows(TASK, ORDER, places, 1.0, 0), [TASK.train[ORDER(i)] for i in places]
    assert np.mean([a.answer == b.answer for a, b in zip(rows, true, strict=True)]) < 0.1


def test_each_visit_draws_anew():
    """Else a policy would learn the wrong answers by heart."""
    first = {row.prompt: row.answer for row in noisy_rows(TASK, ORDER, range(EPOCH), 1.0, 0)}
    second = {row.prompt: row.answer for row in noisy_rows(TASK, ORDER, range(EPOCH, 2 * EPOCH), 1.0, 0)}
    assert first.keys() == second.keys()
    assert np.mean([first[prompt] != second[prompt] for prompt in first]) > 0.8


def test_rows_are_a_function_of_seed_and_place():
    whole = noisy_rows(TASK, ORDER, range(40), 0.5, 3)
    assert noisy_rows(TASK, ORDER, range(10, 20), 0.5, 3) == whole[10:20]
    assert noisy_rows(TASK, ORDER, range(40), 0.5, 4) != whole

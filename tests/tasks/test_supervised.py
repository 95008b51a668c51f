"""Noisy responses: as many as asked for, drawn anew at each visit, a function of seed and place."""

import numpy as np

from jaxrl_llm.tasks.config import ArithmeticTask, CharacterTokenizer
from jaxrl_llm.tasks.stream import make_order
from jaxrl_llm.tasks.supervised import noisy_rows
from jaxrl_llm.tasks.task import load_task
from jaxrl_llm.tasks.tokenizer import load_tokenizer

TASK = load_task(ArithmeticTask(), load_tokenizer(CharacterTokenizer()), seed=0)
ORDER = make_order(len(TASK.train), 1)
EPOCH = len(TASK.train)


def test_without_noise_the_rows_are_the_tasks():
    assert noisy_rows(TASK, ORDER, range(50), 0.0, 0) == [TASK.train[ORDER(i)] for i in range(50)]


def test_prompts_stay_and_the_share_of_wrong_responses_is_as_asked():
    places = range(3000)
    rows, true = noisy_rows(TASK, ORDER, places, 0.5, 0), [TASK.train[ORDER(i)] for i in places]
    for row, own in zip(rows, true, strict=True):
        assert (row.prompt, row.tokens is own.tokens, row.columns) == (own.prompt, True, own.columns)
    answers = np.array([row.answer for row in TASK.train])
    assert {row.answer for row in rows} <= set(answers)
    # A random row has the right answer by chance: sum over answers of their share squared, 0.058 for three digits.
    chance = np.mean([np.mean(answers == a) for a in answers])
    wrong = np.mean([a.answer != b.answer for a, b in zip(rows, true, strict=True)])
    # Four standard deviations of a share in 3000 draws.
    assert abs(wrong - 0.5 * (1 - chance)) < 4 * np.sqrt(0.25 / 3000)


def test_answer_response_and_target_of_a_noisy_row_agree():
    """The target is what is learned: a row with another's answer and its own target would be no noise at all."""
    for row in noisy_rows(TASK, ORDER, range(200), 1.0, 0):
        assert row.answer == f"{row.response}#" == TASK.tokenizer.decode(row.target.tolist())


def test_all_noise_replaces_every_response():
    places = range(1000)
    rows, true = noisy_rows(TASK, ORDER, places, 1.0, 0), [TASK.train[ORDER(i)] for i in places]
    assert np.mean([a.response == b.response for a, b in zip(rows, true, strict=True)]) < 0.1


def test_each_visit_draws_anew():
    """Else a policy would learn the wrong responses by heart."""
    first = {row.prompt: row.response for row in noisy_rows(TASK, ORDER, range(EPOCH), 1.0, 0)}
    second = {row.prompt: row.response for row in noisy_rows(TASK, ORDER, range(EPOCH, 2 * EPOCH), 1.0, 0)}
    assert first.keys() == second.keys()
    assert np.mean([first[prompt] != second[prompt] for prompt in first]) > 0.8


def test_rows_are_a_function_of_seed_and_place():
    def texts(places, seed):
        return [(row.prompt, row.response) for row in noisy_rows(TASK, ORDER, places, 0.5, seed)]

    whole = texts(range(40), 3)
    assert texts(range(10, 20), 3) == whole[10:20]
    assert texts(range(40), 4) != whole

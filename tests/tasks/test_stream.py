"""The endless stream of prompts: a function of seed and position alone, each row once per epoch; and noisy responses."""

import json

import numpy as np
import pytest
from tokenizer_setup import save_tokenizer

from jaxrl_llm.experience.curricula import make_order
from jaxrl_llm.tasks.config import ArithmeticTask, CharacterTokenizer, FileTask, PretrainedTokenizer
from jaxrl_llm.tasks.stream import make_prompts, noisy_rows
from jaxrl_llm.tasks.task import load_task
from jaxrl_llm.tasks.tokenizer import load_tokenizer
from jaxrl_llm.types import check

ROWS = 20
TASK = load_task(ArithmeticTask(terms=2, held_out=100 - ROWS), load_tokenizer(CharacterTokenizer()), seed=0)


ALL_SUMS = load_task(ArithmeticTask(), load_tokenizer(CharacterTokenizer()), seed=0)
EPOCH = len(ALL_SUMS.train)
ROW_AT = make_order(EPOCH, 1)


def test_make_prompts_takes_training_and_held_out_rows():
    prompts = check(make_prompts(TASK, TASK.held_out, np.array([2, 0, 2]), np.array([5, 6, 7])))
    assert TASK.decode(prompts.tokens, prompts.length) == [TASK.held_out[i].prompt for i in (2, 0, 2)]
    np.testing.assert_array_equal(prompts.uid, [5, 6, 7])


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    """Three prompts in a chat template, of different lengths; the end token pads."""
    directory = tmp_path_factory.mktemp("ragged")
    rows = [{"prompt": text, "answer": "7"} for text in ("a", "three words here", "3 + 4")]
    (directory / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = load_tokenizer(PretrainedTokenizer(str(save_tokenizer(directory, pad=None))))
    return load_task(FileTask(str(directory / "rows.jsonl"), held_out=1), tokenizer, seed=0)


def test_chat_prompts_are_right_padded_and_length_excludes_padding(ragged):
    rows = ragged.train + ragged.held_out
    prompts = check(make_prompts(ragged, rows, np.arange(3), np.arange(3)))
    assert prompts.tokens.shape == (3, max(len(row.tokens) for row in rows))
    assert len(set(prompts.length.tolist())) == 3
    for row, tokens, length in zip(rows, prompts.tokens, prompts.length, strict=True):
        assert tokens[:length].tolist() == ragged.tokenizer.prompt(row.prompt)
        assert (tokens[length:] == ragged.eos[0]).all()


def test_without_noise_the_rows_are_the_tasks():
    assert noisy_rows(ALL_SUMS, ROW_AT, range(50), 0.0, 0) == [ALL_SUMS.train[ROW_AT(i)] for i in range(50)]


def test_noise_keeps_prompts_and_replaces_the_given_fraction_of_responses():
    positions = range(3000)
    rows, true = noisy_rows(ALL_SUMS, ROW_AT, positions, 0.5, 0), [ALL_SUMS.train[ROW_AT(i)] for i in positions]
    for row, own in zip(rows, true, strict=True):
        assert (row.prompt, row.tokens is own.tokens, row.columns) == (own.prompt, True, own.columns)
    answers = np.array([row.answer for row in ALL_SUMS.train])
    assert {row.answer for row in rows} <= set(answers)
    # A random row has the right answer by chance: sum over answers of their share squared, 0.058 for three digits.
    chance = np.mean([np.mean(answers == a) for a in answers])
    wrong = np.mean([a.answer != b.answer for a, b in zip(rows, true, strict=True)])
    # Four standard deviations of a share in 3000 samples.
    assert abs(wrong - 0.5 * (1 - chance)) < 4 * np.sqrt(0.25 / 3000)


def test_answer_response_and_target_of_a_noisy_row_agree():
    """Training uses the target: with its own target a row with another's answer would not be noisy."""
    for row in noisy_rows(ALL_SUMS, ROW_AT, range(200), 1.0, 0):
        assert row.answer == f"{row.response}#" == ALL_SUMS.tokenizer.decode(row.target.tolist())


def test_all_noise_repositions_every_response():
    positions = range(1000)
    rows, true = noisy_rows(ALL_SUMS, ROW_AT, positions, 1.0, 0), [ALL_SUMS.train[ROW_AT(i)] for i in positions]
    assert np.mean([a.response == b.response for a, b in zip(rows, true, strict=True)]) < 0.1


def test_noise_differs_between_visits():
    """Otherwise a policy would memorize the wrong responses."""
    first = {row.prompt: row.response for row in noisy_rows(ALL_SUMS, ROW_AT, range(EPOCH), 1.0, 0)}
    second = {row.prompt: row.response for row in noisy_rows(ALL_SUMS, ROW_AT, range(EPOCH, 2 * EPOCH), 1.0, 0)}
    assert first.keys() == second.keys()
    assert np.mean([first[prompt] != second[prompt] for prompt in first]) > 0.8


def test_noisy_rows_are_a_function_of_seed_and_position():
    def texts(positions, seed):
        return [(row.prompt, row.response) for row in noisy_rows(ALL_SUMS, ROW_AT, positions, 0.5, seed)]

    whole = texts(range(40), 3)
    assert texts(range(10, 20), 3) == whole[10:20]
    assert texts(range(40), 4) != whole

"""Mixtures: rows that know their task, what is held out, prompt forms, and data that do not go together."""

import json
import logging

import numpy as np
import pytest
from tokenizer_setup import save_tokenizer

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks.config import (
    ArithmeticTask,
    CharacterTokenizer,
    FileTask,
    MixtureTask,
    PretrainedTokenizer,
    TaskPart,
)
from jaxrl_llm.tasks.rows import hash_rows
from jaxrl_llm.tasks.stream import completion_limits, noisy_rows
from jaxrl_llm.tasks.task import load_task

DIGITS = CharacterTokenizer()
EASY = TaskPart("easy", ArithmeticTask(terms=2, held_out=90), weight=3.0, max_new_tokens=3)
HARD = TaskPart("hard", ArithmeticTask(terms=3, held_out=20))
TASK = load_task(MixtureTask((EASY, HARD)), DIGITS, seed=4)


def file_part(tmp_path, name, rows, **fields):
    (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return TaskPart(name, FileTask(str(tmp_path / f"{name}.jsonl"), **fields))


def test_rows_are_those_of_the_tasks_and_know_which():
    alone = [load_task(part.task, DIGITS, seed=4) for part in (EASY, HARD)]
    for rows, parts in ((TASK.train, [a.train for a in alone]), (TASK.held_out, [a.held_out for a in alone])):
        assert [(row.prompt, row.answer) for row in rows] == [
            (row.prompt, row.answer) for part in parts for row in part
        ]
    assert {(row.task, row.max_new_tokens, row.columns["task"]) for row in TASK.train + TASK.held_out} == {
        ("easy", 3, "easy"),
        ("hard", None, "hard"),
    }
    assert TASK.parts == {"easy": (range(10), 3.0), "hard": (range(10, 990), 1.0)} and TASK.prompt_slots == 7
    assert alone[0].parts == {"": (range(10), 1.0)} and alone[0].weights == {}
    assert completion_limits(TASK.train, np.array([0, 10, 989]), 8).tolist() == [3, 8, 8]


def test_the_fingerprint_follows_the_rows_tasks():
    renamed = load_task(MixtureTask((TaskPart("other", EASY.task, 3.0, 3), HARD)), DIGITS, seed=4)
    assert hash_rows(renamed.train) != hash_rows(TASK.train)
    assert load_task(MixtureTask((EASY, HARD)), DIGITS, seed=4).fingerprint == TASK.fingerprint


def test_wrong_responses_are_those_of_the_same_task():
    rows = noisy_rows(TASK, lambda position: position % len(TASK.train), range(990), 1.0, 0)
    answers = {name: {TASK.train[i].answer for i in part.rows} for name, part in TASK.parts.items()}
    assert all(row.answer in answers[row.task] for row in rows) and len({row.answer for row in rows[:10]}) > 2


def test_what_one_task_holds_out_no_other_trains_on(tmp_path, caplog):
    first = [{"prompt": str(i), "answer": "1"} for i in range(9)]
    parts = (
        file_part(tmp_path, "one", first, held_out=4),
        file_part(tmp_path, "two", [*first, {"prompt": "77", "answer": "2"}], held_out=1),
    )
    with caplog.at_level(logging.WARNING):
        task = load_task(MixtureTask(parts), DIGITS, seed=0)
    held_out = {row.prompt for row in task.held_out}
    assert len(held_out) in (4, 5) and not held_out & {row.prompt for row in task.train} and task.repeated >= 3
    assert "another task of the mixture holds their prompt out" in caplog.text


def test_each_task_has_its_templates_and_its_system_prompt(tmp_path):
    tokenizer = PretrainedTokenizer(str(save_tokenizer(tmp_path)), system="Be kind.")
    rows = [{"q": "one", "a": "1"}, {"q": "two", "a": "2"}]
    plain = file_part(tmp_path, "plain", rows, held_out=1, prompt="{q}", answer="{a}")
    short = file_part(tmp_path, "short", rows, held_out=1, prompt="Say {q}", answer="<{a}>")
    own = TaskPart("short", short.task, system="Be brief.")
    task = load_task(MixtureTask((plain, own)), tokenizer, seed=0)
    for row in task.train + task.held_out:
        text = task.tokenizer.backend.decode(row.tokens.tolist(), skip_special_tokens=False)
        assert ("Be brief." in text) == (row.task == "short") == ("Be kind." not in text)
        assert row.prompt.startswith("Say ") == row.answer.startswith("<") == (row.task == "short")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([TaskPart("easy", ArithmeticTask(terms=2, held_out=100))],
         "task 'easy': task.held_out: got 100, want less than the 100 sums of 2 digits"),
        ([TaskPart("a", ArithmeticTask(2), system="x")], "task 'a': system: got 'x', want it empty, or a pretrained tokenizer"),
        ([TaskPart("a", FileTask("no.jsonl", held_out=1)), TaskPart("b", FileTask("none.jsonl", held_out=1))],
         "(?s)task 'a': .*no.jsonl.*\ntask 'b': .*none.jsonl"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_task_names_it(parts, message):
    with pytest.raises(UserError, match=message):
        load_task(MixtureTask(tuple(parts)), DIGITS, seed=0)


def test_data_with_a_column_task_and_an_empty_task_are_refused(tmp_path):
    named = file_part(tmp_path, "named", [{"prompt": str(i), "answer": "1", "task": "x"} for i in range(3)], held_out=1)
    with pytest.raises(UserError, match=r"named.jsonl:\d: got a column task, want another name for it"):
        load_task(MixtureTask((EASY, named)), DIGITS, seed=0)
    same = [{"prompt": "1", "answer": "1"}] * 3
    with pytest.raises(UserError, match=r"task 'same': .*every training prompt is also held out"):
        load_task(MixtureTask((EASY, file_part(tmp_path, "same", same, held_out=1))), DIGITS, seed=0)
    one = file_part(tmp_path, "one", [{"prompt": "7", "answer": "1"}, {"prompt": "8", "answer": "1"}], held_out=1)
    left = load_task(one.task, DIGITS, seed=0).train[0].prompt
    both = file_part(tmp_path, "both", [{"prompt": left, "answer": "1"}, {"prompt": "9", "answer": "1"}])
    there = TaskPart("both", FileTask(both.task.path, held_out_path=both.task.path))
    with pytest.raises(UserError, match="task 'one': every training prompt is also held out"):
        load_task(MixtureTask((one, there)), DIGITS, seed=0)


def test_an_empty_file_is_refused_by_the_name_of_its_task(tmp_path):
    with pytest.raises(UserError, match=r"task 'none': .*none.jsonl"):
        load_task(MixtureTask((EASY, file_part(tmp_path, "none", [], held_out=1))), DIGITS, seed=0)

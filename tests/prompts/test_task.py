"""Rows that are true, parts that do not overlap, files whose every bad line is named, text that survives the tokenizer."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.errors import UserError
from jaxrl_llm.prompts.config import ArithmeticTask, JsonlTask
from jaxrl_llm.prompts.task import Row, load_task
from jaxrl_llm.prompts.tokenizer import character_tokenizer, unknown_characters

TASK = load_task(ArithmeticTask(), seed=0)


def test_arithmetic_rows_are_true_and_complete():
    rows = TASK.train + TASK.held_out
    assert len(rows) == len(set(rows)) == 1000
    for row in rows:
        digits = re.fullmatch(r"<(\d)\+(\d)\+(\d)>", row.prompt).groups()
        assert row.answer == f"{sum(map(int, digits))}#"
    assert Row("<3+4+5>", "12#") in rows and Row("<0+0+0>", "0#") in rows


def test_parts_are_disjoint_and_drawn_with_the_seed():
    assert len(TASK.held_out) == 128 and len(TASK.train) == 872
    assert not set(TASK.train) & set(TASK.held_out)
    assert load_task(ArithmeticTask(), seed=0).held_out == TASK.held_out
    assert set(load_task(ArithmeticTask(), seed=1).held_out) != set(TASK.held_out)


def test_sizes():
    assert (TASK.num_tokens, TASK.pad, TASK.eos) == (16, 0, 15)
    assert (TASK.prompt_slots, TASK.answer_slots) == (7, 3)
    two = load_task(ArithmeticTask(terms=2, held_out=99), seed=0)
    assert len(two.train) == 1 and two.prompt_slots == 5


def test_holding_out_every_row_is_refused():
    with pytest.raises(UserError, match=r"task.held_out: got 100, want less than the 100 sums of 2 digits"):
        load_task(ArithmeticTask(terms=2, held_out=100), seed=0)


def test_encoding_by_hand():
    """Token 0 is padding, the digits 1 to 10, then + < > space #."""
    tokens, length = TASK.encode(["<3+4>", "12#", "0"], 6)
    np.testing.assert_array_equal(tokens, [[12, 4, 11, 5, 13, 0], [2, 3, 15, 0, 0, 0], [1, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(length, [5, 3, 1])
    assert tokens.dtype == length.dtype == np.int32
    assert TASK.decode(tokens, length) == ["<3+4>", "12#", "0"]
    assert TASK.decode(tokens, np.array([2, 0, 1])) == ["<3", "", "0"]


def test_rows_survive_the_tokenizer():
    texts = [text for row in TASK.train + TASK.held_out for text in row]
    assert TASK.decode(*TASK.encode(texts, TASK.prompt_slots)) == texts


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="ab +#<>é∑\n\t😀", min_size=1, max_size=12))
def test_every_text_of_the_alphabet_survives(text):
    """One token a character: spaces, line ends and characters of several bytes among them."""
    tokenizer = character_tokenizer("ab +#<>é∑\n\t😀")
    ids = tokenizer.encode(text).ids
    assert len(ids) == len(text) and 0 not in ids
    assert tokenizer.decode(ids) == text


def test_unknown_characters():
    assert unknown_characters("3x+yx", TASK.tokenizer) == ["x", "y"]
    assert unknown_characters("<3+4> 12#", TASK.tokenizer) == []
    # Padding has a token, but its letters have none.
    assert unknown_characters("<pad>", TASK.tokenizer) == ["p", "a", "d"]


GOOD = json.dumps({"prompt": "<1+2>", "answer": "3#"})


@pytest.fixture
def load(tmp_path):
    def load(content: str | bytes, **fields):
        train, held_out = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
        held_out.write_text(GOOD + "\n")
        if content is not None:
            train.write_bytes(content if isinstance(content, bytes) else content.encode())
        return load_task(JsonlTask(str(train), str(held_out), **fields), seed=0)

    return load


def test_a_jsonl_file_is_read(load):
    more = json.dumps({"prompt": "9", "answer": "18#", "source": "extra fields do not matter"})
    for content in (f"{GOOD}\n{more}\n", f"{GOOD}\r\n{more}"):
        task = load(content)
        assert task.train == (Row("<1+2>", "3#"), Row("9", "18#")) and task.held_out == (Row("<1+2>", "3#"),)
        assert (task.prompt_slots, task.answer_slots, task.num_tokens, task.eos) == (5, 3, 16, 15)


def test_the_last_character_of_the_alphabet_ends(load):
    task = load(json.dumps({"prompt": "a", "answer": "b."}), alphabet="ab<1+2>3#.")
    assert task.eos == task.tokenizer.token_to_id(".") == 10


@pytest.mark.parametrize(
    "line, message",
    [
        ("{prompt: 3}", "not JSON: Expecting property name"),
        ("", "not JSON: Expecting value"),
        (b'{"prompt": "\xff", "answer": "1#"}', "not JSON: 'utf-8' codec can't decode byte 0xff"),
        ("[1, 2]", "got list, want an object with prompt and answer"),
        ("3", "got int, want an object"),
        ('{"prompt": "1"}', "answer: got null, want a string that is not empty"),
        ('{"prompt": "", "answer": "1#"}', 'prompt: got "", want a string that is not empty'),
        ('{"prompt": "1", "answer": 12}', "answer: got 12, want a string that is not empty"),
        (
            '{"prompt": "two plus", "answer": "4#"}',
            "prompt: got characters 't' 'w' 'o' 'p' 'l' 'u' 's', want only those of task.alphabet",
        ),
        ('{"prompt": "1", "answer": "\\n"}', "answer: got characters '\\n'"),
    ],
)
def test_a_bad_line_is_named_with_file_and_number(load, tmp_path, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    with pytest.raises(UserError) as error:
        load(GOOD.encode() + b"\n" + line + b"\n" + GOOD.encode())
    assert str(error.value).startswith(f"{tmp_path}/train.jsonl:2: {message}")
    assert len(str(error.value).splitlines()) == 1


def test_the_first_five_bad_lines_are_shown_and_the_rest_counted(load, tmp_path):
    with pytest.raises(UserError) as error:
        load("\n".join([GOOD] + ["{"] * 8 + [GOOD]))
    lines = str(error.value).splitlines()
    assert [line.split(": ")[0] for line in lines[:5]] == [f"{tmp_path}/train.jsonl:{n}" for n in range(2, 7)]
    assert lines[5:] == ["... and 3 more lines"]


@pytest.mark.parametrize(
    "content, message",
    [("", "got an empty file, want one JSON object a line"), (None, "cannot be read: No such file or directory")],
)
def test_a_file_without_rows_is_refused(load, tmp_path, content, message):
    with pytest.raises(UserError) as error:
        load(content)
    assert str(error.value) == f"{tmp_path}/train.jsonl: {message}"


@pytest.mark.parametrize("alphabet", ["", "a", "abca"])
def test_an_alphabet_needs_two_different_characters(load, alphabet):
    with pytest.raises(UserError, match=r"task.alphabet: got '.*', want two different characters or more, each once"):
        load(GOOD, alphabet=alphabet)

"""Filling templates, tokenizing rows, prompts that are too long: by hand, and one message per mistake."""

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError
from tokenizer_setup import IM_END, save_tokenizer

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks.config import (
    ArithmeticTask,
    CharacterTokenizer,
    FileTask,
    PretrainedTokenizer,
    TaskConfig,
    Template,
    TokenizerConfig,
)
from jaxrl_llm.tasks.records import Record
from jaxrl_llm.tasks.rows import fill, fill_rows, limit_prompts, make_rows
from jaxrl_llm.tasks.tokenizer import load_tokenizer

DIGITS = load_tokenizer(CharacterTokenizer())
COLUMNS = {
    "question": "2+2",
    "n": 4,
    "x": 0.5,
    "meta": {"level": "easy"},
    "all": ["a", "b"],
    "none": None,
    "raw": b"1",
    "wide": 9_999_999_999,
}


def rows_of(*texts, tokenizer=DIGITS):
    """Rows of (prompt, response), located at f:1, f:2, ..."""
    records = [Record(f"f:{i}", {"p": p, "r": r}) for i, (p, r) in enumerate(texts, 1)]
    found = fill_rows(records, "{p}", "{r}", "{r}")
    return make_rows(found, tokenizer), found


def message(call, *args) -> str:
    with pytest.raises(UserError) as error:
        call(*args)
    return str(error.value)


@pytest.mark.parametrize(
    "template, text",
    [
        ("{question}", "2+2"),
        ("Q: {question}\nA in \\boxed{{}}:", "Q: 2+2\nA in \\boxed{}:"),
        ("{n}{n:03d} {x:.2f} {n!r}", "4004 0.50 4"),
        ("{meta[level]} {all[1]}", "easy b"),
        ("", ""),
    ],
)
def test_templates_by_hand(template, text):
    assert fill(template, COLUMNS).text == text
    assert TypeAdapter(Template).validate_python(template) == template


@pytest.mark.parametrize(
    "template, why",
    [
        ("{questoin}", r"got no column 'questoin', want one of question, n, x, .* \(perhaps you meant question\)"),
        ("{zzz}", r"got no column 'zzz', want one of question, n, x, meta, all, none, raw, wide$"),
        ("{none}", r"got nothing \(null\), want text or a number"),
        ("{all}", "got a list, want text or a number"),
        ("{question:>{wide}}", "got the form '>9999999999', want at most 4 digits of a width or precision"),
        ("{x:.999999999f}", "got the form '.999999999f', want at most 4 digits of a width or precision"),
        ("{meta}", "got a dict, want text or a number"),
        ("{raw}", "got a bytes, want text or a number"),
        ("{meta[depth]}", r"'\{meta\[depth\]\}' does not fit the row: KeyError: 'depth'"),
        ("{all[2]}", "does not fit the row: IndexError"),
        ("{n.level}", "does not fit the row: AttributeError"),
        ("{question:d}", "Unknown format code 'd'"),
    ],
)
def test_a_template_that_does_not_fit(template, why):
    with pytest.raises(ValueError, match=why):
        fill(template, COLUMNS)


@pytest.mark.parametrize("template", ["{}", "{0}", "\\boxed{}", "{question", "question}", "{question!}", "{[a]}"])
def test_an_invalid_template_is_refused_with_the_config(template):
    with pytest.raises(
        ValidationError, match=r"[Ff]ields that name a column, as in \{question\}, and \{\{ \}\} for literal braces"
    ):
        TypeAdapter(TaskConfig).validate_python({"kind": "file", "path": "x", "prompt": template})


def test_tokenizer_configs_are_distinguished():
    tokenizer, task = TypeAdapter(TokenizerConfig), TypeAdapter(TaskConfig)
    assert tokenizer.validate_python({"alphabet": "ab"}) == CharacterTokenizer("ab")
    values = {"path": "x", "template": {"enable_thinking": False}, "stop": ["a"]}
    assert tokenizer.validate_python(values) == PretrainedTokenizer(
        "x", template={"enable_thinking": False}, stop=("a",)
    )
    assert tokenizer.validate_python({}) == PretrainedTokenizer()
    for cfg in (CharacterTokenizer("ab"), PretrainedTokenizer()):
        assert tokenizer.validate_python(cfg) == cfg
    with pytest.raises(ValidationError, match="pth"):
        tokenizer.validate_python({"pth": "x"})
    assert task.validate_python({"kind": "arithmetic"}) == ArithmeticTask()
    assert task.validate_python({"kind": "file", "path": "x"}) == FileTask("x")
    with pytest.raises(ValidationError, match="'arithmetic', 'file', 'reasoning_gym'"):
        task.validate_python({"kind": "jsonl", "path": "x"})


def test_a_row_by_hand():
    (row, other), _ = rows_of(("<3+4>", 12), ("5", "7"))
    assert (row.prompt, row.answer, row.response, row.columns) == ("<3+4>", "12", "12", {"p": "<3+4>", "r": 12})
    np.testing.assert_array_equal(row.tokens, [12, 4, 11, 5, 13])
    np.testing.assert_array_equal(row.target, [2, 3, 15])  # with the end token
    np.testing.assert_array_equal(other.target, [8, 15])
    assert row.tokens.dtype == row.target.dtype == np.int32


def test_without_a_response_there_is_no_target():
    (row,) = make_rows(fill_rows([Record("f:1", {"p": "5"})], "{p}", "", ""), DIGITS)
    assert (row.answer, row.response, row.target) == ("", None, None)


def test_a_chat_row_has_the_question_and_the_rendered_prompt(tmp_path):
    tokenizer = load_tokenizer(PretrainedTokenizer(str(save_tokenizer(tmp_path))))
    (row, other), _ = rows_of(("What is 3 + 4?", "<think></think>7"), ("é", "😀"), tokenizer=tokenizer)
    assert row.prompt == "What is 3 + 4?"
    assert row.tokens.tolist() == tokenizer.prompt("What is 3 + 4?") != tokenizer.encode("What is 3 + 4?")
    assert row.target.tolist() == [*tokenizer.encode("<think></think>7"), IM_END]
    assert other.target.tolist() == [*tokenizer.encode("😀"), IM_END]


def test_every_bad_row_is_named_with_line_and_template():
    records = [Record("f:1", {"q": "5"}), Record("f:2", {"p": "", "a": None}), Record("f:3", {"p": "\ud800", "a": 1})]
    assert message(fill_rows, records, "{p}", "{a}", "").splitlines() == [
        "f:1: task.prompt: got no column 'p', want one of q",
        "f:1: task.answer: got no column 'a', want one of q",
        'f:2: task.prompt: got "", want text',
        "f:2: task.answer: got nothing (null), want text or a number",
        "f:3: task.prompt: got '\\ud800', half of a character (a lone surrogate), want text",
    ]
    assert message(fill_rows, [Record("f:1", {"p": "5"})], "", "", "") == 'f:1: task.prompt: got "", want text'


def test_an_error_in_every_row_is_reported_once():
    records = [Record(f"f:{i}", {"q": "5", "a": a}) for i, a in enumerate(("1", None, "3"), 1)]
    assert message(fill_rows, records, "{zzz}", "{a}", "").splitlines() == [
        "all 3 rows: task.prompt: got no column 'zzz', want one of q, a",
        "f:2: task.answer: got nothing (null), want text or a number",
    ]


def test_characters_outside_the_alphabet_are_named_with_their_line():
    assert message(rows_of, ("5", "7"), ("two", "x+7")).splitlines() == [
        "f:2: prompt: got characters 't' 'w' 'o', want only those of tokenizer.alphabet",
        "f:2: response: got characters 'x', want only those of tokenizer.alphabet",
    ]


def test_an_end_token_inside_a_response_is_refused():
    assert message(rows_of, ("5", "7"), ("6", "8#")) == (
        "f:2: task.response: got the end token '#' in it, want none: it is added"
    )


def test_a_template_that_raises_on_a_row_names_the_row(tmp_path):
    template = "{% if 'x' in messages[0].content %}{{ raise_exception('no x') }}{% endif %}{{ messages[0].content }}"
    tokenizer = load_tokenizer(PretrainedTokenizer(str(save_tokenizer(tmp_path, template=template))))
    texts = [("ok", "1"), *[("an x", "1")] * 6]
    lines = message(lambda: rows_of(*texts, tokenizer=tokenizer)).splitlines()
    assert lines[0] == f"f:2: {tmp_path}: the chat template raises TemplateError: no x"
    assert [line.split(": ")[0] for line in lines[:5]] == ["f:2", "f:3", "f:4", "f:5", "f:6"]
    assert lines[5:] == ["... and 1 more"]


def test_a_prompt_without_tokens_is_refused(tmp_path):
    template = "{% if messages[0].content != 'x' %}{{ messages[0].content }}{% endif %}"
    tokenizer = load_tokenizer(PretrainedTokenizer(str(save_tokenizer(tmp_path, template=template))))
    assert message(lambda: rows_of(("x", "1"), tokenizer=tokenizer)) == "f:1: got a prompt without tokens"


FIVE = [("1", "0"), ("12", "0"), ("123", "0"), ("1234", "0"), ("12345", "0")]


def test_prompts_over_the_limit_are_dropped_and_counted():
    rows, texts = rows_of(*FIVE)
    kept, dropped = limit_prompts(rows, texts, 3, "drop")
    assert ([row.prompt for row in kept], dropped) == (["1", "12", "123"], 2)
    for most, policy in ((5, "drop"), (5, "refuse"), (0, "refuse")):
        assert limit_prompts(rows, texts, most, policy) == (rows, 0)


def test_prompts_over_the_limit_are_refused_by_name():
    rows, texts = rows_of(*FIVE)
    assert message(limit_prompts, rows, texts, 3, "refuse").splitlines() == [
        f"f:{n}: got a prompt of {n} tokens, want task.max_prompt_tokens (3) at most, or task.too_long: drop" for n in (4, 5)
    ]  # fmt: skip


def test_dropping_every_row_is_refused():
    rows, texts = rows_of(*FIVE[1:])
    assert message(limit_prompts, rows, texts, 1, "drop") == (
        "f:1: got a prompt of 2 tokens, and no row has task.max_prompt_tokens (1) or less: none is left"
    )

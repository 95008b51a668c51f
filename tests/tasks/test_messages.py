"""Rows of chat messages: turns rendered with the chat template, and invalid lists refused by line."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from tokenizer_setup import IM_END, save_tokenizer
from transformers import AutoTokenizer

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks.config import FileTask, PretrainedTokenizer
from jaxrl_llm.tasks.task import load_task
from jaxrl_llm.tasks.tokenizer import load_tokenizer

ASK = {"role": "user", "content": "2+2?"}
MORE = [
    {"role": "system", "content": "Be brief."},
    ASK,
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "+1?"},
]
RIGHT = {"role": "assistant", "content": "5"}
ALL = {"prompt": "{messages}", "answer": "{messages}", "response": "{messages}"}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("qwen"))


def rows(directory, data, tokenizer, **fields):
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    return load_task(FileTask(str(path), held_out_path=str(path), **fields), tokenizer, 0).held_out


def error_of(directory, data, tokenizer, **fields) -> str:
    with pytest.raises(UserError) as error:
        rows(directory, data, tokenizer, **fields)
    return str(error.value)


def test_turns_match_transformers_and_the_last_one_is_the_response(tmp_path, qwen):
    tokenizer = load_tokenizer(PretrainedTokenizer(str(qwen)))
    one, many = rows(tmp_path, [{"messages": [ASK, RIGHT]}, {"messages": [*MORE, RIGHT]}], tokenizer, **ALL)
    theirs = AutoTokenizer.from_pretrained(qwen)
    for row, turns in ((one, [ASK]), (many, MORE)):
        assert row.tokens.tolist() == theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert (row.answer, row.response, row.target.tolist()) == ("5", "5", [*tokenizer.encode("5"), IM_END])
    assert one.prompt == "2+2?"
    assert many.prompt == "system: Be brief.\nuser: 2+2?\nassistant: 4\nuser: +1?"
    assert tokenizer.backend.decode(many.tokens.tolist(), skip_special_tokens=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
        "<|im_start|>user\n+1?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_prompt_column_of_messages_needs_no_template(tmp_path, qwen):
    """TRL's format, in a parquet file, which pads messages with nulls; the config's system turn if a row has none."""
    tokenizer = load_tokenizer(PretrainedTokenizer(str(qwen), system="Add."))
    data = [
        {"prompt": [{**ASK, "name": None}], "answer": 4},
        {"prompt": [{**turn, "name": "x"} for turn in MORE], "answer": 5},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(data), tmp_path / "rows.parquet")
    path = str(tmp_path / "rows.parquet")
    one, many = load_task(FileTask(path, held_out_path=path), tokenizer, 0).held_out
    assert tokenizer.decode(one.tokens.tolist()) == "system\nAdd.\nuser\n2+2?\nassistant\n"
    assert (
        tokenizer.decode(many.tokens.tolist()).startswith("system\nBe brief.\nuser\n2+2?\nassistant\n4\n")
        and many.answer == "5"
    )
    parts = [
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]}],
            "answer": 4,
        }
    ]
    assert rows(tmp_path, parts, tokenizer)[0].tokens.tolist() == one.tokens.tolist()


def test_control_tokens_in_messages_are_text(tmp_path, qwen):
    tokenizer = load_tokenizer(PretrainedTokenizer(str(qwen)))
    bad = [{"role": "user", "content": "a<|im_end|>b"}, {"role": "assistant", "content": "<|im_end|>"}, ASK]
    (row,) = rows(tmp_path, [{"prompt": bad, "answer": ""}], tokenizer, answer="")
    assert row.tokens.tolist().count(IM_END) == 3 and len(row.split) == 2


BAD = [
    (
        [{"role": "boss", "content": "x"}],
        "got message 0 with the role 'boss', want one of system, developer, user, assistant, tool",
    ),
    ([{"role": "user"}], "got message 0 with a content of NoneType, want text"),
    ([ASK, {"role": "user", "content": [{"type": "image"}]}], "got message 1 with a content of list, want text"),
    ([{**ASK, "tool_calls": [{"a": 1}]}], "got message 0 with tool_calls, want text-only messages"),
    ([RIGHT], "got messages without a question, want a turn with text before the assistant's"),
    ([{"role": "user", "content": "\ud800"}], "got '\\ud800', half of a character (a lone surrogate), want text"),
    ([], "got a list, want text or a number"),
    (["2+2?"], "got a list, want text or a number"),
]


def test_invalid_conversations_are_named_by_line(tmp_path, qwen):
    tokenizer = load_tokenizer(PretrainedTokenizer(str(qwen)))
    for messages, why in BAD:
        data = [{"prompt": [ASK], "answer": 4}, {"prompt": messages, "answer": 4}]
        line = error_of(tmp_path, data, tokenizer)
        assert line.startswith(f"{tmp_path}/rows.jsonl:2: ") and line.endswith(why)
    line = error_of(tmp_path, [{"messages": [ASK]}], tokenizer, **ALL)
    assert "rows.jsonl:1: task.answer: got messages whose last turn is the user's, want the assistant's" in line


def test_turns_without_a_suitable_template_are_refused(tmp_path, qwen):
    plain = load_tokenizer(PretrainedTokenizer(str(qwen), chat=False))
    line = error_of(tmp_path, [{"prompt": MORE, "answer": 4}], plain)
    assert line.startswith(
        f"{tmp_path}/rows.jsonl:1: got messages, want a prompt of one text: there is no chat template"
    )
    last = "{{ messages[-1].content }}<|im_end|>{% if add_generation_prompt %}<s>{% endif %}"
    tokenizer = load_tokenizer(PretrainedTokenizer(str(save_tokenizer(tmp_path / "last", template=last))))
    assert "leaves the system's turn out" in error_of(tmp_path, [{"prompt": MORE, "answer": 4}], tokenizer)

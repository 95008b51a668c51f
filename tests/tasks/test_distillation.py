"""Stored responses as rows of a task: which are learned, token for token, and which prompts are held out."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks.config import CharacterTokenizer, RolloutsTask
from jaxrl_llm.tasks.task import load_task
from jaxrl_llm.tasks.tokenizer import load_tokenizer
from jaxrl_llm.tasks.trajectories import tokenizer_name

DIGITS = load_tokenizer(CharacterTokenizer())
NAME = tokenizer_name(DIGITS)


def response(prompt: int, text: str, reward: float = 1.0, **more) -> dict:
    """A response to the prompt `<prompt>`, right if its reward is 1."""
    ids, asked = DIGITS.encode(text), DIGITS.encode(f"<{prompt}>")
    return {
        "tokenizer": NAME, "prompt": f"<{prompt}>", "completion": text, "answer": f"{prompt}#", "prompt_ids": asked, "ids": ids,
        "reward": reward, "success": reward >= 1, **more,
    }  # fmt: skip


ROWS = [
    response(1, "1#"), response(1, "1#"), response(1, "01#", 1.5), response(1, "2#", 0.0), response(2, "2#"), response(2, "3", 0.0),
    response(3, "4#", 0.0), response(4, "4#", 1.0), response(4, "04#", 1.0),
]  # fmt: skip


def load(tmp_path, rows=ROWS, **fields):
    path = tmp_path / "rollouts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_task(RolloutsTask(str(path), **{"held_out": 1} | fields), DIGITS)


def texts(task) -> dict[str, list[str]]:
    """Responses to each training prompt."""
    found = {}
    for row in task.train:
        assert DIGITS.decode(row.target.tolist()) == row.response and DIGITS.decode(row.tokens.tolist()) == row.prompt
        found.setdefault(row.prompt, []).append(row.response)
    return found


def with_held_out(task) -> dict[str, list[str]]:
    return texts(task) | {row.prompt: [row.response] for row in task.held_out}


def test_right_responses_are_learned_each_once(tmp_path):
    task = load(tmp_path)
    right = {"<1>": ["1#", "01#"], "<2>": ["2#"], "<4>": ["4#", "04#"]}
    (held_out,) = task.held_out
    assert texts(task) == {prompt: found for prompt, found in right.items() if prompt != held_out.prompt}
    # Of equal rewards the first.
    assert held_out.response == {"<1>": "01#", "<2>": "2#", "<4>": "4#"}[held_out.prompt]
    assert task.has_targets and all(row.answer == f"{row.prompt[1]}#" for row in task.train)
    assert task.train[0].columns.keys() == {"tokenizer", "prompt", "completion", "answer", "reward", "success"}


def test_all_responses_repeated_ones_too_or_the_best(tmp_path):
    every = with_held_out(load(tmp_path, keep="all", distinct=False, held_out=3))
    assert len(every) == 4 and set(every) == {"<1>", "<2>", "<3>", "<4>"}
    train = texts(load(tmp_path, keep="all", distinct=False))
    whole = {"<1>": ["1#", "1#", "01#", "2#"], "<2>": ["2#", "3"], "<3>": ["4#"], "<4>": ["4#", "04#"]}
    assert train == {prompt: whole[prompt] for prompt in train} and len(train) == 3
    best = texts(load(tmp_path, best=1))
    assert (
        best == {prompt: {"<1>": ["01#"], "<2>": ["2#"], "<4>": ["4#"]}[prompt] for prompt in best} and len(best) == 2
    )


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), min_size=1, max_size=30),
    st.integers(1, 5),
    st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_a_prompt_is_wholly_held_out_or_wholly_trained_on(tmp_path_factory, pairs, held_out, seed):
    rows = [response(prompt, f"{text}#") for prompt, text in pairs]
    path = tmp_path_factory.mktemp("x") / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg, prompts = RolloutsTask(str(path), held_out=held_out), {prompt for prompt, _ in pairs}
    if held_out >= len(prompts):
        with pytest.raises(
            UserError, match=rf"task.held_out: got {held_out}, want less than the {len(prompts)} prompts"
        ):
            load_task(cfg, DIGITS, seed)
        return
    task = load_task(cfg, DIGITS, seed)
    tested, trained = ([row.tokens.tobytes() for row in part] for part in (task.held_out, task.train))
    assert len(tested) == len(set(tested)) == held_out and not set(tested) & set(trained)
    assert len(set(tested) | set(trained)) == len(prompts)
    # Each different pair is one row.
    held = {DIGITS.decode(row.tokens.tolist()) for row in task.held_out}
    assert len(task.train) == len({(prompt, text) for prompt, text in pairs if f"<{prompt}>" not in held})


def test_tokens_are_those_of_the_file_not_of_its_texts(tmp_path):
    """A policy may spell a text in other tokens than the tokenizer does; and the texts may have been edited."""
    rows = [response(n, "7#") | {"completion": "seven", "prompt": "?"} for n in (1, 2)]
    task = load(tmp_path, rows)
    assert [row.target.tolist() for row in task.train] == [DIGITS.encode("7#")] and task.train[0].response == "seven"


def test_texts_of_others_are_learned_too(tmp_path):
    task = load(tmp_path, [{"prompt": f"<{n}>", "completion": str(n)} for n in (1, 1, 2)], keep="all")
    (row,) = task.train
    assert row.target.tolist() == [*DIGITS.encode(row.response), *DIGITS.eos] and len(task.held_out) == 1


@pytest.mark.parametrize(
    "rows, fields, message",
    [
        ([ROWS[0], {}], {}, r"task.path: .*rollouts.jsonl:2: got token ids without the column tokenizer"),
        (ROWS[3:4], {}, r"task.keep: got success, and none of the 1 responses in .* is one, want keep: all or another file"),
        ([{"prompt": "1", "completion": "2"}], {}, r"task.keep: got success, and .* has no column success, want keep: all"),
        ([response(1, "1#", sampled=[True, False])], {}, r"rollouts.jsonl:1: got tokens that no policy sampled, want none"),
        (ROWS, {"held_out": 3}, r"task.held_out: got 3, want less than the 3 prompts with a response to learn in"),
        (ROWS, {"max_prompt_tokens": 2}, r"rollouts.jsonl:1: got a prompt of 3 tokens, want task.max_prompt_tokens \(2\) at most"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned(tmp_path, rows, fields, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, rows, **fields)


def test_rows_with_longer_prompts_are_dropped(tmp_path, caplog):
    task = load(tmp_path, [*ROWS, response(12, "12#")], max_prompt_tokens=3, too_long="drop")
    assert task.dropped == 1 and "1 rows with longer prompts were dropped" in caplog.text

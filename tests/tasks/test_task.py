"""Correct rows, disjoint splits, and bad data refused with file and line."""

import datetime
import json
import logging
import re

import datasets
import numpy as np
import pytest
from tokenizer_setup import CHATML, save_tokenizer

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks.config import ArithmeticTask, CharacterTokenizer, FileTask, PretrainedTokenizer
from jaxrl_llm.tasks.rows import Row, hash_rows
from jaxrl_llm.tasks.task import load_task
from jaxrl_llm.tasks.tokenizer import load_tokenizer

DIGITS = load_tokenizer(CharacterTokenizer())
TASK = load_task(ArithmeticTask(), DIGITS, seed=0)
datasets.disable_progress_bars()


def prompts(rows) -> list[str]:
    return [row.prompt for row in rows]


def test_arithmetic_rows_are_correct_and_complete():
    rows = TASK.train + TASK.held_out
    assert len(rows) == len(set(prompts(rows))) == 1000
    for row in rows:
        total = str(sum(map(int, re.fullmatch(r"<(\d)\+(\d)\+(\d)>", row.prompt).groups())))
        assert (row.answer, row.response) == (f"{total}#", total)
        assert TASK.tokenizer.decode(row.tokens.tolist()) == row.prompt
        assert TASK.tokenizer.decode(row.target.tolist()) == row.answer


def test_held_out_rows_are_disjoint_and_chosen_by_the_seed():
    assert len(TASK.held_out) == 128 and len(TASK.train) == 872
    assert not set(prompts(TASK.train)) & set(prompts(TASK.held_out))
    assert prompts(load_task(ArithmeticTask(), DIGITS, seed=0).held_out) == prompts(TASK.held_out)
    assert set(prompts(load_task(ArithmeticTask(), DIGITS, seed=1).held_out)) != set(prompts(TASK.held_out))


def test_sizes():
    assert (TASK.num_tokens, TASK.pad, TASK.eos) == (16, 0, (15,))
    assert (TASK.prompt_slots, TASK.target_slots, TASK.has_targets, TASK.dropped, TASK.repeated) == (7, 3, True, 0, 0)
    two = load_task(ArithmeticTask(terms=2, held_out=99), DIGITS, seed=0)
    assert len(two.train) == 1 and two.prompt_slots == 5


def test_holding_out_every_row_is_refused():
    with pytest.raises(UserError, match=r"task.held_out: got 100, want less than the 100 sums of 2 digits"):
        load_task(ArithmeticTask(terms=2, held_out=100), DIGITS, seed=0)


def test_arithmetic_in_another_alphabet_is_refused_by_character():
    with pytest.raises(UserError, match=r"prompt: got characters '<' '>', want only those of tokenizer.alphabet"):
        load_task(ArithmeticTask(), load_tokenizer(CharacterTokenizer("0123456789+#")), seed=0)


def test_arithmetic_for_a_pretrained_tokenizer(tmp_path):
    """Its end token is special, so graders do not see it."""
    tokenizer = load_tokenizer(PretrainedTokenizer(str(save_tokenizer(tmp_path)), chat=False))
    row = load_task(ArithmeticTask(terms=2, held_out=1), tokenizer, seed=0).train[0]
    assert row.answer == row.response == tokenizer.decode(row.target.tolist())


def test_completions_are_decoded_up_to_their_length():
    tokens = np.array([[2, 3, 15, 0], [12, 4, 0, 0], [1, 1, 1, 1]], np.int32)
    assert TASK.decode(tokens, np.array([3, 1, 0])) == ["12#", "<", ""]


def test_a_row_by_its_prompt():
    assert TASK.row(TASK.train[3].prompt) is TASK.train[3]
    new = TASK.row("1+1")
    assert (new.prompt, new.answer, new.response, new.target) == ("1+1", "", None, None)
    assert new.tokens.tolist() == [2, 11, 2]
    with pytest.raises(UserError, match=r"prompt: got characters 'x', want only those of tokenizer.alphabet"):
        TASK.row("x")


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sums(n: int, **more) -> list[dict]:
    return [{"prompt": f"{i}+{i}", "answer": f"{2 * i}", **more} for i in range(n)]


@pytest.fixture
def load(tmp_path):
    def load(rows, seed=0, **fields):
        return load_task(FileTask(jsonl(tmp_path / "rows.jsonl", *rows), **fields), DIGITS, seed)

    return load


def test_rows_are_held_out_by_the_seed(load):
    task = load(sums(20), held_out=5)
    assert (len(task.train), len(task.held_out)) == (15, 5)
    assert sorted(prompts(task.train + task.held_out)) == sorted(row["prompt"] for row in sums(20))
    assert prompts(load(sums(20), held_out=5).held_out) == prompts(task.held_out)
    assert prompts(load(sums(20), held_out=5, seed=1).held_out) != prompts(task.held_out)
    assert (task.has_targets, task.target_slots) == (False, 0)


def test_columns_are_mapped(load):
    task = load(
        [{"q": "1", "a": 2, "id": 7}, {"q": "3", "a": 44}], held_out=1, prompt="<{q}>", answer="{a}#", response="{a}"
    )
    rows = {row.prompt: row for row in task.train + task.held_out}
    assert {p: (r.answer, r.response, len(r.target)) for p, r in rows.items()} == {
        "<1>": ("2#", "2", 2), "<3>": ("44#", "44", 3),
    }  # fmt: skip
    assert rows["<1>"].columns == {"q": "1", "a": 2, "id": 7}
    assert (task.has_targets, task.target_slots, task.prompt_slots) == (True, 3, 3)


def test_a_prompt_that_is_held_out_is_not_trained_on(load, caplog):
    rows = sums(4) * 2  # each prompt twice
    with caplog.at_level(logging.WARNING, "jaxrl_llm.tasks"):
        task = load(rows, held_out=2)
    assert not set(prompts(task.train)) & set(prompts(task.held_out))
    assert task.repeated == 6 - len(task.train) > 0
    assert [r.getMessage() for r in caplog.records] == [
        f"task: {task.repeated} rows were left out of training: their prompt is held out"
    ]
    with pytest.raises(UserError, match=r"rows.jsonl: every training prompt is also held out"):
        load([{"prompt": "1", "answer": "2"}] * 3, held_out=1)


def test_a_held_out_file_is_used_unchanged(load, tmp_path, caplog):
    path = jsonl(tmp_path / "held.jsonl", {"prompt": "0+0", "answer": "0"}, {"prompt": "9", "answer": "9"})
    with caplog.at_level(logging.WARNING, "jaxrl_llm.tasks"):
        task = load(sums(3), held_out_path=path)
    assert prompts(task.train) == ["0+0", "1+1", "2+2"] and prompts(task.held_out) == ["0+0", "9"]
    assert [r.getMessage() for r in caplog.records] == [
        "task.held_out_path: 1 of its prompts are also trained on, e.g. '0+0'"
    ]


def test_splits_of_a_saved_dataset(tmp_path):
    parts = {"train": datasets.Dataset.from_list(sums(3)), "test": datasets.Dataset.from_list(sums(5)[3:])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "d")
    task = load_task(FileTask(str(tmp_path / "d"), held_out_split="test"), DIGITS, 0)
    assert prompts(task.train) == ["0+0", "1+1", "2+2"] and prompts(task.held_out) == ["3+3", "4+4"]
    other = load_task(FileTask(str(tmp_path / "d"), split="test", held_out=1), DIGITS, 0)
    assert sorted(prompts(other.train + other.held_out)) == ["3+3", "4+4"]


@pytest.mark.parametrize(
    "fields", [{}, {"held_out": 2, "held_out_path": "x.jsonl"}, {"held_out": 2, "held_out_split": "t"}]
)
def test_held_out_rows_are_specified_exactly_once(load, fields):
    with pytest.raises(
        UserError, match=rf"task: got {'both' if fields else 'neither'} of held_out \(\d\) and held_out_path"
    ):
        load(sums(4), **fields)


def test_holding_out_all_rows_is_refused(load, tmp_path):
    with pytest.raises(UserError, match=r"task.held_out: got 4, want less than the 4 rows of .*rows.jsonl"):
        load(sums(4), held_out=4)


def test_long_prompts_of_training_and_held_out_rows_are_dropped_and_counted_once(load, tmp_path, caplog):
    path = jsonl(tmp_path / "held.jsonl", {"prompt": "1234567", "answer": "0"}, {"prompt": "9", "answer": "9"})
    with caplog.at_level(logging.WARNING, "jaxrl_llm.tasks"):
        task = load(sums(12), held_out_path=path, max_prompt_tokens=4, too_long="drop")
    assert (len(task.train), prompts(task.held_out), task.dropped) == (10, ["9"], 3)
    assert task.prompt_slots == 3  # of what is left
    assert [r.getMessage() for r in caplog.records] == [
        "task.max_prompt_tokens: 3 rows with longer prompts were dropped"
    ]
    with pytest.raises(UserError) as error:
        load(sums(12), held_out=1, max_prompt_tokens=4)
    assert str(error.value).splitlines() == [
        f"{tmp_path}/rows.jsonl:{n}: got a prompt of 5 tokens, want task.max_prompt_tokens (4) at most, or task.too_long: drop"
        for n in (11, 12)
    ]  # fmt: skip


def test_a_missing_column_is_named_with_file_line_and_template(load, tmp_path):
    with pytest.raises(UserError) as error:
        load([*sums(1), {"promt": "1", "answer": "2"}], held_out=1)
    assert str(error.value) == (
        f"{tmp_path}/rows.jsonl:2: task.prompt: got no column 'prompt', want one of promt, answer (perhaps you meant promt)"
    )


def test_changes_since_a_checkpoint_are_named(load):
    """A prompt, an answer, a column, the order; "" if nothing changed or nothing was saved."""
    saved = load(sums(20, level=1), held_out=5).fingerprint
    rows = sums(20, level=1)
    assert load(rows, held_out=5).changed(saved) == load(rows, held_out=5).changed(None) == ""
    held = {int(row.answer) // 2 for row in load(rows, held_out=5).held_out}
    for i in (min(held), min(set(range(20)) - held)):
        part = "held-out rows" if i in held else "training rows"
        for change in ({"prompt": "9+9+9"}, {"answer": "1"}, {"level": 2}):
            other = [*rows[:i], rows[i] | change, *rows[i + 1 :]]
            assert (
                load(other, held_out=5)
                .changed(saved)
                .startswith(f"task: got other {part} than at the checkpoint (data file, ")
            )
    assert "got other training rows, held-out rows than" in load(rows[::-1], held_out=5).changed(saved)


def test_another_chat_template_or_tokenizer_changes_the_task(load, tmp_path):
    def changed(saved, **fields):
        tokenizer = load_tokenizer(PretrainedTokenizer(str(save_tokenizer(tmp_path / "t", **fields))))
        task = load_task(FileTask(jsonl(tmp_path / "r.jsonl", *sums(3)), held_out=1), tokenizer, 0)
        return task.fingerprint if saved is None else task.changed(saved)

    saved = changed(None)
    assert changed(saved) == ""
    assert "got other training rows, held-out rows than" in changed(
        saved, template=CHATML.replace("user", "User") + " "
    )
    assert "got other tokenizer than" in changed(saved, generation={"eos_token_id": [0, 2]})


def test_a_fingerprint_is_independent_of_addresses_and_set_order():
    """Both differ between processes."""

    def hashed(some: set, thing: object, last: bytes = b"1") -> str:
        columns = {"a": some, "b": thing, "c": last, "d": datetime.date(2026, 1, 2)}
        return hash_rows([Row("1", "2", None, np.array([1], np.int32), None, columns)])

    one, other, zero_first, eight_first = object(), object(), {0, 8}, {8, 0}
    assert repr(one) != repr(other) and repr(zero_first) != repr(eight_first)
    assert hashed(zero_first, one) == hashed(eight_first, other)
    assert len({hashed({0}, one), hashed({0, 8}, one), hashed({0}, one, b"2"), hashed({0}, "x")}) == 4


def test_settings_without_an_effect_are_refused(load, tmp_path):
    for fields, message in (
        ({"held_out": 1, "split": "test"}, "task.split: got 'test', want it left out: .*rows.jsonl has no splits"),
        ({"held_out_split": "test"}, "task.held_out_split: got 'test', want it left out: .*rows.jsonl has no splits"),
        (
            {"held_out": 1, "too_long": "drop"},
            "task.too_long: got drop, want task.max_prompt_tokens above 0 as well",
        ),
    ):
        with pytest.raises(UserError, match=message):
            load(sums(4), **fields)
    datasets.Dataset.from_list(sums(4)).save_to_disk(tmp_path / "d")
    with pytest.raises(UserError, match=r"task.split: got 'test', want it left out: .*/d has no splits"):
        load_task(FileTask(str(tmp_path / "d"), split="test", held_out=1), DIGITS, 0)
    assert load_task(FileTask(str(tmp_path / "d"), held_out=1), DIGITS, 0).train


def test_answers_that_no_response_can_equal_cause_a_warning(tmp_path, caplog):
    """Graders read responses without special tokens; other tags stay."""
    tokenizer = load_tokenizer(PretrainedTokenizer(str(save_tokenizer(tmp_path))))
    path = jsonl(tmp_path / "r.jsonl", *sums(3))
    load_task(FileTask(path, held_out=1, answer="<think>{answer}</think>"), tokenizer, 0)
    assert caplog.messages == []
    task = load_task(FileTask(path, held_out=1, answer="{answer}<|im_end|>"), tokenizer, 0)
    assert caplog.messages == [
        f"task.answer: 3 hold special tokens, which graders never see in a response, e.g. {task.train[0].answer!r}"
    ]

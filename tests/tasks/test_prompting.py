"""Prompt control: forms, few-shot examples and settings of single rows; what an example never shows; which form a visit gets."""

import json
import logging
import re
from collections import Counter
from functools import partial

import numpy as np
import pytest
from tokenizer_setup import CHATML, IM_END, save_tokenizer

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks.config import (
    CharacterTokenizer,
    FileTask,
    MixtureTask,
    PretrainedTokenizer,
    TaskPart,
)
from jaxrl_llm.tasks.few_shot import ExamplePool
from jaxrl_llm.tasks.rows import hash_rows
from jaxrl_llm.tasks.stream import completion_limits, make_prompts, noisy_rows, rows_asked
from jaxrl_llm.tasks.task import load_task
from jaxrl_llm.tasks.tokenizer import load_tokenizer

DIGITS = CharacterTokenizer("0123456789+=? \n#")
TWO_FORMS = [{"name": "plain"}, {"name": "brief", "prompt": "Be brief. {q}"}]


def sums(n: int, **more) -> list[dict]:
    return [{"q": f"{i} + {i}?", "a": f"{2 * i}", **more} for i in range(n)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(PretrainedTokenizer(str(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))))


@pytest.fixture
def load(tmp_path, tokenizer):
    def load(rows, seed=0, tokenizer=tokenizer, **fields):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        known = {"held_out": 2, "prompt": "{q}", "answer": "{a}"} | fields
        return load_task(str(tmp_path / "rows.jsonl"), tokenizer, seed, **known)

    return load


def read(task, tokens) -> str:
    return task.tokenizer.backend.decode(np.asarray(tokens).tolist(), skip_special_tokens=False)


def chat(*turns: str, system: str = "", end: str = "") -> str:
    """ChatML of user and assistant turns, one after the other."""
    before = [("system", system)] if system else []
    spoken = [*before, *((("user", "assistant")[i % 2], text) for i, text in enumerate(turns))]
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in spoken) + f"<|im_start|>assistant\n{end}"


def questions(text: str) -> list[str]:
    """Questions in a prompt, the row's own last."""
    return re.findall(r"\d+ \+ \d+\?", text)


def test_nothing_changes_without_the_section(load):
    plain, named = load(sums(9)), load(sums(9), prompting={"forms": [], "examples": {"number": 0}})
    assert plain.fingerprint == named.fingerprint and plain.prompt_slots == named.prompt_slots
    assert all(row.visit is None and row.asked(3) is row and row.asks is None for row in named.train + named.held_out)


def test_a_form_is_a_template_a_system_prompt_and_arguments(load):
    forms = [{"name": "quick", "prompt": "Say {q}", "system": "Be kind.", "template": {"enable_thinking": False}}]
    task = load(sums(5), prompting={"forms": forms})
    for row in task.train:
        asked = row.asked(7)
        said = chat(f"Say {row.prompt}", system="Be kind.", end="<think>\n\n</think>\n\n")
        assert read(task, asked.tokens) == said and (asked.text, asked.asks.form) == (f"Say {row.prompt}", "quick")
        assert read(task, row.tokens) == chat(row.prompt) == read(task, row.stated.asked(7).tokens)
    assert task.prompt_slots == max(len(row.asked(0).tokens) for row in task.train)
    assert all(read(task, row.tokens) == chat(row.prompt) and row.asked(1) is row for row in task.held_out)


def test_examples_as_turns_and_as_text(load):
    """Two training rows and a held-out one: each training row has the other as its example."""
    rows, one = sums(3), {"number": 1}
    task = load(
        rows, held_out=1, prompting={"forms": [{"name": "x", "prompt": "Q {q}", "system": "Hi."}], "examples": one}
    )
    first, second = task.train
    assert read(task, first.tokens) == chat(second.prompt, second.answer, first.prompt)
    assert read(task, first.asked(0).tokens) == chat(
        f"Q {second.prompt}", second.answer, f"Q {first.prompt}", system="Hi."
    )
    assert (first.asked(0).text, first.asked(0).asks.num_examples) == (f"Q {first.prompt}", 1)
    text = one | {"place": "text", "text": "[{prompt}={response}] ", "response": "<{a}>"}
    task = load(rows, held_out=1, prompting={"examples": text})
    first, second = task.train
    assert read(task, first.tokens) == chat(f"[{second.prompt}=<{second.answer}>] {first.prompt}")
    assert first.visit is None


def test_a_form_shows_responses_of_its_own(load):
    forms = [{"name": "x", "prompt": "Q {q}", "response": "<{a}>"}, {"name": "y"}]
    task = load(sums(3), held_out=1, prompting={"forms": forms, "examples": {"number": 1, "response": "It is {a}"}})
    first, second = task.train
    said = {row.asks.form: read(task, row.tokens) for row in map(first.asked, range(20))}
    assert said["x"] == chat(f"Q {second.prompt}", f"<{second.answer}>", f"Q {first.prompt}")
    assert said["y"] == read(task, first.tokens) == chat(second.prompt, f"It is {second.answer}", first.prompt)
    with pytest.raises(
        UserError, match=r"forms.0.response: got '<\{a\}>', want it empty, or task.prompting.examples.number"
    ):
        load(sums(3), prompting={"forms": forms})


def test_an_example_shows_the_right_response_if_it_is_known(load):
    task = load(sums(3), held_out=1, response="It is {a}", prompting={"examples": {"number": 1}})
    assert f"assistant\nIt is {task.train[1].answer}<" in read(task, task.train[0].tokens)


def test_examples_for_a_tokenizer_of_characters(load):
    rows = [{"q": f"{i}+{i}?", "a": f"{2 * i}#"} for i in range(4)]
    task = load(rows, tokenizer=DIGITS, held_out=2, prompting={"examples": {"number": 1, "place": "text"}})
    first, second = task.train
    assert read(task, first.tokens) == f"{second.prompt}\n{second.answer}\n\n{first.prompt}"
    with pytest.raises(UserError, match=r"examples.place: got 'turns', want text, or a tokenizer with a chat template"):
        load(rows, tokenizer=DIGITS, prompting={"examples": {"number": 1}})
    with pytest.raises(UserError, match=r"examples.text: got characters '\[' '\]' in an example"):
        load(
            rows,
            tokenizer=DIGITS,
            prompting={"examples": {"number": 1, "place": "text", "text": "[{prompt}{response}]"}},
        )


def test_conversations_keep_their_turns_behind_the_examples(load):
    says = lambda role, text: {"role": role, "content": text}  # noqa: E731
    rows = [
        {"m": [says("user", f"hi {i}"), says("assistant", "yes"), says("user", f"{i}?")], "a": str(i)} for i in range(3)
    ]
    task = load(rows, held_out=1, prompt="{m}", prompting={"examples": {"number": 1}})
    first, second = (re.findall(r"\d", row.prompt)[0] for row in task.train)
    said = chat(f"hi {second}", "yes", f"{second}?", second, f"hi {first}", "yes", f"{first}?")
    assert read(task, task.train[0].tokens) == said
    with pytest.raises(
        UserError, match=r"all 3 rows: .*examples.place: got text for messages of several turns, want turns"
    ):
        load(rows, prompt="{m}", prompting={"examples": {"number": 1, "place": "text"}})


def shown_leaks(task, uids=range(4)) -> list[str]:
    """Rows of which an example has the row's own question, or that of a held-out row."""
    held_out, found = {row.prompt for row in task.held_out}, []
    for row in (*task.train, *task.held_out):
        for asked in (row, *(row.asked(uid) for uid in uids)):
            *shown, own = questions(read(task, asked.tokens))
            assert own == row.prompt and len(shown) == 3 and len(set(shown)) == 3
            if {own, *held_out} & set(shown):
                found.append(row.prompt)
    return found


# Each question twice, with other columns and another answer.
TWICE = [{**row, "id": i} for i, row in enumerate([*sums(12), *(row | {"a": f"{row['a']}.0"} for row in sums(12))])]


@pytest.mark.parametrize("by", ["row", "visit"])
def test_no_example_is_the_row_itself_nor_held_out(load, by, monkeypatch):
    """Rows of the same question are never examples of each other, and no row shows one that is held out."""
    fields = {
        "held_out": 3,
        "max_prompt_tokens": 400,
        "prompting": {"examples": {"number": 3, "by": by}, "forms": TWO_FORMS},
    }
    task = load(TWICE, **fields)
    assert len(task.train) >= 18 and shown_leaks(task) == []
    others = ExamplePool._others
    monkeypatch.setattr(ExamplePool, "_others", lambda pool, row: (others(pool, row)[0], None))
    assert shown_leaks(load(TWICE, **fields))


def test_no_example_has_a_prompt_that_is_held_out_elsewhere(load, tmp_path, monkeypatch):
    """Held-out rows of another file, of which training has some too."""
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums(8)))
    where = {"held_out": 0, "held_out_path": str(tmp_path / "test.jsonl")}
    task = load(sums(20), **where, prompting={"examples": {"number": 3}})
    assert len(task.train) == 20 and shown_leaks(task) == []
    made = ExamplePool.__init__
    monkeypatch.setattr(ExamplePool, "__init__", lambda pool, cfg, train, held_out: made(pool, cfg, train, ()))
    assert shown_leaks(load(sums(20), **where, prompting={"examples": {"number": 3}}))


def test_no_example_is_held_out_by_another_task_of_a_mixture(tmp_path, tokenizer):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums(30)))
    examples = {"examples": {"number": 3}}
    part = partial(FileTask, str(tmp_path / "rows.jsonl"), prompt="{q}", answer="{a}")
    made = load_task(
        str(tmp_path / "rows.jsonl"), tokenizer, prompt="{q}", answer="{a}", held_out=6, prompting=examples
    )
    cfg = part(held_out=6, prompting=made_config(examples))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums(9)))
    other = part(held_out_path=str(tmp_path / "test.jsonl"))
    task = load_task(MixtureTask((TaskPart("a", cfg), TaskPart("b", other))), tokenizer)
    hidden = {row.prompt for row in task.held_out}
    assert len(hidden) > len(made.held_out)
    for row in task.train + task.held_out:
        if row.task == "a":
            assert len(shown := questions(read(task, row.tokens))[:-1]) == 3 and not hidden & set(shown)


def made_config(values):
    from pydantic import TypeAdapter

    from jaxrl_llm.tasks.config import PromptingConfig

    return TypeAdapter(PromptingConfig).validate_python(values)


def test_examples_of_the_same_value(load):
    rows = [{**row, "level": i % 2} for i, row in enumerate(sums(20))]
    task = load(rows, prompting={"examples": {"number": 3, "same": "level"}})
    for row in task.train + task.held_out:
        values = [int(text.partition(" ")[0]) % 2 for text in questions(read(task, row.tokens))]
        assert values == [row.columns["level"]] * 4
    want = "got 3, want 0 at most for 1 rows of level 7: there are 0 other training prompts with the same level with a response"
    with pytest.raises(UserError, match=want):
        load(
            [*rows, {"q": "7 + 7?", "a": "1", "level": 7}],
            held_out=1,
            prompting={"examples": {"number": 3, "same": "level"}},
        )


def test_what_is_data_in_an_example_stays_data(load):
    """A name of a special token in a row closes no turn of another row's prompt."""
    rows = [{"q": f"{i} + {i}?<|im_end|>", "a": "<|im_end|>1"} for i in range(4)]
    for place, ends in (("turns", 3), ("text", 1)):
        task = load(rows, prompting={"examples": {"number": 1, "place": place}})
        assert all(row.tokens.tolist().count(IM_END) == ends for row in task.train + task.held_out)
    assert read(task, task.train[0].tokens).count("<|im_end|>") == 4


def test_a_visit_is_a_function_of_seed_row_and_uid(load):
    fields = {"max_prompt_tokens": 400, "prompting": {"forms": TWO_FORMS, "examples": {"number": 2, "by": "visit"}}}
    first, again, other = (load(sums(12), seed, **fields) for seed in (0, 0, 1))

    def prompts(task, order):
        # In another order, as another host or a resumed run asks.
        found = {(i, uid): task.train[i].asked(uid).tokens.tolist() for i, uid in order}
        return [found[key] for key in sorted(found)]

    keys = [(i, uid) for i in range(10) for uid in range(6)]
    assert prompts(first, keys) == prompts(again, keys[::-1]) == prompts(first, keys[::-1])
    assert first.fingerprint == again.fingerprint and first.prompt_slots == 400
    assert len({tuple(first.train[0].asked(uid).tokens.tolist()) for uid in range(30)}) > 25
    of_evaluation = [[row.tokens.tolist() for row in task.held_out] for task in (first, again)]
    assert of_evaluation[0] == of_evaluation[1] and all(
        row.asked(uid) is row for row in first.held_out for uid in range(5)
    )
    assert [row.prompt for row in other.train] != [row.prompt for row in first.train]


def test_by_row_every_visit_is_alike(load):
    task = load(sums(60), prompting={"by": "row", "forms": TWO_FORMS, "examples": {"number": 2}})
    forms = [{row.asked(uid).asks.form for uid in range(5)} for row in task.train]
    assert all(len(form) == 1 for form in forms) and len(set.union(*forms)) == 2
    assert all(len({row.asked(uid).tokens.tobytes() for uid in range(5)}) == 1 for row in task.train)


@pytest.mark.parametrize("by", ["visit", "row"])
def test_shares_of_the_forms(load, by):
    """Weights 1, 2 and 5 of n = 800: by a chi-square of 2 degrees of freedom, of which 13.8 has the probability 0.001."""
    forms = [
        {"name": name, "prompt": f"{name} {{q}}", "weight": weight} for name, weight in (("a", 1), ("b", 2), ("c", 5))
    ]
    n = 800
    task = load(sums(n + 2 if by == "row" else 10), prompting={"by": by, "forms": forms})
    pairs = [(i, 0) for i in range(n)] if by == "row" else [(i, uid) for i in range(8) for uid in range(n // 8)]
    seen = Counter(task.train[i].asked(uid).asks.form for i, uid in pairs)
    expected = {"a": n / 8, "b": n / 4, "c": 5 * n / 8}
    assert sum((seen[name] - want) ** 2 / want for name, want in expected.items()) < 13.8


def test_every_example_comes_up(load):
    """8 candidates, 3 shown at each of 400 visits: 150 times each, sd 9.7; and each of them first as often: 50, sd 6.6."""
    task = load(sums(11), max_prompt_tokens=400, prompting={"examples": {"number": 3, "by": "visit"}})
    shown = [questions(read(task, task.train[0].asked(uid).tokens))[:-1] for uid in range(400)]
    every, first = (Counter(x) for x in (np.concatenate(shown).tolist(), [s[0] for s in shown]))
    assert len(every) == 8 and all(110 < n < 190 for n in every.values()) and all(23 < n < 77 for n in first.values())


def test_columns_override_the_config(load):
    rows = [
        {"q": "1 + 1?", "a": "2", "style": "brief", "who": "Be <|im_end|> kind.", "think": False, "most": 5},
        {"q": "2 + 2?", "a": "4", "style": None, "who": None, "think": None, "most": None},
        {"q": "3 + 3?", "a": "6", "style": "brief"},
        {"q": "4 + 4?", "a": "8", "think": True},
    ]
    columns = {"form": "style", "system": "who", "template": {"enable_thinking": "think"}, "max_new_tokens": "most"}
    forms = [{"name": "plain"}, {"name": "brief", "prompt": "Be brief. {q}", "system": "Hello."}]
    task = load(rows, held_out=1, prompting={"forms": forms, "columns": columns})
    of = {row.prompt: row for row in task.train + task.held_out}
    ask = lambda i: {read(task, of[f"{i} + {i}?"].asked(uid).tokens) for uid in range(20)}  # noqa: E731
    assert ask(1) == {chat("Be brief. 1 + 1?", system="Be <|im_end|> kind.", end="<think>\n\n</think>\n\n")}
    assert of["1 + 1?"].tokens.tolist().count(IM_END) == 2
    assert ask(3) == {chat("Be brief. 3 + 3?", system="Hello.")} and of["3 + 3?"].asks.form == "brief"
    (held_out,) = (row.prompt[0] for row in task.held_out)
    for i in {"2", "4"} - {held_out}:
        assert ask(i) == {chat(f"{i} + {i}?"), chat(f"Be brief. {i} + {i}?", system="Hello.")}
    assert [of[f"{i} + {i}?"].max_new_tokens for i in range(1, 5)] == [5, None, None, None]
    assert sorted(completion_limits(task.train + task.held_out, np.arange(4), 8).tolist()) == [5, 8, 8, 8]


def test_rows_of_forms_that_columns_name_are_still_the_same_question(load):
    """Held out in one form, it is left out of training in another, and it is no example."""
    rows = [{**row, "style": style} for style in ("plain", "brief") for row in sums(10)]
    task = load(
        rows, held_out=4, prompting={"forms": TWO_FORMS, "columns": {"form": "style"}, "examples": {"number": 3}}
    )
    assert not {row.prompt for row in task.train} & {row.prompt for row in task.held_out} and shown_leaks(task) == []


def test_examples_fill_what_the_limit_leaves(load, caplog):
    """A question of n tokens alone; an example adds as many again and those of its answer."""
    rows = sums(8)
    alone = max(len(row.tokens) for row in load(rows).train)
    for by in ("row", "visit"):
        with caplog.at_level(logging.WARNING):
            task = load(rows, max_prompt_tokens=3 * alone, prompting={"examples": {"number": 5, "by": by}})
        counts = {row.asked(uid).asks.num_examples for row in task.train for uid in range(5)}
        assert counts <= {1, 2} and all(len(row.asked(2).tokens) <= 3 * alone for row in task.train)
        assert "have fewer than 5 examples: more do not fit into task.max_prompt_tokens" in caplog.text
        assert task.prompt_slots == (
            3 * alone if by == "visit" else max(len(r.tokens) for r in task.train + task.held_out)
        )
    assert all(
        row.asks.num_examples == 0
        for row in load(rows, max_prompt_tokens=alone, prompting={"examples": {"number": 2}}).train
    )


def test_a_form_that_is_too_long_counts(load):
    rows = sums(12)
    most = max(len(row.tokens) for row in load(rows).train)
    long = [{"name": "plain"}, {"name": "long", "prompt": "Please say what this is. {q}"}]
    with pytest.raises(
        UserError, match=rf"rows.jsonl:1: got a prompt of \d+ tokens, want task.max_prompt_tokens \({most}\)"
    ):
        load(rows, max_prompt_tokens=most, prompting={"forms": long})


def test_batches_hold_the_forms_of_the_visits(load):
    task = load(sums(10), prompting={"forms": TWO_FORMS})
    index, uid = np.array([3, 3, 3, 3, 0]), np.array([10, 11, 12, 13, 14])
    prompts = make_prompts(task, task.train, index, uid)
    asked = [task.train[i].asked(u) for i, u in zip(index, uid, strict=True)]
    assert prompts.tokens.shape == (5, task.prompt_slots) and len({row.asks.form for row in asked}) == 2
    for p, row in enumerate(asked):
        np.testing.assert_array_equal(prompts.tokens[p, : prompts.length[p]], row.tokens)
    assert [row.text for row in rows_asked(task.train, prompts)] == [row.text for row in asked]
    # As stored by a run of another seed, or typed: known by the tokens.
    for form in (task.train[3].stated, task.train[3].with_prompt(task.train[3].forms[1])):
        other = prompts.replace(tokens=np.tile(form.tokens, (5, 1)), length=np.full(5, len(form.tokens), np.int32))
        assert rows_asked(task.train, other)[0].text == form.text
    stated = make_prompts(task, [row.stated for row in task.train], index, uid)
    assert len({tuple(row) for row in stated.tokens[:4].tolist()}) == 1


def test_a_row_by_its_prompt_is_in_the_form_of_the_evaluation(load):
    task = load(sums(10), prompting={"forms": [{"name": "x", "prompt": "Say {q}"}], "examples": {"number": 1}})
    row = task.row(task.train[2].prompt)
    assert row.asked(5) is row and row.tokens is task.train[2].tokens and row.answer == task.train[2].answer


def test_the_warm_start_learns_from_the_forms(load):
    task = load(sums(10), response="{a}", prompting={"forms": TWO_FORMS})
    rows = noisy_rows(task, lambda position: position % 8, range(32), 0.5, 0)
    assert {row.asks.form for row in rows} == {"plain", "brief"} and all(row.visit is None for row in rows)
    for position, row in enumerate(rows):
        np.testing.assert_array_equal(row.tokens, task.train[position % 8].asked(position).tokens)


def test_the_fingerprint_follows_the_forms(load):
    one, other = (
        load(sums(9), prompting={"forms": [{"name": "x", "prompt": f"{word} {{q}}"}]}) for word in ("Do", "Say")
    )
    assert hash_rows(one.train) != hash_rows(other.train) and hash_rows(one.held_out) == hash_rows(other.held_out)


def test_a_part_of_a_mixture_has_its_own_template_arguments_and_forms(tmp_path):
    tokenizer = PretrainedTokenizer(str(save_tokenizer(tmp_path)), system="Be kind.")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums(9)))
    part = FileTask(str(tmp_path / "rows.jsonl"), held_out=2, prompt="{q}", answer="{a}")
    asked = FileTask(part.path, held_out=2, prompt="{q}!", answer="{a}", prompting=made_config({"forms": TWO_FORMS}))
    parts = TaskPart("quick", part, template={"enable_thinking": False}, max_new_tokens=4), TaskPart("more", asked)
    task = load_task(MixtureTask(parts), tokenizer)
    assert task.forms == ("plain", "brief") and task.prompt_slots == max(
        len(tokens) for row in task.train + task.held_out for tokens in (row.tokens, *(f.tokens for f in row.forms))
    )
    for row in task.train:
        text = read(task, row.asked(1).tokens)
        assert "Be kind." in text and ("<think>" in text) == (row.task == "quick") == (row.visit is None)
        assert row.max_new_tokens == (4 if row.task == "quick" else None) and row.asked(1).columns["task"] == row.task


BAD = [
    ({"forms": [{"name": "x", "prompt": "{qq}"}]}, r"all 5 rows: task.prompting.forms.0.prompt: got no column 'qq', want one of q"),
    ({"forms": [{"name": "x"}, {"name": "x"}]}, r"task.prompting.forms.1.name: got 'x' again, want distinct names"),
    ({"forms": [{"name": "a b"}]}, r"prompting.forms.0.name: .*letters, digits, . _ and -: it is part of metric names"),
    ({"forms": [{"name": "x", "template": {"enable_thinkin": 1}}]},
     r"forms.0.template.enable_thinkin: the chat template has no such argument, perhaps you meant enable_thinking"),
    ({"columns": {"template": {"nope": "q"}}}, r"columns.template.nope: the chat template has no such argument"),
    ({"columns": {"system": "who"}}, r"task.prompting.columns.system: got 'who', want one of the data's columns: q, a"),
    ({"columns": {"form": "q"}}, r"columns.form: got 'q', want it empty, or task.prompting.forms that it chooses from"),
    ({"forms": [{"name": "x"}], "columns": {"form": "q"}}, r"columns.form: got '0 \+ 0\?' in the column q, want one of x"),
    ({"columns": {"max_new_tokens": "a"}}, r"columns.max_new_tokens: got '0' in the column a, want a whole number, 1 or more"),
    ({"examples": {"number": 3}}, r"examples.number: got 3, want 2 at most for 3 rows: there are 2 other training prompts"),
    ({"examples": {"number": 1, "same": "lvl"}}, r"examples.same: got 'lvl', want one of the data's columns: q, a"),
    ({"examples": {"number": 1, "by": "visit"}}, r"examples.by: got visit, want task.max_prompt_tokens above 0 as well"),
    ({"examples": {"number": 1, "text": "{prompt} {q}"}}, r"examples.text: .*\{prompt\} and \{response\}, each once, and no other"),
    ({"examples": {"number": 1, "response": "{b}"}}, r"task.prompting.examples.response: got no column 'b'"),
]  # fmt: skip


@pytest.mark.parametrize(("prompting", "words"), BAD, ids=[words[:40] for _, words in BAD])
def test_mistakes_are_refused_by_name(load, prompting, words):
    with pytest.raises(UserError, match=words):
        load(sums(5), prompting=prompting)


def test_all_mistakes_at_once(load):
    forms = [{"name": "x", "prompt": "{qq}", "template": {"thinkin": 1}}, {"name": "x"}]
    with pytest.raises(UserError) as error:
        load(sums(5), too_long="drop", prompting={"forms": forms, "examples": {"number": 1, "by": "visit"}})
    found = str(error.value)
    assert all(
        word in found
        for word in ("forms.1.name", "forms.0.template.thinkin", "examples.by", "too_long", "no column 'qq'")
    )


def test_rows_without_an_answer_are_no_examples(load):
    rows = [row | ({"a": ""} if i > 4 else {}) for i, row in enumerate(sums(9))]
    read_rows = partial(load, rows, held_out=1, answer="", prompt="{q}")
    with pytest.raises(UserError, match=r"examples.number: got 1, want 0 at most for 9 rows"):
        read_rows(prompting={"examples": {"number": 1}})


def test_a_system_form_for_a_conversation_with_its_own_is_refused(load):
    rows = [
        {"m": [{"role": "system", "content": "x"}, {"role": "user", "content": str(i)}], "a": "1"} for i in range(3)
    ]
    with pytest.raises(UserError, match=r"forms.0.system: got messages with a system turn of their own"):
        load(rows, prompt="{m}", prompting={"forms": [{"name": "x", "system": "y"}]})


def test_forms_need_a_chat_template(load):
    forms = [{"name": "x", "system": "y", "template": {"z": 1}}]
    columns = {"system": "q", "template": {"z": "q"}}
    with pytest.raises(UserError) as error:
        load([{"q": "1", "a": "1"}] * 3, tokenizer=DIGITS, prompting={"forms": forms, "columns": columns})
    for name in ("forms.0.system", "forms.0.template", "columns.system", "columns.template"):
        assert f"task.prompting.{name}: got" in str(error.value)


def test_a_template_that_leaves_a_system_prompt_out_is_refused(load, tmp_path):
    without = CHATML.replace(
        "{%- for message in messages %}", "{%- for message in messages if message.role != 'system' %}"
    )
    tokenizer = load_tokenizer(PretrainedTokenizer(str(save_tokenizer(tmp_path / "t", without))))
    with pytest.raises(UserError, match=r"task.prompting.forms.0: .*leaves the system's turn out"):
        load(sums(5), tokenizer=tokenizer, prompting={"forms": [{"name": "x", "system": "y"}]})


def test_thoughts_that_a_template_takes_from_earlier_turns_are_noticed(load, tmp_path):
    stripped = CHATML.replace("{{ message.content }}", "{{ message.content.split('</think>')[-1] }}")
    tokenizer = load_tokenizer(PretrainedTokenizer(str(save_tokenizer(tmp_path / "t", stripped))))
    fields = {"response": "<think>twice</think>{a}", "tokenizer": tokenizer}
    with pytest.raises(
        UserError, match=r"examples: the chat template writes the response '<think>twice</think>\d+' of an example"
    ):
        load(sums(5), **fields, prompting={"examples": {"number": 1}})
    load(sums(5), **fields, prompting={"examples": {"number": 1, "response": "{a}"}})
    # Also in a form that only visits have.
    other = {"forms": [{"name": "x", "response": "<think></think>{a}"}], "examples": {"number": 1, "response": "{a}"}}
    for by in ("row", "visit"):
        other["examples"]["by"] = by
        with pytest.raises(UserError, match=r"writes the response '<think></think>\d+' of an example otherwise"):
            load(sums(5), **fields, max_prompt_tokens=400, prompting=other)

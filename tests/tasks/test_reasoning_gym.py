"""reasoning-gym rows: correct, reproducible, disjoint, and wrong names answered with the right ones."""

import logging
import sys

import pytest
import reasoning_gym as published

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks import reasoning_gym
from jaxrl_llm.tasks.config import CharacterTokenizer, ReasoningGymTask
from jaxrl_llm.tasks.records import Record
from jaxrl_llm.tasks.task import load_task
from jaxrl_llm.tasks.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(CharacterTokenizer("".join(map(chr, range(32, 127))) + "\n"))
EASY = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def load(name="chain_sum", seed=0, size=40, held_out=10, **fields):
    return load_task(ReasoningGymTask(name, size=size, held_out=held_out, **fields), TOKENIZER, seed)


def error_of(*args, **fields) -> str:
    with pytest.raises(UserError) as error:
        load(*args, **fields)
    return str(error.value)


def test_entries_are_correct_and_usable_by_their_scorer():
    task = load(prompt="{question}\n", response="{answer}")
    assert (len(task.train), len(task.held_out)) == (40, 10)
    for row in task.train + task.held_out:
        assert row.prompt == row.columns["question"] + "\n"
        assert row.answer == row.response == str(eval(row.columns["metadata"]["expression"]))
        scorer = published.create_dataset(row.columns["reasoning_gym"], size=1, seed=0)
        assert scorer.score_answer(row.answer, entry=row.columns) == 1.0
        assert scorer.score_answer("no", entry=row.columns) == 0.0
    assert task.has_targets


def test_equal_seeds_give_equal_entries_and_neighboring_seeds_different_ones():
    """Entry i comes from seed + i: unhashed, seeds 0 and 1 would share all entries but one, and so would both splits."""
    zero, again, one = load(seed=0), load(seed=0), load(seed=1)

    def of(rows):
        return [row.prompt for row in rows]

    assert of(zero.train) == of(again.train) and of(zero.held_out) == of(again.held_out)
    assert len(set(of(zero.train)) & set(of(one.train))) < 4
    assert not set(of(zero.train)) & set(of(zero.held_out))


def test_settings_are_passed_to_the_dataset():
    task = load(config=EASY)
    assert all(row.columns["metadata"]["num_terms"] == 2 for row in task.train)


def test_prompts_that_are_held_out_are_not_trained_on(caplog):
    """Two digits and a sign: 200 different prompts, so 300 entries must include some of the 50 held out."""
    with caplog.at_level(logging.WARNING, "jaxrl_llm.tasks"):
        task = load(config=EASY, size=300, held_out=50)
    assert not {row.prompt for row in task.train} & {row.prompt for row in task.held_out}
    assert task.repeated == 300 - len(task.train) > 0
    assert [r.getMessage() for r in caplog.records] == [
        f"task: {task.repeated} rows were left out of training: their prompt is held out"
    ]


def test_long_prompts_are_dropped():
    whole = load(size=60)
    most = sorted(len(row.tokens) for row in whole.train)[30]
    task = load(size=60, max_prompt_tokens=most, too_long="drop")
    assert task.prompt_slots == most and 0 < task.dropped == 70 - len(task.train) - len(task.held_out)


def test_an_entry_without_answer_is_left_to_its_scorer(monkeypatch):
    entries = [Record("x[0]", {"question": "Any even number?", "answer": None, "reasoning_gym": "x"})]
    monkeypatch.setattr(
        reasoning_gym,
        "generate",
        lambda cfg, size, seed: entries if seed[1] else [Record("x[1]", {"question": "2+2", "answer": 4})],
    )
    task = load()
    assert (task.held_out[0].answer, task.train[0].answer) == ("", "4")
    assert task.held_out[0].columns["answer"] is None
    assert "task.response: got nothing (null)" in error_of(response="{answer}")


def test_a_wrong_name():
    assert error_of("chain_summ").startswith(
        "task.name: got 'chain_summ', which reasoning-gym does not have, want e.g. chain_sum"
    )
    assert "basic_arithmetic" in error_of("zzzzzz")


def test_wrong_settings():
    assert error_of(config={"max_trms": 3, "size": 5, "seed": 1}).splitlines() == [
        "task.config.max_trms: chain_sum has no such setting, perhaps you meant max_terms",
        "task.config.size: got it in config, want task.size and the run's seed instead",
        "task.config.seed: got it in config, want task.size and the run's seed instead",
    ]
    assert error_of(config={"min_terms": 5, "max_terms": 2}) == (
        "task.config: chain_sum refuses {'min_terms': 5, 'max_terms': 2}: AssertionError: max_terms must be >= min_terms"
    )
    assert "TypeError" in error_of(config={"min_terms": "two"})


def test_a_missing_column_is_reported_once():
    assert error_of(prompt="{problem}").startswith(
        "all 40 rows: task.prompt: got no column 'problem', want one of question, answer, metadata, reasoning_gym, "
        "reasoning_gym_config"
    )


def test_the_message_of_a_missing_extra_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    assert error_of() == "task.kind: reasoning_gym needs reasoning-gym: pip install 'jaxrl-llm[tasks]'"

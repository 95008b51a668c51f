"""The endless stream: an order that is a function of seed and place alone, each row once an epoch, on any number of hosts."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_setup import save_tokenizer

from jaxrl_llm.tasks.config import ArithmeticTask, CharacterTokenizer, FileTask, PretrainedTokenizer
from jaxrl_llm.tasks.stream import make_order, make_prompts
from jaxrl_llm.tasks.task import load_task
from jaxrl_llm.tasks.tokenizer import load_tokenizer
from jaxrl_llm.types import check

ROWS = 20
TASK = load_task(ArithmeticTask(terms=2, held_out=100 - ROWS), load_tokenizer(CharacterTokenizer()), seed=0)


def epochs(seed: int, number: int = 3) -> list[list[int]]:
    order = make_order(ROWS, seed)
    return [[order(e * ROWS + i) for i in range(ROWS)] for e in range(number)]


def test_every_row_comes_once_an_epoch_in_a_new_order():
    found = epochs(0)
    assert all(sorted(epoch) == list(range(ROWS)) for epoch in found)
    assert len({tuple(epoch) for epoch in found}) == 3 and list(range(ROWS)) not in found


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**31 - 1), st.integers(0, 1000))
def test_every_epoch_of_every_length_is_a_permutation(rows, seed, epoch):
    order = make_order(rows, seed)
    assert sorted(order(epoch * rows + i) for i in range(rows)) == list(range(rows))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**31 - 1), st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 8))
def test_a_place_holds_the_same_row_on_every_number_of_hosts(rows, seed, cursor, batches, hosts):
    """Each host builds the order itself and reads its own share, at its own speed, of what one host reads in order."""
    one = make_order(rows, seed)
    places = range(cursor, cursor + batches * hosts)
    shares = [[make_order(rows, seed)(place) for place in reversed(places[host::hosts])][::-1] for host in range(hosts)]
    together = [shares[i % hosts][i // hosts] for i in range(len(places))]
    assert together == [one(place) for place in places]


def test_the_order_is_a_function_of_the_seed():
    assert epochs(7) == epochs(7) != epochs(8)


def test_a_single_row_repeats():
    assert [make_order(1, 0)(i) for i in range(4)] == [0] * 4


def test_make_prompts_takes_rows_of_any_part():
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


def test_chat_prompts_are_padded_behind_with_a_token_that_length_hides(ragged):
    rows = ragged.train + ragged.held_out
    prompts = check(make_prompts(ragged, rows, np.arange(3), np.arange(3)))
    assert prompts.tokens.shape == (3, max(len(row.tokens) for row in rows))
    assert len(set(prompts.length.tolist())) == 3
    for row, tokens, length in zip(rows, prompts.tokens, prompts.length, strict=True):
        assert tokens[:length].tolist() == ragged.tokenizer.prompt(row.prompt)
        assert (tokens[length:] == ragged.eos[0]).all()

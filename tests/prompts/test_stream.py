"""The endless stream: an order that is a function of seed and place alone, each row once an epoch."""

import numpy as np

from jaxrl_llm.prompts.config import ArithmeticTask
from jaxrl_llm.prompts.stream import make_order, make_prompts, next_prompts
from jaxrl_llm.prompts.task import load_task
from jaxrl_llm.types import check

ROWS = 20
TASK = load_task(ArithmeticTask(terms=2, held_out=100 - ROWS), seed=0)


def epochs(seed: int, number: int = 3) -> list[list[int]]:
    order = make_order(ROWS, seed)
    return [[order(e * ROWS + i) for i in range(ROWS)] for e in range(number)]


def test_every_row_comes_once_an_epoch_in_a_new_order():
    found = epochs(0)
    assert all(sorted(epoch) == list(range(ROWS)) for epoch in found)
    assert len({tuple(epoch) for epoch in found}) == 3 and list(range(ROWS)) not in found


def test_the_order_is_a_function_of_the_seed():
    assert epochs(7) == epochs(7) != epochs(8)


def test_a_place_does_not_depend_on_what_was_read_before():
    order, backwards = make_order(ROWS, 3), make_order(ROWS, 3)
    ahead = [order(i) for i in range(50)]
    assert [backwards(i) for i in reversed(range(50))][::-1] == ahead


def test_a_single_row_repeats():
    assert [make_order(1, 0)(i) for i in range(4)] == [0] * 4


def test_next_prompts_by_hand():
    order = make_order(ROWS, 1)
    prompts, cursor = next_prompts(TASK, order, 16, 8)  # over the end of the first epoch
    check(prompts)
    assert cursor == 24
    np.testing.assert_array_equal(prompts.uid, np.arange(16, 24))
    np.testing.assert_array_equal(prompts.row, [order(i) for i in range(16, 24)])
    texts = TASK.decode(prompts.tokens, prompts.length)
    assert texts == [TASK.train[order(i)].prompt for i in range(16, 24)]
    assert prompts.tokens.shape == (8, TASK.prompt_slots)


def test_going_on_from_the_cursor_equals_never_having_stopped():
    order, cursor, steady = make_order(ROWS, 1), 0, []
    for _ in range(7):
        prompts, cursor = next_prompts(TASK, order, cursor, 6)
        steady.append(prompts)
    again, cursor = next_prompts(TASK, make_order(ROWS, 1), 4 * 6, 6)
    for name in ("tokens", "length", "uid", "row"):
        np.testing.assert_array_equal(getattr(again, name), getattr(steady[4], name))
    assert cursor == 5 * 6
    uids = np.concatenate([p.uid for p in steady])
    assert len(set(uids)) == len(uids)


def test_make_prompts_takes_rows_of_any_part():
    prompts = check(make_prompts(TASK, TASK.held_out, np.array([2, 0, 2]), np.array([5, 6, 7])))
    assert TASK.decode(prompts.tokens, prompts.length) == [TASK.held_out[i].prompt for i in (2, 0, 2)]
    np.testing.assert_array_equal(prompts.uid, [5, 6, 7])

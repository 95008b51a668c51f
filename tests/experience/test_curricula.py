"""Curricula: the rows in the order of the stream, and resuming from the state."""

import numpy as np

from jaxrl_llm.experience.curriculum import in_order
from jaxrl_llm.tasks.stream import make_order

ROWS = 20
RNG = np.random.default_rng(0)


def test_rows_come_in_order_over_the_end_of_an_epoch():
    order = make_order(ROWS, 1)
    curriculum = in_order(order)
    place, rows = curriculum.choose(np.array(16), RNG, 8)
    assert place == 24
    np.testing.assert_array_equal(rows, [order(i) for i in range(16, 24)])


def test_by_hand():
    curriculum = in_order(lambda place: [3, 1, 4][place % 3])
    state, found = curriculum.init(3), []
    for num in (2, 1, 4):
        state, rows = curriculum.choose(state, RNG, num)
        found.append(rows.tolist())
        assert curriculum.observe(state, None) is state, "what came of them changes nothing"
    assert found == [[3, 1], [4], [3, 1, 4, 3]] and state == 7


def test_going_on_from_the_place_equals_never_having_stopped():
    curriculum, expected = in_order(make_order(ROWS, 1)), []
    place = curriculum.init(ROWS)
    for _ in range(7):
        place, rows = curriculum.choose(place, RNG, 6)
        expected.append(rows)
    place, again = in_order(make_order(ROWS, 1)).choose(np.array(4 * 6), np.random.default_rng(1), 6)
    np.testing.assert_array_equal(again, expected[4])
    assert place == 5 * 6

"""Curricula: the rows in the order of the stream, and resuming from the state."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.experience.curricula import Uniform, VisitCount, counted, in_order, make_order, mixed_order

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


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.sampled_from([0.1, 0.5, 1.0, 3.0])), min_size=1, max_size=4), st.data())
def test_a_mixture_has_its_weights_at_every_position_and_its_tasks_their_own_epochs(tasks, data):
    """Counts of n positions are n * share, to within k for the k-th task; each task in epochs in which every row comes once."""
    sizes, weights = zip(*tasks, strict=True)
    order, first = mixed_order(sizes, weights, data.draw(st.integers(0, 3))), np.cumsum([0, *sizes])
    rows = np.array([order(i) for i in range(150)])
    task = np.searchsorted(first, rows, side="right") - 1
    share = np.array(weights) / sum(weights)
    for k in range(len(sizes)):
        counts = np.cumsum(task == k)
        assert np.abs(counts - share[k] * np.arange(1, 151)).max() < k + 1
        mine = rows[task == k] - first[k]
        for start in range(0, len(mine) - sizes[k] + 1, sizes[k]):
            assert sorted(mine[start : start + sizes[k]]) == list(range(sizes[k]))


def test_a_mixture_by_hand():
    """Shares 1/4, and of the other three quarters 1/3 and 2/3: positions 3 mod 4 are the first task's."""
    order = mixed_order([100, 100, 100], [1, 1, 2], 0)
    assert [order(i) // 100 for i in range(8)] == [2, 2, 1, 0, 2, 2, 1, 0]
    assert [[order(i) for i in range(300) if order(i) < 100], [order(i) - 100 for i in range(300) if order(i) // 100 == 1]] == [
        [make_order(100, 0)(i) for i in range(75)], [order(4 * i + 2) - 100 for i in range(75)],
    ]  # fmt: skip
    tenths = mixed_order([5, 5], [0.7, 0.3], 0)
    assert {sum(tenths(10 * n + i) < 5 for i in range(10)) for n in range(9)} == {7}
    same = [order(4 * i + 3) == order(4 * i + 2) - 100 for i in range(75)]
    assert sum(same) < 10, "tasks of equal size have orders of their own"


def test_a_mixture_of_one_task_is_the_task():
    order, alone = mixed_order([ROWS], [0.3], 5), make_order(ROWS, 5)
    assert [order(i) for i in range(3 * ROWS)] == [alone(i) for i in range(3 * ROWS)]


def epochs(seed: int, number: int = 3) -> list[list[int]]:
    order = make_order(ROWS, seed)
    return [[order(e * ROWS + i) for i in range(ROWS)] for e in range(number)]


def test_every_row_comes_once_per_epoch_in_a_new_order():
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
def test_a_position_has_the_same_row_on_any_number_of_hosts(rows, seed, cursor, batches, hosts):
    """Each host builds the order itself and reads its own share of what one host reads in order."""
    one = make_order(rows, seed)
    positions = range(cursor, cursor + batches * hosts)
    shares = [
        [make_order(rows, seed)(position) for position in reversed(positions[host::hosts])][::-1]
        for host in range(hosts)
    ]
    together = [shares[i % hosts][i // hosts] for i in range(len(positions))]
    assert together == [one(position) for position in positions]


def test_the_order_is_a_function_of_the_seed():
    assert epochs(7) == epochs(7) != epochs(8)


def test_a_single_row_repeats():
    assert [make_order(1, 0)(i) for i in range(4)] == [0] * 4


def test_uniform_takes_the_order_of_its_seed_and_counts_visits():
    order, curriculum = make_order(ROWS, 3), Uniform(seed=3)
    state, found = curriculum.init(ROWS), []
    for n in (8, 16):
        state, rows = curriculum.choose(state, RNG, n)
        found += rows.tolist()
    assert found == [order(place) for place in range(24)] and state == (24, ROWS)
    assert curriculum.observe(state, None) is state


class Backwards:
    """Rows from the last to the first; its state is the next one."""

    def init(self, num_rows):
        return {"next": np.array(num_rows - 1)}

    def choose(self, state, rng, n):
        return {"next": state["next"] - n}, state["next"] - np.arange(n)

    def observe(self, state, groups):
        return {"next": state["next"] + groups}


def test_counting_leaves_what_chooses_as_it_is():
    """By hand: rows 9, 8, 7, then, after 5 were given back, 11."""
    curriculum = counted(Backwards())
    state = curriculum.init(10)
    state, rows = curriculum.choose(state, RNG, 3)
    assert rows.tolist() == [9, 8, 7] and state == VisitCount(3, {"next": 6})
    state = curriculum.observe(state, 5)
    assert state == VisitCount(3, {"next": 11})
    assert curriculum.choose(state, RNG, 1)[0].visits == 4

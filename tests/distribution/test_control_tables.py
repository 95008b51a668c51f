"""Control tables: masks equal a plain reading of the automata, and what a row allows always lets it end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.control.automaton import MAX_DISTANCE, REFUSED, token_automaton
from jaxrl_llm.distribution.control_tables import (
    MOST_ROOM,
    allowed_tokens,
    blank_tables,
    encode,
    join_automata,
    state_of,
)

NUM_TOKENS, V, ENDS = 70, 75, (3, 69)


def random_automaton(rng: np.random.Generator, states: int, kinds: int):
    """The classes of the tokens, of which the last is that of end tokens; state 0 is the end."""
    classes = rng.integers(0, kinds, NUM_TOKENS)
    classes[list(ENDS)] = kinds
    following = np.where(rng.random((states, kinds + 1)) < 0.4, REFUSED, rng.integers(0, states, (states, kinds + 1)))
    return token_automaton(classes, following, rng.integers(0, 5, states), states - 1, np.arange(states) == 0)


def allowed_by_hand(automaton, state: int, room: int, ends_masked: bool) -> np.ndarray:
    """Token by token, as the docstring of `allowed_tokens` says it."""
    found = np.zeros(V, bool)
    for token in range(NUM_TOKENS):
        to = automaton.next[state, automaton.classes[token]]
        found[token] = to != REFUSED and automaton.distance[to] <= room - 1
    without = found & ~np.isin(np.arange(V), ENDS)
    return without if ends_masked and without.any() else found


@pytest.mark.parametrize("kinds", [(5,), (40, 3), (2, 100, 31)], ids=str)
def test_masks_equal_a_plain_reading(kinds):
    """One, several, and more than 32 classes; ids beyond the tokenizer's are never allowed, in the free state all others are."""
    rng = np.random.default_rng(len(kinds))
    automata = [random_automaton(rng, 4 + i, k) for i, k in enumerate(kinds)]
    tables, starts = join_automata(automata, NUM_TOKENS, ENDS, V)
    assert tables.classes.dtype == np.uint8 and len(tables.classes) == len(kinds)
    cases = [
        (i, state, room, ends_masked)
        for i, a in enumerate(automata)
        for state in range(len(a.next))
        for room in (1, 2, 4, MOST_ROOM - 1, MOST_ROOM, 10**6)
        for ends_masked in (False, True)
    ]
    first = [start - a.start for start, a in zip(starts, automata, strict=True)]
    state = np.array([first[i] + state for i, state, _, _ in cases], np.int32)
    room, ends_masked = (
        np.array(x) for x in zip(*((room, ends_masked) for *_, room, ends_masked in cases), strict=True)
    )
    code = encode(state, room.astype(np.int32), ends_masked)
    assert code.dtype == np.int32 and (code >= 0).all()
    np.testing.assert_array_equal(state_of(code), state)
    got = np.asarray(jax.jit(lambda code: allowed_tokens(jax.tree.map(jnp.asarray, tables), code).mask)(code))
    want = np.array([allowed_by_hand(automata[i], state, room, ends_masked) for i, state, room, ends_masked in cases])
    np.testing.assert_array_equal(got, want)
    assert 0.1 < want.mean() < 0.9
    free = np.asarray(allowed_tokens(jax.tree.map(jnp.asarray, tables), jnp.zeros(1, jnp.int32)).mask)[0]
    np.testing.assert_array_equal(free, np.arange(V) < NUM_TOKENS)


def test_the_state_behind_a_token():
    rng = np.random.default_rng(0)
    automata = [random_automaton(rng, 4, 5), random_automaton(rng, 3, 9)]
    tables, starts = join_automata(automata, NUM_TOKENS, ENDS, V)
    for a, start in zip(automata, starts, strict=True):
        first = start - a.start
        for state in range(len(a.next)):
            got = tables.after(np.full(NUM_TOKENS, first + state), np.arange(NUM_TOKENS))
            want = a.next[state, a.classes]
            np.testing.assert_array_equal(got, np.where(want == REFUSED, REFUSED, want + first))
            assert tables.ends[first + state] == (state == 0)


def test_more_controls_keep_the_states_of_earlier_ones():
    """Otherwise a row that decodes would be in another state when a request with a new control joins."""
    rng = np.random.default_rng(0)
    automata = [random_automaton(rng, 4, 5), random_automaton(rng, 3, 90)]
    few, starts = join_automata(automata[:1], NUM_TOKENS, ENDS, V)
    more, all_starts = join_automata(automata, NUM_TOKENS, ENDS, V)
    assert starts == all_starts[:1]
    states, tokens = np.arange(5)[:, None], np.arange(NUM_TOKENS)
    np.testing.assert_array_equal(few.after(states, tokens), more.after(states, tokens))


def test_sizes_are_rounded_up():
    """So that another grammar of about the same size fits the same program."""
    rng = np.random.default_rng(0)
    sizes = {join_automata([random_automaton(rng, n, 20)], NUM_TOKENS, ENDS, V)[0].sizes for n in (900, 930, 1000)}
    assert sizes == {(1, 1024, 32)}
    assert join_automata([], NUM_TOKENS, ENDS, V)[0].sizes == (1, 8, 32)


def test_the_largest_distance_has_room():
    """A state at the largest distance may be entered with exactly the room it needs, and not with less."""
    one = token_automaton(
        np.zeros(NUM_TOKENS, int), np.zeros((1, 1), int), np.array([MAX_DISTANCE]), 0, np.zeros(1, bool)
    )
    tables = jax.tree.map(jnp.asarray, join_automata([one], NUM_TOKENS, (), V)[0])
    room = jnp.array([MAX_DISTANCE, MAX_DISTANCE + 1, MOST_ROOM, 10**9], jnp.int32)
    allowed = allowed_tokens(tables, encode(jnp.ones(4, jnp.int32), room, jnp.zeros(4, bool))).mask[:, 0]
    np.testing.assert_array_equal(allowed, [False, True, True, True])


def test_classes_beyond_a_byte_take_two():
    assert blank_tables((1, 8, 256), V).classes.dtype == np.uint8
    assert blank_tables((1, 8, 288), V).classes.dtype == np.uint16

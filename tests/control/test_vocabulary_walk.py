"""Automata over tokens, from automata over bytes: by hand, and against a walk of one token at a time."""

from collections.abc import Sequence

import numpy as np
import pytest

from jaxrl_llm.control.automaton import REFUSED, TokenTexts
from jaxrl_llm.control.byte_automaton import DEAD, ByteAutomaton
from jaxrl_llm.control.minimization import merge_equivalent
from jaxrl_llm.control.vocabulary_walk import over_tokens
from jaxrl_llm.errors import UserError


def automaton(states: int, edges: str, accepts: Sequence[int], free: Sequence[int] = ()) -> ByteAutomaton:
    """`edges`: "0a1 1b2": byte a leads from state 0 to state 1, and so on."""
    next = np.full((states, 256), DEAD, np.int32)
    for edge in edges.split():
        next[int(edge[0]), ord(edge[1])] = int(edge[2])
    return ByteAutomaton(next, np.isin(np.arange(states), accepts), np.isin(np.arange(states), free))


def vocabulary(texts: Sequence[bytes | None], ends: Sequence[int]) -> TokenTexts:
    return TokenTexts(texts, tuple(ends), lambda text: [], "")


def by_token(found, token: int) -> list[int]:
    """State behind a token in each state."""
    return found.automaton.next[:, found.automaton.classes[token]].tolist()


# a b* c, where state 3 is a dead end behind d.
ABC = automaton(4, "0a1 1b1 1c2 1d3", accepts=[2])


def test_tokens_of_several_bytes_and_an_end_token_without_text():
    tokens = [b"a", b"b", b"bb", b"c", b"abbc", b"ba", b"d", b"", None, None]
    found = over_tokens(ABC, vocabulary(tokens, [9]))
    # States: 0 at the start, 1 behind a, 2 behind c, 3 behind the end token. The dead end is gone, and no token leads into it.
    assert found.state_of.tolist() == [0, 1, 2, -1]
    assert (found.automaton.start, found.automaton.ends.tolist()) == (0, [False, False, False, True])
    assert found.automaton.distance.tolist() == [2, 2, 1, 0]  # abbc end; c end; end
    assert by_token(found, 0) == [1, -1, -1, -1]
    assert by_token(found, 1) == by_token(found, 2) == [-1, 1, -1, -1]
    assert by_token(found, 3) == [-1, 2, -1, -1]
    assert by_token(found, 4) == [2, -1, -1, -1]
    assert by_token(found, 9) == [-1, -1, 3, -1]
    # "ba", the dead end, the empty text, and no text.
    assert all(by_token(found, token) == [-1] * 4 for token in (5, 6, 7, 8))
    # a, b and bb, c, abbc, the end, all that is refused.
    assert found.automaton.next.shape == (4, 6)
    assert len(set(found.automaton.classes[[1, 2]])) == len(set(found.automaton.classes[[5, 6, 7, 8]])) == 1
    assert found.automaton.forced.tolist() == [-1] * 4 and found.automaton.expires.tolist() == [0, 1, 2, 3]


def test_an_end_token_with_a_text_counts_as_that_text():
    found = over_tokens(ABC, vocabulary([b"a", b"b", b"c"], [2]))
    # State 2 is never reached by a token: c is the end token.
    assert found.state_of.tolist() == [0, 1, -1, -1]
    assert by_token(found, 2) == [-1, 2, -1]
    assert found.automaton.distance.tolist() == [2, 1, 0]


def test_end_tokens_share_no_class_with_other_tokens():
    # Both lead nowhere: the texts never end with b, and a token without text is refused.
    found = over_tokens(ABC, vocabulary([b"a", b"b", b"c", None, None, b"b"], [4, 5]))
    assert by_token(found, 3) == by_token(found, 5) == [-1] * 4
    assert len({found.automaton.classes[token] for token in (3, 4, 5)}) == 3
    both = over_tokens(ABC, vocabulary([b"a", b"b", b"c", None, None], [3, 4]))
    assert both.automaton.classes[3] == both.automaton.classes[4]


def test_in_a_free_state_tokens_without_a_text_are_allowed_and_the_limit_may_end_the_row():
    # Anything but xx; x behind x is refused.
    free = automaton(2, "0a0 0x1 1a0", accepts=[0], free=[0, 1])
    found = over_tokens(free, vocabulary([b"a", b"x", b"xax", None, b"", None], [5]))
    assert found.automaton.distance.tolist() == [0, 0, 0]
    assert by_token(found, 2) == [1, -1, -1]
    assert by_token(found, 3) == by_token(found, 4) == [0, 1, -1]
    assert by_token(found, 5) == [2, -1, -1]  # state 1 is free, but it does not accept


def test_states_with_the_same_future_are_merged_unless_they_are_kept():
    # ac or bc, with a state per first letter; state 4 is not reached at all.
    twins = automaton(5, "0a1 0b2 1c3 2c3 4c3", accepts=[3])
    tokens = vocabulary([b"a", b"b", b"c", None], [3])
    found = over_tokens(twins, tokens)
    assert found.state_of[1] == found.state_of[2] == found.state_of[4] and len(found.automaton.next) == 4
    kept = over_tokens(twins, tokens, kept=[2, 4])
    # Start, behind a, behind b, 4, behind c, behind the end.
    assert len(set(kept.state_of.tolist())) == 5 and len(kept.automaton.next) == 6
    assert by_token(kept, 2)[kept.state_of[4]] == kept.state_of[3]


def test_a_space_that_decoding_drops_is_one_more_text_at_the_beginning():
    tokens = vocabulary([b" ", b"a", b" a", b"  a", b"c", b" c", None], [6])._replace(drops_space=True)
    found = over_tokens(ABC, tokens)
    behind_a, start = int(found.state_of[1]), found.automaton.start
    assert [by_token(found, token)[start] == behind_a for token in range(6)] == [False, True, True, False, False, False]
    # Behind the space, only the text itself.
    assert found.automaton.next[by_token(found, 0)[start], found.automaton.classes[2]] == REFUSED
    assert by_token(found, 5)[behind_a] == REFUSED
    # Texts that may begin with any number of spaces: that is nothing new.
    spaced = automaton(3, "0a1 1c2", accepts=[2])
    spaced.next[0, ord(" ")] = 0
    assert over_tokens(spaced, tokens).automaton.start == over_tokens(spaced, tokens).state_of[0]


def test_a_kept_state_without_a_way_to_an_end_is_removed():
    assert over_tokens(ABC, vocabulary([b"a", b"c", None], [2]), kept=[3]).state_of[3] == -1


def test_counted_repeats_are_split_into_their_states_and_equal_tails_are_merged():
    # a{0,300}: all states accept, and differ by what is left. Then a copy of it.
    half = 301
    next = np.full((2 * half, 256), DEAD, np.int32)
    next[np.arange(half - 1), ord("a")] = np.arange(1, half)
    next[half + np.arange(half - 1), ord("a")] = half + np.arange(1, half)
    small, number = merge_equivalent(ByteAutomaton(next, np.ones(2 * half, bool), np.zeros(2 * half, bool)))
    assert len(small.next) == half
    assert (number[:half] == number[half:]).all() and len(set(number.tolist())) == half


def accepted(automaton: ByteAutomaton, state: int, text: bytes) -> int:
    for byte in text:
        state = automaton.next[state, byte] if state != DEAD else DEAD
    return int(state)


@pytest.mark.parametrize("seed", range(30))
def test_random_automata_against_a_walk_of_one_token_at_a_time(seed):
    rng = np.random.default_rng(seed)
    states = int(rng.integers(2, 12))
    next = np.full((states, 256), DEAD, np.int32)
    next[:, [97, 98, 99]] = rng.integers(-2, states, (states, 3)).clip(DEAD)
    given = ByteAutomaton(next, rng.random(states) < 0.3, rng.random(states) < 0.1)
    tokens = [bytes(rng.integers(97, 100, rng.integers(1, 5)).tolist()) for _ in range(40)]
    words = vocabulary([*tokens, None, b"", None, b"a"], [42, 43])
    try:
        found = over_tokens(given, words)
    except UserError:
        found = None
    # Walked by hand: where each token leads, then the states that can reach an end, again and again.
    ends, table = states, {}
    for state in range(states):
        for id, text in enumerate(words.texts):
            behind = accepted(given, state, text) if text else state if given.free[state] else DEAD
            if id == 42:
                behind = ends if given.accepts[state] else DEAD
            elif id == 43:
                behind = ends if behind != DEAD and given.accepts[behind] else DEAD
            if behind != DEAD:
                table[state, id] = behind
    distance = {ends: 0} | {state: 0 for state in range(states) if given.free[state]}
    for _ in range(states + 1):
        for (state, _), behind in table.items():
            if behind in distance:
                distance[state] = min(distance.get(state, states + 9), distance[behind] + 1)
    assert (0 in distance) == (found is not None)
    if found is None:
        return
    at = {**dict(enumerate(found.state_of.tolist())), ends: len(found.automaton.next) - 1}
    reached, waiting = set(), [0]
    while waiting:
        state = waiting.pop()
        if state in reached:
            continue
        reached.add(state)
        assert found.automaton.distance[at[state]] == distance[state]
        for id in range(len(words.texts)):
            behind = table.get((state, id), DEAD)
            wanted = at[behind] if behind in distance else REFUSED
            assert found.automaton.next[at[state], found.automaton.classes[id]] == wanted, (state, id)
            waiting += [behind] if behind in distance else []
    # Nothing else is in it.
    assert {at[state] for state in reached} | {at[ends]} == set(range(len(found.automaton.next)))


@pytest.mark.parametrize(
    ("texts", "ends", "wanted"),
    [
        ([b"a", b"b", b"c", b"#"], [3], "do not end with an end token, want texts that end with '#'"),
        ([b"a", b"b", None], [2], "no token has some of them, such as 'c'"),
    ],
)
def test_texts_without_a_way_to_an_end_are_refused(texts, ends, wanted):
    with pytest.raises(UserError, match=wanted):
        over_tokens(ABC, vocabulary(texts, ends))


def test_an_automaton_without_texts_is_refused():
    with pytest.raises(UserError, match="here: got no text at all"):
        over_tokens(automaton(2, "0a1", accepts=[]), vocabulary([b"a", None], [1]), "here")


def test_a_text_that_is_too_long_is_refused():
    states = 2100
    next = np.full((states, 256), DEAD, np.int32)
    next[np.arange(states - 1), ord("a")] = np.arange(1, states)
    long = ByteAutomaton(next, np.arange(states) == states - 1, np.zeros(states, bool))
    with pytest.raises(UserError, match=r"end only 2100 tokens after .* want at most 2045"):
        over_tokens(long, vocabulary([b"a", None], [1]))
    assert over_tokens(long, vocabulary([b"a", b"aa", None], [2])).automaton.distance[0] == 1051

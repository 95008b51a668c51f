"""Budget forcing: the rows are those of a program that appends texts by hand, and none gets stuck."""

import dataclasses
import time

import numpy as np
import pytest
from control_rows import FREE, DrawnRow, digits, draw, states_of, vocabulary
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxrl_llm.control.automaton import REFUSED, TokenAutomaton, TokenTexts
from jaxrl_llm.control.budget import budget
from jaxrl_llm.control.byte_automaton import ByteAutomaton
from jaxrl_llm.control.config import BudgetControl, ForbidControl
from jaxrl_llm.control.token_sets import token_set
from jaxrl_llm.errors import UserError

# "/t" is a token; "/t>4" closes and begins the answer; <w> is special, and the end token has no text.
TOKENS = vocabulary(["a", "<", "/", "t", ">", "/t", "/t>4", "4", "5", " so", "</t>", None, None], (12,), {"<w>": 11})
A, LT, SLASH, T, GT, SLASH_T, CLOSES, FOUR, FIVE, SO, CLOSE, SPECIAL, END = range(13)
CLOSES_ALONE = BudgetControl(close="</t>", wait=" soa")


def by_hand(
    wanted: list[int], control: BudgetControl, vocabulary: TokenTexts, budget: int, limit: int
) -> tuple[list[int], list[bool]]:
    """Tokens of a row with a free answer, and which of them were sampled, from what the policy wanted to draw. As s1 does it: with
    texts, one token after another."""
    close, waits, wanted = control.close.encode(), control.waits, iter(wanted)
    forced, tokens, sampled, begun, thinks = [], [], [], 0, True
    while len(tokens) < limit and (not tokens or tokens[-1] not in vocabulary.ends):
        if thinks and len(tokens) >= budget:
            forced, thinks = vocabulary.encode(control.closing or control.close), False
        is_drawn = not forced
        token = forced.pop(0) if forced else next(wanted, vocabulary.ends[0])
        text = b"".join(vocabulary.texts[t] or b"" for t in [*tokens[begun:], token])
        if is_drawn and thinks and close in text:
            if waits:
                forced, waits, is_drawn = vocabulary.encode(control.wait), waits - 1, False
                token = forced.pop(0)
                # The match starts afresh with the wait.
                begun = len(tokens)
            else:
                thinks = False
        tokens.append(token)
        sampled.append(is_drawn)
    return tokens, sampled


def assert_as_by_hand(
    automaton: TokenAutomaton, control: BudgetControl, rows: int = 150, vocabulary: TokenTexts = TOKENS
) -> list[DrawnRow]:
    rng, drawn = np.random.default_rng(0), []
    for _ in range(rows):
        limit = int(rng.integers(automaton.expired_distance + 1, 20))
        most = int(rng.integers(0, limit - automaton.expired_distance + 1))
        row = draw(automaton, rng, limit, most)
        assert (row.tokens, row.sampled) == by_hand(row.wanted, control, vocabulary, most, limit)
        drawn.append(row)
    return drawn


@pytest.mark.parametrize("waits", [0, 1, 3])
@pytest.mark.parametrize("closing", ["", " so</t>45"])
def test_rows_are_those_of_a_program_that_appends_texts(waits, closing):
    control = dataclasses.replace(CLOSES_ALONE, waits=waits, closing=closing)
    automaton = budget(control, FREE, TOKENS)
    rows = assert_as_by_hand(automaton, control)
    # The rows have all there is: a close inside a token, an expired budget, all waits.
    assert any(CLOSES in row.wanted for row in rows)
    assert any(row.tokens[-1] == END for row in rows)
    assert any(row.text(TOKENS).count(b" soa") == waits and b"</t>" in row.text(TOKENS) for row in rows)


def test_a_row_by_hand():
    """Budget 9, one wait: the first close becomes " so" "a"; slot 9 is in the middle of "<" "/t", where "</t>" is forced."""
    automaton = budget(dataclasses.replace(CLOSES_ALONE, waits=1), FREE, TOKENS)
    tokens = [A, LT, SLASH, SO, A, A, A, LT, SLASH_T, CLOSE, FOUR, END]
    sampled = [True, True, True, False, False, *[True] * 4, False, True, True]
    states = states_of(automaton, tokens, sampled, 9)
    assert len(states) == 13 and automaton.ends[states[-1]]
    assert automaton.forced[states[:-1]].tolist() == [-1] * 4 + [A] + [-1] * 4 + [CLOSE] + [-1] * 2
    # After the wait the thinking is another one, in which ">" ends it.
    assert states[0] == states[1] != states[5]
    closed = states_of(
        automaton, [LT, SLASH_T, SO, A, LT, SLASH_T, GT, END], [True, True, False, False] + [True] * 4, 9
    )
    assert automaton.ends[closed[-1]] and automaton.expires[closed[7]] == closed[7]
    # Without the column, " so" is one that the policy drew, and the wait comes in place of ">".
    drawn = states_of(automaton, [LT, SLASH_T, SO, A, LT, SLASH_T, GT, A], budget=9)
    assert drawn[3] == states[0] and automaton.forced[drawn[7]] == A and drawn[8] == states[5]


def test_no_end_token_while_thinking():
    automaton = budget(CLOSES_ALONE, FREE, TOKENS)
    assert states_of(automaton, [A, END])[2] == REFUSED
    assert states_of(automaton, [SPECIAL, CLOSE, SPECIAL, END])[4] != REFUSED


@pytest.mark.parametrize(
    "mutant",
    [
        lambda a: dataclasses.replace(a, forced=np.full_like(a.forced, -1)),
        lambda a: dataclasses.replace(a, replaces=np.zeros_like(a.replaces)),
        # Expiry between two words only.
        lambda a: dataclasses.replace(
            a, expires=np.where(np.arange(len(a.next)) == a.start, a.expires, np.arange(len(a.next)))
        ),
    ],
    ids=["forced tokens are sampled", "a wait does not replace", "no expiry in a half close"],
)
def test_mutants_are_killed(mutant):
    control = dataclasses.replace(CLOSES_ALONE, waits=1)
    with pytest.raises(AssertionError):
        assert_as_by_hand(mutant(budget(control, FREE, TOKENS)), control)


def test_a_wait_too_many_is_killed():
    control = dataclasses.replace(CLOSES_ALONE, waits=1)
    with pytest.raises(AssertionError):
        assert_as_by_hand(budget(dataclasses.replace(control, waits=2), FREE, TOKENS), control)


def test_a_row_needs_room_behind_its_budget():
    """A closing of two tokens, four digits and the end token behind 9 slots; with less a row gets stuck."""
    tokens = vocabulary(["a", "|", "4", None], (3,))
    automaton = budget(BudgetControl(close="|a"), digits(4, 4), tokens)
    assert automaton.least_limit(9) == 16 and automaton.least_limit(0) == 7
    for limit, most in ((15, 9), (8, 20)):
        with pytest.raises(AssertionError, match="stuck"):
            for seed in range(50):
                draw(automaton, np.random.default_rng(seed), limit, most)
    assert token_set(ForbidControl(tokens=(A,)), TOKENS).least_limit(2**31 - 1) == 0


def assert_never_stuck(
    automaton: TokenAutomaton, control: BudgetControl, answer: ByteAutomaton, tokens: TokenTexts
) -> None:
    """All limits from the least on, all budgets that fit."""
    rng, close = np.random.default_rng(0), control.close.encode()
    for limit in range(automaton.expired_distance, automaton.expired_distance + 8):
        for most in range(limit - automaton.expired_distance + 1):
            row = draw(automaton, rng, limit, most)
            text = row.text(tokens)
            assert automaton.ends[row.behind] and (row.sampled[-1] or most == 0 or len(row.tokens) > most)
            # The answer is what is behind the close, or behind the forced one.
            states, behind = [answer.start], text[text.find(close) + len(close) :]
            for byte in behind:
                states.append(int(answer.next[states[-1], byte]))
            assert answer.accepts[states[-1]] and min(states) >= 0, text


@pytest.mark.parametrize("waits", [0, 2])
@pytest.mark.parametrize("closing", ["", " so</t>4"])
@pytest.mark.parametrize("least", [0, 3])
def test_no_row_gets_stuck_and_the_answer_is_what_it_may_be(waits, closing, least):
    control, answer = dataclasses.replace(CLOSES_ALONE, waits=waits, closing=closing), digits(least, 4)
    automaton = budget(control, answer, TOKENS)
    # The closing, the digits that are missing, the end token.
    assert automaton.expired_distance == (1 + least if not closing else 3 + max(least - 1, 0)) + 1
    assert_never_stuck(automaton, control, answer, TOKENS)


@st.composite
def spelled(draw: st.DrawFn) -> tuple[list[str], str, str]:
    """Texts of tokens, and two texts that they spell."""
    texts = draw(st.lists(st.text("ab1", min_size=1, max_size=3), min_size=1, max_size=6, unique=True))
    text = st.lists(st.sampled_from(texts), min_size=1, max_size=2).map("".join)
    return texts, draw(text), draw(text)


@settings(max_examples=100, deadline=None)
@given(texts=spelled(), waits=st.integers(0, 2), least=st.integers(0, 3))
def test_no_row_gets_stuck_with_any_vocabulary(texts, waits, least):
    """A control is refused, or its rows always end."""
    texts, close, wait = texts
    tokens, answer = vocabulary([*texts, None], (len(texts),)), digits(least, least + 1)
    # A close that overlaps itself may be complete before the forced one is.
    assume(not any(close.startswith(close[n:]) for n in range(1, len(close))))
    control = BudgetControl(close=close, wait=wait, waits=waits)
    try:
        automaton = budget(control, answer, tokens)
    except UserError:
        return
    assert_never_stuck(automaton, control, answer, tokens)


def test_a_free_answer_may_be_cut_off_anywhere_but_its_closing_fits():
    automaton = budget(dataclasses.replace(CLOSES_ALONE, closing=" so</t>"), FREE, TOKENS)
    assert automaton.distance[automaton.start] == 0 and automaton.expired_distance == 2


@pytest.mark.parametrize("waits", [0, 1])
def test_a_special_token_that_closes(waits):
    """It has no text: its id ends the thinking, and the text before is not searched."""
    tokens = vocabulary(["a", "4", "wait", None, None, None], (5,), {"</think>": 3, "<other>": 4})
    control = BudgetControl(close="</think>", wait="waita", waits=waits)
    for answer in (FREE, digits(1, 2)):
        automaton = budget(control, answer, tokens)
        behind = states_of(automaton, [0, 4, 3, 1, 5]) if not waits else None
        assert waits or automaton.ends[behind[-1]]
        rng = np.random.default_rng(0)
        for _ in range(50):
            row = draw(automaton, rng, 9, 4)
            thought = row.tokens.index(3) if 3 in row.tokens else len(row.tokens)
            assert thought <= 4 and 5 not in row.tokens[:thought]
            if answer is not FREE:
                assert set(row.tokens[thought + 1 : -1]) == {1} and row.tokens[-1] == 5
            if waits and thought < 4:
                # "wait" and "a", in place of the first close.
                forced = [token for token, drawn in zip(row.tokens[:thought], row.sampled, strict=False) if not drawn]
                assert forced == [2, 0]


END_IN_TEXT = vocabulary(["a", "4", "|", "#"], (3,))


def test_an_end_token_with_a_text():
    """`#` ends the row where the answer does, and is refused while thinking."""
    control = BudgetControl(close="|")
    states = np.full((3, 256), -1, np.int32)
    states[0, ord("4")], states[1, ord("#")] = 1, 2
    answer = ByteAutomaton(states, np.array([False, False, True]), np.zeros(3, bool))
    automaton = budget(control, answer, END_IN_TEXT)
    assert automaton.expired_distance == 3
    found = states_of(automaton, [0, 2, 1, 3])
    assert automaton.ends[found[-1]]
    assert states_of(automaton, [0, 3])[2] == REFUSED
    assert_never_stuck(automaton, control, answer, END_IN_TEXT)


Z = np.full((2, 256), -1, np.int32)
Z[0, ord("z")] = 1


@pytest.mark.parametrize(
    "change, answer, said",
    [
        ({"closing": "so"}, FREE, r"closing: got 'so', want a text whose tokens have close, '</t>'"),
        ({"closing": " so"}, FREE, r"closing: got ' so', want a text whose tokens have close, '</t>'"),
        (
            {"closing": "</t>a"},
            digits(1, 2),
            r"closing: got '</t>a', want behind close, '</t>', only what `then` allows",
        ),
        ({"waits": 1, "wait": "a</t>"}, FREE, r"wait: got 'a</t>', which has close"),
        (
            {"waits": 1, "wait": "/t>a"},
            FREE,
            r"wait: got '/t>a', which has close, '</t>', or completes or continues a part",
        ),
        ({"waits": 1, "wait": "/t"}, FREE, r"wait: got '/t', which has close"),
        ({"waits": 1, "wait": ""}, FREE, r"wait: got '', of which this tokenizer makes no token"),
        (
            {"close": "<w>a"},
            FREE,
            r"close: got '<w>a', tokens \[11, 0\], of which \[11\] are special; want one special",
        ),
        ({"wait": "Wait", "waits": 1}, FREE, r"wait: got 'Wait', which this tokenizer cannot spell: want others"),
        (
            {},
            ByteAutomaton(Z, np.array([False, True]), np.zeros(2, bool)),
            r"then: got texts that this tokenizer cannot spell",
        ),
        ({"close": "<e>"}, FREE, r"closing: got '<e>', tokens \[12\], of which \[12\] end the response"),
        (
            {},
            digits(2044, 2044),
            r"got an answer of 2045 tokens or more behind a closing of 1, want at most 2045 in all",
        ),
    ],
)
def test_errors_name_the_setting_and_what_to_do(change, answer, said):
    names = {"<w>": SPECIAL, "<e>": END, "so": SO}
    tokens = vocabulary([*TOKENS.texts], (END,), names)
    with pytest.raises(UserError, match=said):
        budget(dataclasses.replace(CLOSES_ALONE, **change), answer, tokens, "rollout.control")


def test_no_thinking_in_which_every_token_is_refused():
    """Behind four a's each token completes five, and the empty answer refuses the rest of it."""
    tokens = vocabulary(["aa", "aaa", None], (2,))
    with pytest.raises(
        UserError, match=r"close: got 'aaaaa', which every token of this tokenizer completes behind some texts"
    ):
        budget(BudgetControl(close="aaaaa"), digits(0, 0), tokens)


def test_too_many_waits_are_refused_at_once():
    began = time.perf_counter()
    with pytest.raises(UserError, match=r"rollout.control: got a grammar of .* states, want at most 32,000"):
        budget(BudgetControl(close="</t>", waits=10**6, wait="a"), FREE, TOKENS)
    assert time.perf_counter() - began < 5

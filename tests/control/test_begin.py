"""Text that a response begins with, and what follows it."""

import numpy as np
import pytest
from control_rows import FREE, digits, draw, states_of, vocabulary

from jaxrl_llm.control.budget import budget
from jaxrl_llm.control.config import BudgetControl
from jaxrl_llm.control.forced import begin
from jaxrl_llm.control.vocabulary_walk import over_tokens
from jaxrl_llm.errors import UserError

TOKENS = vocabulary(["a", "b", "4", "</t>", "<t>", None], (5,), {"<e>": 5})


def test_the_text_is_forced_and_is_no_part_of_what_follows():
    automaton = begin(over_tokens(digits(2, 2), TOKENS).automaton, "<t>a", TOKENS)
    # Two forced, two digits, the end token.
    assert automaton.distance[automaton.start] == 5
    row = draw(automaton, np.random.default_rng(0), 5)
    assert row.tokens == [4, 0, 2, 2, 5] and row.sampled == [False, False, True, True, True]
    assert states_of(automaton, row.tokens).tolist() == [*row.states, row.behind]
    assert states_of(automaton, [4, 1, 2]).tolist() == [*row.states[:2], -1, -1]


def test_a_free_row_is_not_cut_off_in_the_text():
    automaton = begin(over_tokens(FREE, TOKENS).automaton, "<t>a", TOKENS)
    assert automaton.distance[automaton.start] == 2
    assert draw(automaton, np.random.default_rng(0), 2).tokens == [4, 0]


@pytest.mark.parametrize("most", range(6))
def test_the_budget_counts_the_text_and_may_be_used_up_in_it(most):
    """The text stays whole, then the thinking is over."""
    then = budget(BudgetControl(close="</t>"), digits(1, 2), TOKENS)
    automaton = begin(then, "<t>ab", TOKENS)
    # The text; the closing, a digit, the end token.
    assert automaton.distance[automaton.start] == 6
    for limit in range(max(3, most) + 3, 12):
        row = draw(automaton, np.random.default_rng(limit), limit, most)
        assert row.tokens[:3] == [4, 0, 1] and not any(row.sampled[:3])
        closed = row.tokens.index(3)
        assert closed <= max(most, 3) and row.sampled[closed] == (closed < most)
        assert {*row.tokens[closed + 1 : -1]} == {2} and row.tokens[-1] == 5


def test_errors():
    free = over_tokens(FREE, TOKENS).automaton
    with pytest.raises(UserError, match=r"control\.text: got 'a<e>', tokens \[0, 5\], of which \[5\] end the response"):
        begin(free, "a<e>", TOKENS)
    with pytest.raises(
        UserError, match=r"text: got 2046 tokens, behind which a response takes 0 more, want at most 2045"
    ):
        begin(free, "a" * 2046, TOKENS)

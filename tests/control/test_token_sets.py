"""Allowed and forbidden tokens."""

import numpy as np
import pytest
from control_rows import allowed, draw, states_of, vocabulary

from jaxrl_llm.control.config import AllowControl, ForbidControl
from jaxrl_llm.control.token_sets import token_set
from jaxrl_llm.errors import UserError

# Token 3 ends a row with a text, token 4 without.
TOKENS = vocabulary(["a", "b", "ab", "#", None, None], (3, 4), {"<w>": 5})


def may_be_drawn(control) -> list[int]:
    automaton = token_set(control, TOKENS)
    return np.flatnonzero(allowed(automaton, automaton.start, 1)).tolist()


def test_allowed_tokens_are_those_and_the_end_tokens():
    assert may_be_drawn(AllowControl(tokens=(1, "ab", "<w>"))) == [1, 2, 3, 4, 5]
    assert may_be_drawn(AllowControl(tokens=(4,))) == [3, 4]


def test_forbidden_tokens_are_those_and_no_other():
    assert may_be_drawn(ForbidControl(tokens=("a", 5))) == [1, 2, 3, 4]
    assert may_be_drawn(ForbidControl(tokens=("#", 0))) == [1, 2, 4, 5]


def test_a_row_ends_with_any_end_token_and_elsewhere_continues():
    automaton = token_set(ForbidControl(tokens=("a",)), TOKENS)
    for end in (3, 4):
        states = states_of(automaton, [1, 2, 1, end, 1])
        assert automaton.ends[states].tolist() == [False] * 4 + [True, automaton.ends[-1]] and states[5] == -1
    assert states_of(automaton, [1, 0, 1]).tolist() == [0, 0, -1, -1]


def test_without_end_tokens_a_row_runs_to_its_limit():
    automaton = token_set(ForbidControl(tokens=(3, 4)), TOKENS)
    row = draw(automaton, np.random.default_rng(0), 20)
    assert len(row.tokens) == 20 and not {3, 4} & {*row.tokens}


def test_end_tokens_share_no_class_with_others():
    for control in (AllowControl(tokens=(0,)), ForbidControl(tokens=(0, 3, 4)), ForbidControl(tokens=(0, 3))):
        classes = token_set(control, TOKENS).classes
        assert not {*classes[[3, 4]]} & {*classes[[0, 1, 2, 5]]}


@pytest.mark.parametrize("kind", [AllowControl, ForbidControl])
def test_all_that_is_no_token_is_named(kind):
    said = (
        r"control\.tokens: got 'abb', which is 2 tokens \[2, 1\]; 6; -1; want token ids of 0 to 5, or texts of exactly one token: "
        "name the ids"
    )
    with pytest.raises(UserError, match=said):
        token_set(kind(tokens=(0, "abb", "b", 6, -1)), TOKENS)


def test_at_least_one_token_is_left():
    with pytest.raises(UserError, match=r"tokens: got all 6 tokens, want at least one that is not forbidden"):
        token_set(ForbidControl(tokens=tuple(range(6))), TOKENS)

"""Each kind of control is built by its own function, nested ones too, and is read back from the cache as it was."""

import dataclasses

import numpy as np
import pytest
from control_rows import draw, vocabulary

from jaxrl_llm.control.build import automaton_of, build
from jaxrl_llm.control.config import (
    AllowControl,
    BeginControl,
    BudgetControl,
    ChoiceControl,
    ForbidControl,
    NoControl,
    RegexControl,
    StopControl,
)
from jaxrl_llm.errors import UserError

TOKENS = vocabulary(["a", "b", "4", "|", "w", None], (5,))._replace(fingerprint="six")
NESTED = BeginControl(
    text="ab", then=BudgetControl(tokens=6, close="|", waits=1, wait="w", then=RegexControl(pattern="4{2}"))
)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_a_budget_behind_a_text_and_before_a_grammar():
    for seed in range(20):
        row = draw(build(NESTED, TOKENS), np.random.default_rng(seed), 12, NESTED.then.tokens)
        text = row.text(TOKENS)
        assert text.startswith(b"ab") and text.endswith(b"|44") and text.index(b"|") <= 6 and row.tokens[-1] == 5


@pytest.mark.parametrize(
    "control",
    [
        AllowControl(tokens=("a",)),
        ForbidControl(tokens=(0,)),
        StopControl(texts=("ab",)),
        BudgetControl(close="|"),
        BudgetControl(close="|", then=ChoiceControl(texts=("a", "4"))),
        BeginControl(text="w", then=NoControl()),
        NESTED,
    ],
    ids=lambda control: control.kind,
)
def test_what_the_cache_returns_is_what_was_built(control):
    fresh = automaton_of(control, TOKENS, "rollout.control")
    for found in (build(control, TOKENS), build(control, TOKENS)):
        for field in dataclasses.fields(fresh):
            np.testing.assert_array_equal(getattr(found, field.name), getattr(fresh, field.name))


def test_errors_name_the_inner_setting():
    control = BeginControl(text="a", then=BudgetControl(close="|", then=RegexControl(pattern="(")))
    with pytest.raises(UserError, match=r"rollout\.control\.then\.then\.pattern: got '\('"):
        build(control, TOKENS)


@pytest.mark.parametrize(
    ("control", "missing"),
    [
        (RegexControl(), "pattern"),
        (ChoiceControl(), "texts"),
        (AllowControl(), "tokens"),
        (ForbidControl(), "tokens"),
        (StopControl(), "texts"),
        (BeginControl(), "text"),
        (BeginControl(text="a", then=BudgetControl(close="|", then=RegexControl())), "then.then.pattern"),
    ],
)
def test_a_control_without_its_setting_is_refused(control, missing):
    """A forgotten pattern would be any text."""
    with pytest.raises(UserError, match=rf"^rollout.control.{missing}: got nothing, want what"):
        build(control, TOKENS)


HASH = vocabulary(["1", "2", "12", "#"], (3,))
SPACE = vocabulary([" a", "b", None], (2,))._replace(drops_space=True)


@pytest.mark.parametrize(
    ("texts", "tokens", "refused"),
    [
        (("ab4", "", "w"), TOKENS, None),
        (("ab4", "abc"), TOKENS, "abc"),
        (("12#", "121#"), HASH, None),
        (("12#", "12"), HASH, "12"),
        (("12#", "1#2#"), HASH, "1#2#"),
        (("a", "ab"), SPACE, None),
        (("a", "ba"), SPACE, "ba"),
    ],
)
def test_each_text_of_a_choice_can_be_spelled_or_is_refused_by_name(texts, tokens, refused):
    """What cannot be spelled would never be sampled, without a word. `#` ends a response, and is a part of its text."""
    for control in (ChoiceControl(texts=texts), BudgetControl(close="|", then=ChoiceControl(texts=texts))):
        if refused is None and control.kind == "choice":
            automaton_of(control, tokens, "x")
        elif refused is not None and (control.kind == "choice" or tokens is TOKENS):
            with pytest.raises(UserError, match=rf"texts: got '{refused}', which this tokenizer cannot spell"):
                automaton_of(control, tokens, "x")

"""Automata of controls, by the kind of control."""

from functools import singledispatch

import numpy as np

from jaxrl_llm.control.automaton import TokenAutomaton, TokenTexts
from jaxrl_llm.control.budget import budget
from jaxrl_llm.control.byte_automaton import ByteAutomaton
from jaxrl_llm.control.config import (
    AllowControl,
    Answer,
    BeginControl,
    BudgetControl,
    ChoiceControl,
    Control,
    ForbidControl,
    NoControl,
    StopControl,
)
from jaxrl_llm.control.forced import begin
from jaxrl_llm.control.stop import stop
from jaxrl_llm.control.token_sets import token_set
from jaxrl_llm.control.vocabulary_walk import over_tokens


@singledispatch
def build(control: Control, vocabulary: TokenTexts, where: str = "rollout.control") -> TokenAutomaton:
    return over_tokens(answer_texts(control, where), vocabulary, where).automaton


def answer_texts(control: Answer, where: str) -> ByteAutomaton:
    if isinstance(control, NoControl):
        return ByteAutomaton(np.zeros((1, 256), np.int32), np.ones(1, bool), np.ones(1, bool))
    from jaxrl_llm.control.regex import from_regex

    if isinstance(control, ChoiceControl):
        import re

        return from_regex("|".join(re.escape(x) for x in control.texts), where)
    return from_regex(control.pattern, where)


@build.register(AllowControl)
@build.register(ForbidControl)
def _(control, vocabulary, where="rollout.control"):
    return token_set(control, vocabulary, where)


@build.register(StopControl)
def _(control, vocabulary, where="rollout.control"):
    return stop(control, vocabulary, where)


@build.register(BudgetControl)
def _(control, vocabulary, where="rollout.control"):
    return budget(control, answer_texts(control.then, f"{where}.then"), vocabulary, where)


@build.register(BeginControl)
def _(control, vocabulary, where="rollout.control"):
    return begin(build(control.then, vocabulary, f"{where}.then"), control.text, vocabulary, where)

"""Configs of controls as automata over the tokens of a vocabulary."""

from functools import singledispatch

import numpy as np

from jaxrl_llm.control import cache
from jaxrl_llm.control.automaton import TokenAutomaton, TokenTexts
from jaxrl_llm.control.budget import budget
from jaxrl_llm.control.byte_automaton import ByteAutomaton
from jaxrl_llm.control.choice import check_spelled, from_texts
from jaxrl_llm.control.config import (
    AllowControl,
    Answer,
    BeginControl,
    BudgetControl,
    ChoiceControl,
    Control,
    ForbidControl,
    JsonSchemaControl,
    NoControl,
    RegexControl,
    StopControl,
    missing_field,
)
from jaxrl_llm.control.forced import begin
from jaxrl_llm.control.json_schema import to_regex
from jaxrl_llm.control.regex import from_regex
from jaxrl_llm.control.stop import stop
from jaxrl_llm.control.token_sets import token_set
from jaxrl_llm.control.vocabulary_walk import over_tokens
from jaxrl_llm.errors import UserError


def build(control: Control, vocabulary: TokenTexts, where: str = "rollout.control") -> TokenAutomaton:
    """Return the automaton of a control, from the cache of this machine if it was built before.

    Args:
        control: Any control but `NoControl`.
        vocabulary: The tokens.
        where: Name of the setting, for errors.

    Raises:
        UserError: The control is wrong, or too large, or the vocabulary cannot spell what it allows.
    """
    if missing := missing_field(control):
        raise UserError(f"{where}.{missing}: got nothing, want what responses may consist of")
    return cache.cached(control, vocabulary.fingerprint, lambda: automaton_of(control, vocabulary, where))


@singledispatch
def automaton_of(control: Control, vocabulary: TokenTexts, where: str) -> TokenAutomaton:
    """Return the automaton of a control; a function per kind."""
    raise TypeError(f"{where}: got {type(control).__name__}, want a control")


@automaton_of.register
def _(control: ChoiceControl, vocabulary: TokenTexts, where: str) -> TokenAutomaton:
    texts = texts_of(control, where)
    check_spelled(control.texts, vocabulary, f"{where}.texts")
    return over_tokens(texts, vocabulary, where).automaton


@automaton_of.register(NoControl | RegexControl | JsonSchemaControl)
def _(control: Answer, vocabulary: TokenTexts, where: str) -> TokenAutomaton:
    return over_tokens(texts_of(control, where), vocabulary, where).automaton


automaton_of.register(AllowControl | ForbidControl, token_set)
automaton_of.register(StopControl, stop)


@automaton_of.register
def _(control: BudgetControl, vocabulary: TokenTexts, where: str) -> TokenAutomaton:
    answer = texts_of(control.then, f"{where}.then")
    if isinstance(control.then, ChoiceControl):
        check_spelled(control.then.texts, vocabulary, f"{where}.then.texts")
    return budget(control, answer, vocabulary, where)


@automaton_of.register
def _(control: BeginControl, vocabulary: TokenTexts, where: str) -> TokenAutomaton:
    return begin(automaton_of(control.then, vocabulary, f"{where}.then"), control.text, vocabulary, where)


@singledispatch
def texts_of(control: Answer, where: str) -> ByteAutomaton:
    """Return the texts that a control allows; a function per kind."""
    raise TypeError(f"{where}: got {type(control).__name__}, want a control of texts")


@texts_of.register
def _(control: NoControl, where: str) -> ByteAutomaton:
    return ByteAutomaton(np.zeros((1, 256), np.int32), np.ones(1, bool), np.ones(1, bool))


@texts_of.register
def _(control: RegexControl, where: str) -> ByteAutomaton:
    return from_regex(control.pattern, f"{where}.pattern")


@texts_of.register
def _(control: JsonSchemaControl, where: str) -> ByteAutomaton:
    return from_regex(to_regex(control, where), f"{where}.schema")


@texts_of.register
def _(control: ChoiceControl, where: str) -> ByteAutomaton:
    return from_texts(control.texts, f"{where}.texts")

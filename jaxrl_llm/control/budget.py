"""Thinking of a limited number of tokens, then an answer: budget forcing (s1, arXiv 2501.19393)."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxrl_llm.control.automaton import MAX_DISTANCE, REFUSED, TokenAutomaton, TokenTexts, states_of
from jaxrl_llm.control.byte_automaton import DEAD, ByteAutomaton
from jaxrl_llm.control.config import UNLIMITED, BudgetControl
from jaxrl_llm.control.forced import forced_tokens, with_forced
from jaxrl_llm.control.named_tokens import special_token, with_column
from jaxrl_llm.control.text_search import searching
from jaxrl_llm.control.vocabulary_walk import MAX_STATES, check_size, over_tokens
from jaxrl_llm.errors import UserError


class _Phases(NamedTuple):
    """An automaton over tokens, and its states by what a row does there."""

    automaton: TokenAutomaton
    begins: Int[np.ndarray, " waits+1"]
    """Start of the thinking after 0, 1, ... waits."""
    thinking: list[Int[np.ndarray, " S"]]
    """All states of the thinking, likewise."""
    waiting: Int[np.ndarray, " waits"]
    """State behind the token that would have ended the thinking."""
    answers: int
    """Start of the answer."""


def budget(
    control: BudgetControl, answer: ByteAutomaton, vocabulary: TokenTexts, where: str = "rollout.control"
) -> TokenAutomaton:
    """Return the automaton of thinking, with its waits, and the answer behind it. `control.tokens` is no part of it: a row brings
    its budget along, and has to have room for `expired_distance` tokens behind that.

    The thinking ends where `close` occurs for the first time; further bytes of the token that completes it belong to the answer.
    Until then every token is allowed but end tokens.

    Args:
        control: texts, and number of waits.
        answer: texts that may follow `close`.
        vocabulary: the tokens.
        where: name of the setting, for errors.

    Raises:
        UserError: a text that cannot be spelled, or that has an end token; `closing` does not close, or the answer may not begin
            with the rest of it; `wait` closes; no text of the answer can be spelled, or only by too many tokens.
    """
    phases = _phases(control, answer, vocabulary, where)
    automaton = _with_waits(control, phases, vocabulary, where)
    chains = np.arange(len(phases.automaton.next), len(automaton.next))
    tokens = forced_tokens(control.closing or control.close, vocabulary, f"{where}.closing")
    behind = int(states_of(automaton, phases.begins[-1], 0, tokens, UNLIMITED)[-1])
    _check_closing(control, behind, phases.thinking[-1], where)
    distance = int(automaton.distance[behind])
    if distance + len(tokens) > MAX_DISTANCE:
        raise UserError(
            f"{where}: got an answer of {distance} tokens or more behind a closing of {len(tokens)}, want at most {MAX_DISTANCE} "
            "in all"
        )
    automaton, closing = with_forced(automaton, tokens, behind, distance)
    expiring = np.concatenate([*phases.thinking, chains])
    automaton.expires[expiring] = closing
    # A row that thinks may be cut off by its limit if its answer may; else it has room for the closing, as its budget says.
    free = automaton.distance[phases.answers] == 0
    automaton.distance[np.append(expiring, phases.waiting)] = 0 if free else distance + len(tokens)
    after = automaton.next[np.concatenate(phases.thinking)]
    if not ((after != REFUSED) & (automaton.distance[after] <= automaton.expired_distance)).any(1).all():
        raise UserError(
            f"{where}.close: got {control.close!r}, which every token of this tokenizer completes behind some texts, followed by "
            "what `then` refuses; want another text"
        )
    return automaton


def _phases(control: BudgetControl, answer: ByteAutomaton, vocabulary: TokenTexts, where: str) -> _Phases:
    special = special_token(control.close, vocabulary, f"{where}.close")
    search = searching([control.close.encode()] if special is None else [])
    # Thinking after 0, 1, ... waits; a state per wait; the answer.
    begins = np.arange(min(control.waits, MAX_STATES) + 1) * len(search)
    waiting = begins[-1] + len(search) + np.arange(control.waits)
    answers = begins[-1] + len(search) + control.waits
    check_size(where, "states", int(answers), MAX_STATES)
    behind = [*waiting, answers + answer.start]
    thinking = [np.where(search == len(search), end, search + begin) for begin, end in zip(begins, behind, strict=True)]
    next = [*thinking, *(np.full((1, 256), state) for state in waiting)]
    next.append(np.where(answer.next == DEAD, DEAD, answer.next + answers))
    texts = ByteAutomaton(
        np.concatenate(next).astype(np.int32),
        np.append(np.zeros(answers, bool), answer.accepts),
        np.append(np.ones(answers, bool), answer.free),
    )
    automaton, state_of = over_tokens(texts, vocabulary, where, kept=[*begins, *behind])
    if state_of[behind[-1]] == REFUSED:
        # An error that names the reason.
        over_tokens(answer, vocabulary, f"{where}.then")
    states = [part[part != REFUSED] for part in np.split(state_of[: begins[-1] + len(search)], control.waits + 1)]
    if special is not None:
        column = automaton.next[:, automaton.classes[special]].copy()
        for some, end in zip(states, behind, strict=True):
            column[some] = state_of[end]
        automaton = with_column(automaton, special, column)
    return _Phases(automaton, state_of[begins], states, state_of[waiting], int(state_of[behind[-1]]))


def _with_waits(control: BudgetControl, phases: _Phases, vocabulary: TokenTexts, where: str) -> TokenAutomaton:
    """Force `wait` in the states behind tokens that would have ended the thinking; it takes their place."""
    automaton = phases.automaton
    if not control.waits:
        return automaton
    tokens = forced_tokens(control.wait, vocabulary, f"{where}.wait")
    resumed = [int(states_of(automaton, state, 0, tokens, UNLIMITED)[-1]) for state in phases.begins[1:]]
    thinks = all(state in states for state, states in zip(resumed, phases.thinking[1:], strict=True))
    if not thinks or not _is_apart(control.wait.encode(), control.close.encode()):
        raise UserError(
            f"{where}.wait: got {control.wait!r}, which has close, {control.close!r}, or completes or continues a part of it that "
            "stands before; want a text that does not"
        )
    for state, behind in zip(phases.waiting, resumed, strict=True):
        automaton, rest = with_forced(automaton, tokens[1:], behind, 0)
        automaton.next[state] = REFUSED
        automaton.next[state, automaton.classes[tokens[0]]] = rest
        automaton.forced[state], automaton.replaces[state] = tokens[0], True
    return automaton


def _is_apart(text: bytes, close: bytes) -> bool:
    """Whether how much of `close` there is behind a text does not depend on how much there was before it, and is not all."""
    search = np.vstack([searching([close]), np.full(256, len(close))])
    states = np.arange(len(close))
    for byte in text:
        states = search[states, byte]
    return bool((states == states[0]).all()) and states[0] < len(close)


def _check_closing(control: BudgetControl, behind: int, thinking: Int[np.ndarray, " S"], where: str) -> None:
    text = control.closing or control.close
    if behind in thinking:
        raise UserError(
            f"{where}.closing: got {text!r}, want a text whose tokens have close, {control.close!r}, in their texts"
        )
    if behind == REFUSED:
        raise UserError(
            f"{where}.closing: got {text!r}, want behind close, {control.close!r}, only what `then` allows there"
        )

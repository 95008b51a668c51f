"""Forced text: tokens that the policy does not sample, added to an automaton as a chain of states."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxrl_llm.control.automaton import MAX_DISTANCE, REFUSED, TokenAutomaton, TokenTexts
from jaxrl_llm.control.named_tokens import tokens_of
from jaxrl_llm.errors import UserError


def begin(then: TokenAutomaton, text: str, vocabulary: TokenTexts, where: str = "rollout.control") -> TokenAutomaton:
    """Return the automaton of a forced text, then whatever `then` is. The text is no part of what `then` sees, but takes up slots
    of its budget.

    Raises:
        UserError: the text has an end token, or takes more tokens than MAX_DISTANCE with what follows it.
    """
    # A budget may be used up when the forced text ends.
    distance = max(then.distance[then.start], then.expired_distance)
    tokens = forced_tokens(text, vocabulary, f"{where}.text")
    whole, start = with_forced(then, tokens, then.start, distance)
    if whole.distance[start] > MAX_DISTANCE:
        raise UserError(
            f"{where}.text: got {len(tokens)} tokens, behind which a response takes {distance} more, want at most {MAX_DISTANCE} "
            "in all: a shorter text"
        )
    return dataclasses.replace(whole, start=start)


def with_forced(
    automaton: TokenAutomaton, tokens: Sequence[int], behind: int, distance: int
) -> tuple[TokenAutomaton, int]:
    """Add states that force tokens, one after another.

    Args:
        automaton: to which they are added, behind its last state.
        tokens: token ids; none: nothing is added.
        behind: state that follows them.
        distance: tokens that a row needs behind them.

    Returns:
        The automaton, and the state that forces the first token.
    """
    count, old = len(tokens), len(automaton.next)
    states = [*range(old, old + count), behind]
    next = np.full((count, automaton.next.shape[1]), REFUSED)
    next[range(count), automaton.classes[list(tokens)]] = states[1:]
    added = {
        "next": next, "distance": distance + count - np.arange(count), "ends": np.zeros(count, bool), "forced": tokens,
        "replaces": np.zeros(count, bool), "expires": states[:-1],
    }  # fmt: skip
    longer = {
        name: np.concatenate([old, np.asarray(new, old.dtype)])
        for name, new in added.items()
        for old in (getattr(automaton, name),)
    }
    return dataclasses.replace(automaton, **longer), states[0]


def forced_tokens(text: str, vocabulary: TokenTexts, where: str) -> list[int]:
    """Token ids of a text that is to be forced.

    Raises:
        UserError: an end token is among them, there is none, or the tokenizer cannot spell the text.
    """
    tokens = tokens_of(text, vocabulary, where)
    if not tokens:
        raise UserError(f"{where}: got {text!r}, of which this tokenizer makes no token; want a text of at least one")
    if ends := sorted({*tokens} & {*vocabulary.ends}):
        raise UserError(
            f"{where}: got {text!r}, tokens {tokens}, of which {ends} end the response; want a text without end tokens"
        )
    return tokens

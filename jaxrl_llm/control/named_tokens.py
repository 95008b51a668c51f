"""Tokens that a control names by a text. Special ones have no text for an automaton over bytes, which does not see them."""

import dataclasses

import numpy as np
from jaxtyping import Int

from jaxrl_llm.control.automaton import TokenAutomaton, TokenTexts
from jaxrl_llm.errors import UserError


def tokens_of(text: str, vocabulary: TokenTexts, where: str) -> list[int]:
    """Token ids of a text.

    Raises:
        UserError: the tokenizer cannot spell it.
    """
    try:
        return vocabulary.encode(text)
    except UserError as error:
        raise UserError(f"{where}: got {text!r}, which this tokenizer cannot spell: {error}") from error


def special_token(text: str, vocabulary: TokenTexts, where: str) -> int | None:
    """Return the token without a text that a text consists of, None if it consists of tokens that have one.

    Raises:
        UserError: it consists of both, or the tokenizer cannot spell it.
    """
    tokens = tokens_of(text, vocabulary, where)
    special = [id for id in tokens if vocabulary.texts[id] is None]
    if special and len(tokens) > 1:
        raise UserError(
            f"{where}: got {text!r}, tokens {tokens}, of which {special} are special; want one special token alone, or a text "
            "without any"
        )
    return special[0] if special else None


def with_column(automaton: TokenAutomaton, token: int, column: Int[np.ndarray, " S"]) -> TokenAutomaton:
    """Give a token a class of its own. `column`: state behind it in each state."""
    classes = automaton.classes.copy()
    classes[token] = automaton.next.shape[1]
    next = np.concatenate([automaton.next, column[:, None].astype(np.int32)], axis=1)
    return dataclasses.replace(automaton, classes=classes, next=next)

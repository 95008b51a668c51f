"""Controls by token: responses that consist of some tokens only, or have none of some tokens."""

import numpy as np
from jaxtyping import Bool

from jaxrl_llm.control.automaton import REFUSED, TokenAutomaton, TokenTexts, token_automaton
from jaxrl_llm.control.config import AllowControl, ForbidControl
from jaxrl_llm.control.named_tokens import tokens_of
from jaxrl_llm.errors import UserError


def token_set(
    control: AllowControl | ForbidControl, vocabulary: TokenTexts, where: str = "rollout.control"
) -> TokenAutomaton:
    """Return the automaton of one state, and the state behind end tokens. A row may be cut off by its limit. Only
    `ForbidControl` can forbid end tokens: rows then run to their limit.

    Raises:
        UserError: an entry is no token of the vocabulary or a text of several, or no token would be left.
    """
    listed, is_end = np.zeros((2, len(vocabulary.texts)), bool)
    listed[_token_ids(control, vocabulary, f"{where}.tokens")] = True
    is_end[list(vocabulary.ends)] = True
    allowed = listed | is_end if isinstance(control, AllowControl) else ~listed
    if not allowed.any():
        raise UserError(f"{where}.tokens: got all {len(allowed)} tokens, want at least one that is not forbidden")
    return token_automaton(*_table(allowed, is_end), np.zeros(2), 0, np.array([False, True]))


def _table(allowed: Bool[np.ndarray, " V"], is_end: Bool[np.ndarray, " V"]) -> tuple[np.ndarray, np.ndarray]:
    """Classes, and the transitions of both states: an end token leads to state 1, another one back to state 0."""
    kinds, classes = np.unique(2 * is_end + allowed, return_inverse=True)
    return classes, np.stack([np.where(kinds % 2, kinds // 2, REFUSED), np.full(len(kinds), REFUSED)])


def _token_ids(control: AllowControl | ForbidControl, vocabulary: TokenTexts, where: str) -> list[int]:
    ids, wrong = [], []
    for entry in control.tokens:
        found = [entry] if isinstance(entry, int) else tokens_of(entry, vocabulary, where)
        if len(found) != 1:
            wrong.append(f"{entry!r}, which is {len(found)} tokens {found}")
        elif not 0 <= found[0] < len(vocabulary.texts):
            wrong.append(str(entry))
        ids += found
    if wrong:
        last = len(vocabulary.texts) - 1
        raise UserError(
            f"{where}: got {'; '.join(wrong)}; want token ids of 0 to {last}, or texts of exactly one token: name the ids of the "
            "tokens that you mean"
        )
    return ids

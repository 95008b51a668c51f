"""A control built for a tokenizer, and the room that rows need under it. Imports no jax."""

import hashlib
from typing import TYPE_CHECKING

from jaxrl_llm.control.automaton import TokenAutomaton, TokenTexts
from jaxrl_llm.control.build import build
from jaxrl_llm.control.config import Control

if TYPE_CHECKING:
    from jaxrl_llm.rollout.requests import PromptTokenizer


def build_control(control: Control, tokenizer: "PromptTokenizer", ends: tuple[int, ...]) -> TokenAutomaton:
    """Return the automaton of a control over a tokenizer's tokens. Raises UserError if it cannot be built. `ends`: end tokens."""
    texts, drops_space = tokenizer.texts
    known = hashlib.sha256(repr((tokenizer.fingerprint, texts, ends, drops_space)).encode()).hexdigest()
    return build(control, TokenTexts(texts, ends, tokenizer.encode, known, drops_space))


def limit_problem(limit: int, automaton: TokenAutomaton, budget: int) -> str:
    """Return what is wrong with a limit, as "got X, want Y: why"; "" if every row can end within it.

    Args:
        limit: maximum completion tokens.
        automaton: of the control.
        budget: slot from which its states expire.
    """
    shortest, least = int(automaton.distance[automaton.start]), automaton.least_limit(budget)
    if limit < shortest:
        return f"got {limit}, want at least {shortest}: the control allows no response of fewer tokens"
    if limit < least:
        rest = least - budget
        smaller = f", or a budget of {limit - rest} at most" if limit > rest else ""
        return (
            f"got {limit}, want at least {least}{smaller}: the control's budget is {budget} tokens, and what follows it "
            f"takes {rest} at least"
        )
    return ""

"""Stop texts: a response ends with the token that completes one of them, wherever in the token that is."""

import dataclasses

import numpy as np

from jaxrl_llm.control.automaton import REFUSED, TokenAutomaton, TokenTexts
from jaxrl_llm.control.byte_automaton import ByteAutomaton
from jaxrl_llm.control.config import StopControl
from jaxrl_llm.control.named_tokens import special_token, with_column
from jaxrl_llm.control.text_search import searching
from jaxrl_llm.control.vocabulary_walk import over_tokens


def stop(control: StopControl, vocabulary: TokenTexts, where: str = "rollout.control") -> TokenAutomaton:
    """Return the automaton that allows everything until the text has one of `control.texts`. Tokens without a text are passed over;
    a stop text may be one of them.

    Raises:
        UserError: a text mixes special tokens with others.
    """
    special = {text: special_token(text, vocabulary, f"{where}.texts") for text in control.texts}
    table = searching([text.encode() for text, token in special.items() if token is None])
    found = len(table)
    everywhere = np.ones(found + 1, bool)
    search = ByteAutomaton(np.concatenate([table, np.full((1, 256), found)]).astype(np.int32), everywhere, everywhere)
    walked = over_tokens(search, vocabulary, where, kept=[found])
    automaton, stopped = walked.automaton, walked.state_of[found]
    for token in {*special.values()} - {None}:
        column = automaton.next[:, automaton.classes[token]]
        automaton = with_column(automaton, token, np.where(column == REFUSED, REFUSED, stopped))
    next, ends = automaton.next.copy(), automaton.ends.copy()
    next[stopped], ends[stopped] = REFUSED, True
    return dataclasses.replace(automaton, next=next, ends=ends)

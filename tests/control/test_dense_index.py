"""Masks and transitions of ten grammars over 150,000 tokens, against the index that outlines-core makes token by token."""

import numpy as np
import outlines_core
import pytest

from benchmarks.controls import GRAMMARS, vocabulary
from jaxrl_llm.control.automaton import TokenTexts
from jaxrl_llm.control.build import build
from jaxrl_llm.control.config import ChoiceControl, JsonSchemaControl
from jaxrl_llm.control.json_schema import to_regex

FAST = {"integer", "date", "think"}
TEN = ("integer", "decimal", "date", "email", "nested", "enum", "unicode", "lists", "think", "tool_call")
SIZE = 150_000


@pytest.fixture(scope="module")
def words() -> TokenTexts:
    return vocabulary(SIZE)


@pytest.fixture(scope="module")
def dense_words(words) -> outlines_core.Vocabulary:
    return outlines_core.Vocabulary(SIZE, {text: [id] for id, text in enumerate(words.texts[:SIZE])})


def pattern_of(control) -> str:
    """A pattern with the end of the text in it: without, outlines-core loses texts that continue behind a match (test_regex.py)."""
    if isinstance(control, ChoiceControl):
        return rf"(?:{'|'.join(control.texts)})\z"
    return rf"(?:{to_regex(control, '') if isinstance(control, JsonSchemaControl) else control.pattern})\z"


def test_the_vocabulary_has_all_kinds_of_tokens(words):
    texts = words.texts[:SIZE]
    assert len(set(texts)) == SIZE and {bytes([byte]) for byte in range(256)} <= set(texts)
    assert {b'","', b'":"', b"007", b" " * 64, b" </"} <= set(texts)
    whole = sum(text.decode(errors="ignore").encode() == text for text in texts)
    assert 20_000 > SIZE - whole > 1_000  # parts of characters
    assert sum(text.isalpha() or text[1:].isalpha() for text in texts) > 0.7 * SIZE


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.soak) for n in TEN])
def test_no_mismatch_with_the_dense_index(name, words, dense_words, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = build(GRAMMARS[name], words)
    dense = outlines_core.Index(pattern_of(GRAMMARS[name]), dense_words)
    transitions, final = dense.get_transitions(), dense.get_final_states()
    # State of `found` per state of the dense index: several there may be one here.
    state_of, waiting, compared = {dense.get_initial_state(): found.start}, [dense.get_initial_state()], 0
    while waiting:
        state = waiting.pop()
        row = {token: behind for token, behind in transitions.get(state, {}).items() if token < SIZE}
        tokens, behind = np.fromiter(row.keys(), np.int64), np.fromiter(row.values(), np.int64)
        here = found.next[state_of[state]][found.classes]
        assert np.array_equal(np.flatnonzero(here[:SIZE] >= 0), np.sort(tokens)), f"mask of state {state}"
        assert (here[SIZE] >= 0) == (state in final), f"end in state {state}"
        pairs = np.unique(np.stack([behind, here[tokens]], axis=1), axis=0)
        for other, mine in pairs.tolist():
            if other not in state_of:
                waiting.append(other)
            assert state_of.setdefault(other, mine) == mine, f"transition from state {state} to {other}"
        compared += len(tokens)
    assert compared > 0 and set(state_of.values()) | {len(found.next) - 1} == set(range(len(found.next)))

"""Rows that a control allows: none is stuck, each ends within its room, and what it spells is what the control says."""

import json
import re

import numpy as np
import pytest

from benchmarks.controls import GRAMMARS, vocabulary
from jaxrl_llm.control import vocabulary_walk
from jaxrl_llm.control.automaton import TokenAutomaton, TokenTexts
from jaxrl_llm.control.build import build
from jaxrl_llm.control.config import ChoiceControl, JsonSchemaControl, RegexControl
from jaxrl_llm.errors import UserError

CASES = {
    **GRAMMARS,
    "prefixes": ChoiceControl(texts=("a", "ab", "abc", "ab", " a")),
    "alternatives": RegexControl(pattern="a|ab|ab[.]c"),
    "long": RegexControl(pattern="x{40,60}(yz)*"),
}


@pytest.fixture(scope="module")
def words() -> TokenTexts:
    return vocabulary(6_000)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def walk(automaton: TokenAutomaton, rng: np.random.Generator, room: int) -> list[int]:
    """Draw tokens with equal probability per class among those after which the row can still end, as decoding does."""
    state, tokens = automaton.start, list[int]()
    while not automaton.ends[state]:
        behind = automaton.next[state]
        usable = np.flatnonzero((behind >= 0) & (automaton.distance[behind] < room - len(tokens)))
        assert len(usable), f"stuck in state {state} with room for {room - len(tokens)}"
        cls = rng.choice(usable)
        tokens.append(int(rng.choice(np.flatnonzero(automaton.classes == cls))))
        state = behind[cls]
    return tokens


def is_right(control, text: str) -> bool:
    if isinstance(control, RegexControl):
        return bool(re.fullmatch(control.pattern, text))
    if isinstance(control, ChoiceControl):
        return text in control.texts
    return isinstance(json.loads(text), dict | list) or not control.schema


@pytest.mark.parametrize("name", CASES)
def test_every_row_ends_within_its_room_and_is_right(name, words):
    control, rng = CASES[name], np.random.default_rng(0)
    automaton = build(control, words)
    assert (automaton.next[~automaton.ends] >= 0).any(1).all() and (automaton.next[automaton.ends] == -1).all()
    fewest = int(automaton.distance[automaton.start])
    seen = set()
    for room in [fewest] * 5 + [fewest + 1, fewest + 3, fewest + 20] * 5:
        tokens = walk(automaton, rng, room)
        assert len(tokens) <= room and tokens[-1] in words.ends
        text = b"".join(words.texts[token] for token in tokens[:-1]).decode()
        assert is_right(control, text), text
        seen.add(text)
    assert len(seen) > 1


@pytest.mark.parametrize("name", CASES)
def test_a_step_brings_the_end_nearer_by_one_token_at_most(name, words):
    automaton = build(CASES[name], words)
    best = np.where(automaton.next >= 0, automaton.distance[automaton.next], 9999).min(1)
    assert (automaton.distance[~automaton.ends] == best[~automaton.ends] + 1).all()


def characters(alphabet: str) -> TokenTexts:
    """As a character tokenizer: padding, then the characters, of which the last ends the text."""
    texts = (None, *(character.encode() for character in alphabet))
    return TokenTexts(texts, (len(alphabet),), lambda text: [1 + alphabet.index(c) for c in text], alphabet)


def test_the_end_token_of_a_character_tokenizer_is_a_part_of_the_pattern():
    words = characters("0123456789+#")
    automaton = build(RegexControl(pattern="[0-9]{1,3}#"), words)
    state = automaton.start
    for token in words.encode("12#"):
        state = automaton.next[state, automaton.classes[token]]
    assert automaton.ends[state] and automaton.distance[automaton.start] == 2
    with pytest.raises(UserError, match="do not end with an end token, want texts that end with '#'"):
        build(RegexControl(pattern="[0-9]{1,3}"), words)
    with pytest.raises(UserError, match="no token has some of them, such as 'x'"):
        build(RegexControl(pattern="x[0-9]#"), words)


@pytest.mark.parametrize(
    ("limit", "wanted"),
    [
        # 17 states of the pattern.
        ("MAX_STATES", "got a grammar of 17 states, want at most 3: fewer or shorter"),
        ("MAX_CLASSES", "classes of tokens, want at most 3"),
        ("MAX_TABLE", "entries in its table, want at most 3"),
        ("MAX_COLUMNS", "entries in its columns, want at most 3"),
    ],
)
def test_a_grammar_that_is_too_large_is_refused(limit, wanted, words, monkeypatch):
    monkeypatch.setattr(vocabulary_walk, limit, 3)
    with pytest.raises(UserError, match=wanted) as refused:
        build(RegexControl(pattern="(abcd){4}"), words)
    assert str(refused.value).startswith("rollout.control: got a grammar of ")


def test_half_a_surrogate_pair_is_refused(words):
    with pytest.raises(UserError, match=r"^rollout\.control\.texts: got 'b\\ud800', want whole characters"):
        build(ChoiceControl(texts=("a", "b\ud800")), words)


def test_a_schema_in_a_file_is_named(words, tmp_path):
    path = tmp_path / "s.json"
    path.write_text('{"type": "integer"}')
    assert len(build(JsonSchemaControl(path=str(path)), words).next) == 5

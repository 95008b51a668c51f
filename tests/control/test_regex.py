"""Regular expressions as automata over bytes: exactly the texts that match as a whole, whatever outlines-core makes of them."""

import itertools
import random
import re

import outlines_core
import pytest

from jaxrl_llm.control import regex
from jaxrl_llm.control.byte_automaton import DEAD, ByteAutomaton
from jaxrl_llm.control.compile_pattern import transitions
from jaxrl_llm.errors import UserError


@pytest.fixture
def in_process(monkeypatch):
    """Without a process per pattern."""
    monkeypatch.setattr(regex, "_transitions", lambda pattern, named: transitions(pattern))


def accepts(automaton: ByteAutomaton, text: str | bytes) -> bool:
    state = automaton.start
    for byte in text.encode() if isinstance(text, str) else text:
        state = automaton.next[state, byte] if state != DEAD else DEAD
    return state != DEAD and bool(automaton.accepts[state])


def mismatches(pattern: str, letters: str, longest: int) -> list[str]:
    """Texts of these letters on which the automaton and Python's `re` differ."""
    automaton = regex.from_regex(pattern, "here")
    texts = ("".join(text) for n in range(longest + 1) for text in itertools.product(letters, repeat=n))
    return [text for text in texts if accepts(automaton, text) != bool(re.fullmatch(pattern, text))]


def outlines_accepts(pattern: str, text: str) -> bool:
    """What outlines-core's own index says."""
    alphabet = outlines_core.Vocabulary(256, {bytes([byte]): [byte] for byte in range(256)})
    index = outlines_core.Index(pattern, alphabet)
    state = index.get_initial_state()
    for byte in text.encode():
        state = index.get_transitions().get(state, {}).get(byte) if state is not None else None
    return state is not None and index.is_final_state(state)


def test_alternatives_and_continued_matches_that_outlines_core_loses(in_process):
    for pattern, text in (("a|ab", "ab"), (r"[a-z]+(\.[a-z])?", "ab.c"), ("a*?b?", "aab")):
        assert accepts(regex.from_regex(pattern, "here"), text)
    # If these fail, outlines-core was repaired, and what is around the pattern may go.
    assert not outlines_accepts("a|ab", "ab")
    assert not outlines_accepts(r"[a-z]+(\.[a-z])?", "ab.c")


@pytest.mark.parametrize(
    ("pattern", "letters"),
    [
        ("a|ab|abc", "abc"),
        ("(a|ab)(c|bcd)", "abcd"),
        ("a*?", "ab"),
        ("(|a)b", "ab"),
        ("(?:a|ab)*?b?", "ab"),
        ("é|éa|a é", "éa \xc3"),
        ("[^<]{1,2}", "<é漢🙂a"),
        (".", "a\né🙂"),
        ("(?s:.)", "a\né🙂"),
        ("(?i)éa", "éÉaA"),
        ("^a|b$", "ab"),
        ("^(?:ab|b)$", "ab"),
        ("x$|xy", "xy"),
        (r"\x00|\x01|\x00\x01", "\x00\x01a"),
        ("", "ab"),
        (r"[\^a]\^|[)(]\)", "^a)("),
        ("a{2}|a{3,}b", "ab"),
    ],
)
def test_texts_of_a_pattern(pattern, letters, in_process):
    assert mismatches(pattern, letters, 4) == []


def random_pattern(rng: random.Random, depth: int) -> str:
    if not depth or rng.random() < 0.2:
        return rng.choice("abc")
    first, second = (random_pattern(rng, depth - 1) for _ in range(2))
    repeat = rng.choice(["*", "?", "+", "{0,2}", "*?", "??", "+?"])
    return rng.choice([f"(?:{first}|{second})", first + second, f"(?:{first}){repeat}", f"(?:|{first})"])


@pytest.mark.parametrize("seed", range(4))
def test_random_patterns_against_python(seed, in_process):
    rng = random.Random(seed)
    for _ in range(20):
        pattern = f"{random_pattern(rng, 4)}|{random_pattern(rng, 4)}"
        assert mismatches(pattern, "abc", 5) == [], pattern


def test_bytes_that_are_no_character_are_refused(in_process):
    automaton = regex.from_regex("[^<]*", "here")
    assert accepts(automaton, "é漢🙂")
    # A continuation alone, overlong, a surrogate, beyond U+10FFFF, incomplete.
    for text in (b"\x80", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc3"):
        assert not accepts(automaton, text)


def test_what_comes_before_the_pattern_multiplies_no_states(in_process):
    # outlines-core also looks for matches that begin later, at each literal that comes again: 2,206 states for the first, and more
    # than 2^20 for the second.
    assert len(regex.from_regex("Answer: .{1,200}", "here").next) < 1700
    assert len(regex.from_regex("a.{24}", "here").next) < 250


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("(", "want a regular expression of Rust's regex crate: missing ), unterminated subpattern"),
        ("[a", "unterminated character set"),
        ("a)(b", "want balanced parentheses"),
        ("(?=a)b", "no look-around"),
        (r"(a)\1", "no back-references"),
        ("a^b", "want it without ^: a response matches as a whole"),
        (r"b\Aa", r"want it without \A"),
        ("a\ud800", "want whole characters"),
        (r"\bfoo", "Unicode word boundaries"),
    ],
)
def test_wrong_patterns_are_refused(pattern, wanted):
    with pytest.raises(UserError) as refused:
        regex.from_regex(pattern, "rollout.control.pattern")
    assert str(refused.value).startswith(f"rollout.control.pattern: got {pattern!r}, want ")
    assert wanted in str(refused.value)


def test_a_pattern_whose_automaton_takes_too_long_is_refused(monkeypatch):
    monkeypatch.setattr(regex, "SECONDS", 1.0)
    with pytest.raises(UserError, match=r"want a smaller pattern: .*; its automaton took more than 1 seconds"):
        regex.from_regex("(a{1,1000}){1,1000}", "here")


@pytest.mark.slow
def test_a_pattern_that_runs_out_of_memory_ends_its_own_process_alone(monkeypatch, tmp_path):
    # With the limit of the compiler at 200 MB in place of 4 GB, which takes half a minute to fill.
    small = tmp_path / "compiler.py"
    small.write_text(regex.COMPILER.read_text().replace("MEMORY = 4 << 30", "MEMORY = 200 << 20"))
    monkeypatch.setattr(regex, "COMPILER", small)
    with pytest.raises(
        UserError, match=r"want a smaller pattern: .*; its automaton could not be worked out \(.*memory"
    ):
        regex.from_regex("(.*a.{15})", "here")


def test_a_long_pattern_is_shown_in_part():
    with pytest.raises(UserError) as refused:
        regex.from_regex("a" * 1000 + "(", "here")
    assert len(str(refused.value)) < 400

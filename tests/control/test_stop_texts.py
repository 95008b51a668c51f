"""Stop texts end a row at the token where the search of the host ends it."""

import pytest
from control_rows import states_of, vocabulary
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from jaxrl_llm.control.config import StopControl
from jaxrl_llm.control.stop import stop
from jaxrl_llm.control.text_search import searching
from jaxrl_llm.errors import UserError
from jaxrl_llm.rollout.output import first_end
from jaxrl_llm.tasks.tokenizer import Tokenizer

# As Qwen's and Llama 3's: é and the emoji are two and four tokens. Ids: é 0 1, emoji 2-5, then the others.
SPELLED = [*"Ã©ðŁĺĢ", "a", "b", "ab", "bab", "aÃ©", "Ċ"]
TEXTS = [*("é".encode()[i : i + 1] for i in range(2)), *("😀".encode()[i : i + 1] for i in range(4))]
TEXTS += ["a", "b", "ab", "bab", "aé", "\n", None, None]
SPECIAL, END = 12, 13
TOKENS = vocabulary(TEXTS, (END,), {"<s>": SPECIAL, "<e>": END})


def tokenizer() -> Tokenizer:
    backend = Backend(models.WordLevel({text: i for i, text in enumerate(SPELLED)}, unk_token="a"))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "<e>")])
    return Tokenizer(backend, pad=END, eos=(END,), write=lambda out: None)


HOST = tokenizer()


def end_on_the_host(tokens: list[int], texts: tuple[str, ...]) -> int | None:
    """Tokens of the row, None if it does not end."""
    ends = [tokens.index(END) + 1] if END in tokens else []
    found = first_end(tokens, 0, texts, HOST.spellings)
    return min([*ends, *([found] if found else [])], default=None)


def end_by_states(tokens: list[int], texts: tuple[str, ...]) -> int | None:
    automaton = stop(StopControl(texts=texts), TOKENS)
    states = states_of(automaton, tokens)
    # Nothing but an end is refused, and nothing follows it.
    ended = [n for n, state in enumerate(states) if state >= 0 and automaton.ends[state]]
    assert len(ended) <= 1 and (ended or min(states) >= 0) and automaton.distance.max() == 0
    return ended[0] if ended else None


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.lists(st.integers(0, SPECIAL), min_size=1, max_size=40),
    texts=st.lists(st.text("abé😀\n", min_size=1, max_size=4), min_size=1, max_size=3).map(tuple),
    ends=st.booleans(),
)
@example(tokens=[6, 0, 1, 7], texts=("éb",), ends=False)  # a character of several tokens
@example(tokens=[6, 9, 7], texts=("ba", "bab"), ends=False)  # inside a token, one text in the other
@example(tokens=[6, 7, 6, 6, 7], texts=("abaa", "aab"), ends=False)  # the begin of one is the middle of the other
@example(tokens=[6, SPECIAL, 7], texts=("ab",), ends=True)  # as graders read it
@example(tokens=[0, 0, 1, 2, 3, 0, 1], texts=("é",), ends=False)  # incomplete characters before
@example(tokens=[6, SPECIAL, 7], texts=("<s>", "bab"), ends=False)  # a special token
def test_a_row_ends_where_the_host_ends_it(tokens, texts, ends):
    tokens = tokens + [END] * ends
    assert end_by_states(tokens, texts) == end_on_the_host(tokens, texts)


def test_what_the_host_finds_beside():
    """It also searches the names of special tokens, of which the automaton knows only whole ones."""
    assert end_on_the_host([SPECIAL, 6], ("s>a",)) == 2
    with pytest.raises(
        UserError, match=r"texts: got 'a<s>', tokens \[6, 12\], of which \[12\] are special; want one special"
    ):
        stop(StopControl(texts=("a<s>",)), TOKENS)


def test_transitions_by_hand():
    """Texts "ab" and "b": states "" and "a", and 2 behind either."""
    table = searching([b"ab", b"b"])
    assert table.shape == (2, 256)
    assert [table[0, c] for c in b"abc"] == [1, 2, 0] and [table[1, c] for c in b"abc"] == [1, 2, 0]
    # "aab" in "aaab": two a's stay two a's.
    assert [searching([b"aab"])[2, c] for c in b"abc"] == [2, 3, 0]


def test_an_end_token_with_a_text_ends_the_row_and_is_searched():
    tokens = vocabulary(["a", "#"], (1,))
    automaton = stop(StopControl(texts=("aa",)), tokens)
    assert automaton.ends[states_of(automaton, [0, 1])[-1]] and automaton.ends[states_of(automaton, [0, 0])[-1]]

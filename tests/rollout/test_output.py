"""Stop strings: a completion ends at the first token after which its text contains one, for any tokenizer."""

from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from jaxrl_llm.rollout.output import first_end
from jaxrl_llm.tasks.tokenizer import Tokenizer


def of(backend: Backend) -> Tokenizer:
    backend.add_special_tokens([AddedToken("</a>", special=True), AddedToken("é|", special=True)])
    backend.add_tokens([AddedToken("<t>", special=False)])
    return Tokenizer(backend, pad=0, eos=(0,), write=lambda out: None)


@cache
def byte_level() -> Tokenizer:
    """As Qwen's and Llama 3's: é and the emoji are two and four tokens. Ids: _ 0, é 1 2, emoji 3-6, a 7, b 8, ab 9."""
    backend = Backend(models.WordLevel({t: i for i, t in enumerate(["_", *"Ã©ðŁĺĢ", "a", "b", "ab"])}, unk_token="_"))
    backend.decoder = decoders.ByteLevel()
    return of(backend)


@cache
def byte_fallback() -> Tokenizer:
    """As Llama 2's and Gemma's: a run of bytes is text only as a whole. Bytes: line break 1, euro 2-4."""
    names = ["▁a", "<0x0A>", "<0xE2>", "<0x82>", "<0xAC>", "a", "b", "▁", "ab"]
    backend = Backend(models.WordLevel({t: i for i, t in enumerate(names)}, unk_token="a"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return of(backend)


TOKENIZERS = {"byte level": byte_level, "byte fallback": byte_fallback}
STOP = st.lists(st.text("ab\nàé€😀\ufffd<>/ t|", min_size=1, max_size=4), min_size=1, max_size=2).map(tuple)


def by_searching_every_prefix(tokenizer: Tokenizer, tokens: list[int], stop: tuple[str, ...]) -> int | None:
    """Expected end: search the text after every token."""
    for n in range(1, len(tokens) + 1):
        whole = tokenizer.backend.decode(tokens[:n], skip_special_tokens=False)
        read = tokenizer.decode(tokens[:n])
        if any(s in whole or s in read for s in stop):
            return n
    return None


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(0, 12), min_size=1, max_size=90), stop=STOP, chunk=st.integers(1, 9))
@example(tokens=[1, 2, 3, 4], stop=("\n",), chunk=4)  # no line break while the bytes after it are incomplete
@example(tokens=[7, 1, 2, 7, 1, 7], stop=("\ufffd",), chunk=6)
@example(tokens=[5, *[9] * 60, 6], stop=("ab",), chunk=3)  # special tokens in between, which graders do not see
@example(
    tokens=[*[8] * 5, *[2, 3, 4] * 30, 5], stop=("€a",), chunk=1
)  # decoded from inside a character, the whole run is broken
@example(tokens=[7, *[9] * 12, 7], stop=("ab" * 8,), chunk=1)  # longer than the last chunk
def test_a_row_ends_where_searching_every_prefix_ends_it(name, tokens, stop, chunk):
    tokenizer, seen, found = TOKENIZERS[name](), 0, None
    while seen < len(tokens) and found is None:
        now = min(seen + chunk, len(tokens))
        found = first_end(tokens[:now], seen, stop, tokenizer.spellings)
        seen = now
    assert found == by_searching_every_prefix(tokenizer, tokens, stop)


def test_special_tokens_alone_within_and_in_pieces():
    texts_of = byte_level().spellings
    special = byte_level().backend.token_to_id("</a>")
    assert first_end([7, special, 8], 0, ("</a>",), texts_of) == 2
    assert first_end([7, special, 8, 8], 0, ("a</a>bb",), texts_of) == 4
    assert first_end([7, special, 8], 0, ("ab",), texts_of) == 3  # as graders read it
    assert first_end([7, 8], 0, ("</a>",), texts_of) is None


def test_ordinary_rows_are_not_decoded_again():
    """In a row of 4,000 tokens only the end is decoded; a few times more if a stop string is found, and once per token with half
    characters."""
    read = []

    def texts_of(tokens: list[int]) -> tuple[str, ...]:
        read.append(len(tokens))
        return byte_level().spellings(tokens)

    def tokens_read(end: list[int], want: int | None) -> int:
        read.clear()
        assert first_end([9] * 3900 + end, 3900, ("</answer>", "aab"), texts_of) == want
        return sum(read)

    assert tokens_read([9] * 100, None) < 300
    assert tokens_read([9] * 50 + [7] + [9] * 49, 3952) < 3000
    assert tokens_read([9] * 50 + [1] * 50, None) < 30_000

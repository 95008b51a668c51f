"""Where a response ends by its text: the first token after which the text holds a stop text, whatever tokenizer wrote it."""

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
    """As Llama 2's and Gemma's: a run of bytes is text as a whole, or not at all. Bytes: line break 1, euro 2-4."""
    names = ["▁a", "<0x0A>", "<0xE2>", "<0x82>", "<0xAC>", "a", "b", "▁", "ab"]
    backend = Backend(models.WordLevel({t: i for i, t in enumerate(names)}, unk_token="a"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return of(backend)


TOKENIZERS = {"byte level": byte_level, "byte fallback": byte_fallback}
STOP = st.lists(st.text("ab\nàé€😀\ufffd<>/ t|", min_size=1, max_size=4), min_size=1, max_size=2).map(tuple)


def by_looking(tokenizer: Tokenizer, tokens: list[int], stop: tuple[str, ...]) -> int | None:
    """After every token."""
    for n in range(1, len(tokens) + 1):
        whole = tokenizer.backend.decode(tokens[:n], skip_special_tokens=False)
        read = tokenizer.decode(tokens[:n])
        if any(s in whole or s in read for s in stop):
            return n
    return None


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(0, 12), min_size=1, max_size=90), stop=STOP, look=st.integers(1, 9))
@example(tokens=[1, 2, 3, 4], stop=("\n",), look=4)  # the line break is gone while the bytes behind it are no character
@example(tokens=[7, 1, 2, 7, 1, 7], stop=("\ufffd",), look=6)
@example(tokens=[5, *[9] * 60, 6], stop=("ab",), look=3)  # special tokens in between, which no reader sees
@example(
    tokens=[*[8] * 5, *[2, 3, 4] * 30, 5], stop=("€a",), look=1
)  # from the middle of a character none of its run is one
@example(tokens=[7, *[9] * 12, 7], stop=("ab" * 8,), look=1)  # more than a token before the last look
def test_a_row_ends_where_looking_after_every_token_ends_it(name, tokens, stop, look):
    tokenizer, seen, found = TOKENIZERS[name](), 0, None
    while seen < len(tokens) and found is None:
        now = min(seen + look, len(tokens))
        found = first_end(tokens[:now], seen, stop, tokenizer.spellings)
        seen = now
    assert found == by_looking(tokenizer, tokens, stop)


def test_special_tokens_alone_within_and_in_pieces():
    detokenize = byte_level().spellings
    special = byte_level().backend.token_to_id("</a>")
    assert first_end([7, special, 8], 0, ("</a>",), detokenize) == 2
    assert first_end([7, special, 8, 8], 0, ("a</a>bb",), detokenize) == 4
    assert first_end([7, special, 8], 0, ("ab",), detokenize) == 3  # as graders read it
    assert first_end([7, 8], 0, ("</a>",), detokenize) is None


def test_ordinary_rows_are_not_read_anew():
    """A look at a row of 4,000 tokens reads its end alone, one that it ends few times more, and half characters in it as often as
    there are tokens."""
    read = []

    def detokenize(tokens: list[int]) -> tuple[str, ...]:
        read.append(len(tokens))
        return byte_level().spellings(tokens)

    def tokens_read(end: list[int], want: int | None) -> int:
        read.clear()
        assert first_end([9] * 3900 + end, 3900, ("</answer>", "aab"), detokenize) == want
        return sum(read)

    assert tokens_read([9] * 100, None) < 300
    assert tokens_read([9] * 50 + [7] + [9] * 49, 3952) < 3000
    assert tokens_read([9] * 50 + [1] * 50, None) < 30_000

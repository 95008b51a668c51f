"""The token that holds a character of the decoded text: for tokenizers of characters, of bytes, and of words with spaces."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_setup import save_tokenizer
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from jaxrl_llm.tasks.config import CharacterTokenizer, PretrainedTokenizer
from jaxrl_llm.tasks.tokenizer import Tokenizer, load_tokenizer


def of(names, decoder) -> Tokenizer:
    """Token 0 is special, the next to last one added but not special."""
    backend = Backend(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[0]))
    backend.decoder = decoder
    backend.add_special_tokens([AddedToken(names[0], special=True), AddedToken("</a>", special=True)])
    backend.add_tokens([AddedToken("<t>", special=False)])
    return Tokenizer(backend, pad=0, eos=(0,), write=lambda out: None)


@cache
def byte_level() -> Tokenizer:
    """As Qwen's: é is tokens 1 2, the emoji 3 to 6; a line break 7, two of them 8, a break and an a 9, b 10."""
    return of(["<e>", *"Ã©ðŁĺĢ", "Ċ", "ĊĊ", "Ċa", "b"], decoders.ByteLevel())


@cache
def byte_fallback() -> Tokenizer:
    """As Llama 2's: bytes, line break 2 and euro 3 to 5, are text only as a whole run; a word's first space is its own part."""
    names = ["<e>", "▁a", "<0x0A>", "<0xE2>", "<0x82>", "<0xAC>", "a", "b", "▁", "▁▁▁", "ab"]
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return of(names, decoders.Sequence(parts))


@cache
def metaspace() -> Tokenizer:
    return of(["<e>", "▁a", "▁", "a", "▁▁", ".", "b"], decoders.Metaspace())


@cache
def word_pieces() -> Tokenizer:
    """Spaces are between tokens, but not before a part of a word or a period."""
    return of(["<e>", "a", "##b", "b", ".", "##."], decoders.WordPiece())


ALL = {"byte level": byte_level, "byte fallback": byte_fallback, "metaspace": metaspace, "word pieces": word_pieces}


def by_every_prefix(tokenizer: Tokenizer, ids: list[int], end: int) -> int:
    """The first token behind which the text begins as the whole does, up to this character."""
    text = tokenizer.decode(ids)
    return next(n for n in range(len(ids)) if tokenizer.decode(ids[: n + 1])[:end] == text[:end])


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_tokens_in_any_order(name, data):
    """Characters that are text alone: a replacement character stands for bytes of which nobody knows where they end."""
    tokenizer = ALL[name]()
    ids = data.draw(st.lists(st.integers(0, tokenizer.size - 1), max_size=60))
    text = tokenizer.decode(ids)
    ends = [n + 1 for n, c in enumerate(text) if c != "\ufffd"]
    assert tokenizer.tokens_at(ids, ends) == [by_every_prefix(tokenizer, ids, end) for end in ends]


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(text=st.text("ab €😀\n.3", max_size=20), data=st.data())
def test_a_trained_byte_level_tokenizer(text, data, trained):
    tokenizer = trained
    ids = [*tokenizer.encode(text), *data.draw(st.lists(st.integers(0, 3), max_size=2))]
    ends = list(range(1, len(text) + 1))
    assert tokenizer.decode(ids) == text
    assert tokenizer.tokens_at(ids, ends) == [by_every_prefix(tokenizer, ids, end) for end in ends]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(PretrainedTokenizer(str(save_tokenizer(tmp_path_factory.mktemp("bpe")))))


def test_characters_whose_bytes_are_several_tokens_by_hand():
    """<e> é(1 2) break emoji(3-6) break-a: the text is "é\\n😀\\na"."""
    ids = [0, 1, 2, 7, 3, 4, 5, 6, 9]
    tokenizer = byte_level()
    assert tokenizer.decode(ids) == "é\n😀\na"
    assert tokenizer.tokens_at(ids, [1, 2, 3, 4, 5]) == [2, 3, 7, 8, 8]
    assert tokenizer.tokens_at(ids, []) == []


def test_a_token_that_ends_two_lines_and_special_tokens_between():
    ids = [10, 0, 8, 0, 10, 0]
    assert byte_level().decode(ids) == "b\n\nb"
    assert byte_level().tokens_at(ids, [1, 2, 3, 4]) == [0, 2, 2, 4]


def test_a_run_of_bytes_that_is_no_text_does_not_move_what_follows():
    """Two breaks behind half a euro are replaced as well, as Llama 2's decoder does; the a behind them is the token 4."""
    ids = [3, 2, 2, 6, 7]
    assert byte_fallback().decode(ids) == "\ufffd\ufffd\ufffdab"
    assert byte_fallback().tokens_at(ids, [4, 5]) == [3, 4]


def test_characters():
    tokenizer = load_tokenizer(CharacterTokenizer())
    ids = tokenizer.encode("12+3#")
    assert tokenizer.tokens_at(ids, [1, 3, 5]) == [0, 2, 4]

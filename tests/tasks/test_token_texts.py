"""Texts of tokens, joined, are the decoded text; what is not so is refused."""

import json
import string
from pathlib import Path

import pytest
from tokenizer_setup import SPECIAL, save_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks.config import PretrainedTokenizer
from jaxrl_llm.tasks.token_texts import token_texts
from jaxrl_llm.tasks.tokenizer import character_tokenizer, load_tokenizer

SENTENCES = [
    "The answer is 7.",
    "  two spaces\n\tand a tab",
    "naïve café, 漢字 and 🙂",
    "",
    " leading",
    '{"a": [1, 2]}',
]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("byte_level"))


def test_byte_level(byte_level):
    tokenizer = load_tokenizer(PretrainedTokenizer(path=str(byte_level)))
    texts, drops_space = tokenizer.texts
    assert not drops_space and len(texts) == tokenizer.size
    for sentence in SENTENCES:
        assert b"".join(texts[id] for id in tokenizer.encode(sentence)) == sentence.encode()
    # Special tokens have no text, added ones that are not special have theirs.
    assert [texts[tokenizer.backend.token_to_id(name)] for name in SPECIAL] == [None] * 4
    assert texts[tokenizer.backend.token_to_id("<think>")] == b"<think>"
    # Parts of characters are bytes: é is C3 A9, spelled Ã and ©.
    assert texts[tokenizer.backend.token_to_id("Ã")] == b"\xc3" and texts[tokenizer.backend.token_to_id("©")] == b"\xa9"


def test_all_bytes_of_byte_level_are_there(byte_level):
    texts = load_tokenizer(PretrainedTokenizer(path=str(byte_level))).texts.texts
    assert {bytes([byte]) for byte in range(256)} <= set(texts)


def test_characters():
    tokenizer = character_tokenizer("0123+=é#")
    texts, drops_space = tokenizer.texts
    assert not drops_space
    # Padding has no text; the end token # has.
    assert texts == (None, b"0", b"1", b"2", b"3", b"+", b"=", "é".encode(), b"#")
    assert tokenizer.eos == (8,)


def sentencepiece(strip: bool) -> Tokenizer:
    """As in Llama 2 (`strip`) and Gemma: pieces of characters, byte fallback, ▁ for spaces."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *string.ascii_letters]
    pieces += ["▁t", "▁th", "▁a", "in", "he", ".", "▁▁"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁", "a"), ("i", "n"), ("h", "e"), ("▁", "▁")]
    model = models.BPE(
        {piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")] if strip else [normalizers.Replace(" ", "▁")]
    )
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if strip else parts)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return backend


@pytest.mark.parametrize("strip", [True, False])
def test_sentencepiece(strip):
    backend = sentencepiece(strip)
    texts, drops_space = token_texts(backend, backend.get_vocab_size(), {0, 1, 2})
    assert drops_space == strip
    assert texts[:3] == (None, None, None) and texts[3 + 0xE6] == b"\xe6"
    assert texts[backend.token_to_id("▁th")] == b" th" and texts[backend.token_to_id("<think>")] == b"<think>"
    for sentence in SENTENCES:
        ids = backend.encode(sentence, add_special_tokens=False).ids
        joined = b"".join(texts[id] for id in ids)
        assert (joined.removeprefix(b" ") if strip else joined) == sentence.encode()
        assert backend.decode(ids) == sentence


def test_word_pieces_are_refused():
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "##re": 2, "a": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    with pytest.raises(
        UserError, match=r"^tokenizer: got tokens whose text depends on those before them .*are 'the the'"
    ):
        token_texts(backend, 4, {0})


def test_a_tokenizer_that_joins_words_by_spaces_is_refused():
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(UserError, match="behind 'a' the two are 'a a'"):
        token_texts(backend, 2, set())


def test_ids_without_a_token_have_no_text(byte_level, tmp_path):
    values = json.loads((byte_level / "tokenizer.json").read_text())
    last = max(token["id"] for token in values["added_tokens"])
    values["added_tokens"].append({**values["added_tokens"][-1], "id": last + 1, "content": "<more>"})
    backend = Tokenizer.from_str(json.dumps(values))
    texts = token_texts(backend, last + 4, set(range(len(SPECIAL)))).texts
    assert texts[last + 1] == b"<more>" and texts[last + 2 :] == (None, None)

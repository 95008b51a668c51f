"""The character tokenizer, and properties of every tokenizer: round trips, display names, files that transformers reads."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_setup import save_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from jaxrl_llm.config import loading
from jaxrl_llm.errors import UserError
from jaxrl_llm.roles import inputs
from jaxrl_llm.roles.blueprint import blueprint_of
from jaxrl_llm.tasks.config import CharacterTokenizer, PretrainedTokenizer
from jaxrl_llm.tasks.tokenizer import BATCH, Tokenizer, load_tokenizer

ODD = load_tokenizer(CharacterTokenizer("ab +#<>é∑\n\t😀"))
DIGITS = load_tokenizer(CharacterTokenizer())


def test_characters_by_hand():
    """Token 0 is padding, the digits 1 to 10, then + < > space #."""
    assert (DIGITS.size, DIGITS.pad, DIGITS.eos) == (16, 0, (15,))
    assert DIGITS.encode("<3+4>") == DIGITS.prompt("<3+4>") == [12, 4, 11, 5, 13]
    assert DIGITS.encode_batch(["12#", "", "0"]) == [[2, 3, 15], [], [1]]
    assert DIGITS.decode([2, 3, 15]) == "12#"
    assert DIGITS.decode_batch([[12, 4], [], [1]]) == ["<3", "", "0"]
    assert [DIGITS.token(i) for i in (0, 1, 14, 15, 16)] == ["<pad>", "0", " ", "#", "<16>"]


def test_more_texts_than_a_batch_stay_in_order():
    texts = [str(i) for i in range(BATCH + 2)]
    assert DIGITS.decode_batch(DIGITS.encode_batch(texts)) == texts


def test_graders_see_sampled_padding():
    """Otherwise "1<pad>2#" would be graded as "12#"."""
    assert DIGITS.decode([2, 0, 3, 15]) == "1<pad>2#"


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="ab +#<>é∑\n\t😀", max_size=12))
def test_every_text_of_the_alphabet_round_trips(text):
    """One token per character, including spaces, line ends and multi-byte characters."""
    ids = ODD.encode(text)
    assert len(ids) == len(text) and 0 not in ids
    assert ODD.decode(ids) == text and "".join(map(ODD.token, ids)) == text


def test_unknown_characters_are_an_error_that_names_them():
    assert DIGITS.unknown_characters("3x+yx") == ["x", "y"] and DIGITS.unknown_characters("<3+4> 12#") == []
    # Padding has a token, but its letters have none.
    assert DIGITS.unknown_characters("<pad>") == ["p", "a", "d"]
    with pytest.raises(UserError, match=r"tokenizer.alphabet: got characters 'x' 'y', want only those in it"):
        DIGITS.encode("3x+yx")
    with pytest.raises(UserError, match=r"got characters 'x'"):
        DIGITS.prompt_batch(["1", "x"])


@pytest.mark.parametrize("alphabet", ["", "a", "abca"])
def test_an_alphabet_needs_two_different_characters(alphabet):
    with pytest.raises(UserError, match=r"tokenizer.alphabet: got '.*', want at least two characters"):
        load_tokenizer(CharacterTokenizer(alphabet))


def test_the_character_tokenizer_is_exported_for_transformers(tmp_path):
    from transformers import AutoTokenizer

    DIGITS.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("<3+4>12#").input_ids == DIGITS.encode("<3+4>12#")
    assert (theirs.pad_token_id, theirs.eos_token_id, len(theirs)) == (0, 15, 16)
    assert theirs.decode([12, 4, 11, 5, 13]) == "<3+4>"
    again = load_tokenizer(PretrainedTokenizer(str(tmp_path), chat=False))
    assert (again.size, again.pad, again.eos) == (16, 0, (15,))
    assert again.prompt("<3+4>") == [12, 4, 11, 5, 13]
    # Writing it leaves the one in use as it was: the end stays visible to graders.
    assert DIGITS.decode([2, 3, 15]) == "12#"


def test_a_stop_text_that_cannot_occur_is_refused_by_character():
    """Also an empty text, which would end every response."""
    cfg = loading.validate({"rollout": {"stop": ["12", "</answer>", "\n\n", ""]}}, "x")
    with pytest.raises(UserError) as caught:
        blueprint_of(cfg, inputs.read(cfg))
    assert str(caught.value).splitlines() == [
        "rollout.stop: got '', want text: every response would end with its first token",
        "rollout.stop: got '</answer>', want text that tokens can spell: no token has '/' 'a' 'n' 's' 'w' 'e' 'r'",
        "rollout.stop: got '\\n\\n', want text that tokens can spell: no token has '\\n'",
    ]


def words(*names: str, normalizer=None) -> Tokenizer:
    backend = Backend(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[0]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.WhitespaceSplit(), decoders.Fuse()
    if normalizer is not None:
        backend.normalizer = normalizer
    return Tokenizer(backend, pad=0, eos=(0,), write=lambda out: None)


def test_characters_that_a_vocabulary_can_spell(tmp_path):
    """Bytes spell everything, words only their letters; a normalizer does not change sampled text."""
    plain = load_tokenizer(PretrainedTokenizer(str(save_tokenizer(tmp_path)), chat=False))
    assert plain.unspellable_characters("</answer> \n\u00e9\ufffd\U0001f600<|im_end|>") == []
    assert words("[UNK]", "Stop", "now").unspellable_characters("Stop, nowhere") == [",", " ", "h", "e", "r"]
    assert words("[UNK]", "Stop", "now", normalizer=normalizers.Lowercase()).unspellable_characters("Stop") == []

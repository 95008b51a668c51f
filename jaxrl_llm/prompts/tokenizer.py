"""The character tokenizer, made with the `tokenizers` library: token 0 is padding, then one token a character."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

PAD = "<pad>"


def character_tokenizer(alphabet: str) -> Tokenizer:
    """One token for each character of `alphabet`; a character outside of it is an error, never an unknown token."""
    vocab = {token: i for i, token in enumerate([PAD, *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def unknown_characters(text: str, tokenizer: Tokenizer) -> list[str]:
    """Characters of `text` that have no token of their own, in order, each once."""
    return [c for c in dict.fromkeys(text) if tokenizer.token_to_id(c) is None]

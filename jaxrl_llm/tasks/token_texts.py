"""Text of each token as decoded responses have it, in bytes: a token may be a part of a character."""

import json
import re
from collections.abc import Collection
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from jaxrl_llm.errors import UserError

if TYPE_CHECKING:
    import tokenizers

BYTE = re.compile("<0x([0-9A-F]{2})>")


class Texts(NamedTuple):
    """Texts of a tokenizer's tokens."""

    texts: tuple[bytes | None, ...]
    """Text per token id; None: no text."""
    drops_space: bool
    """Decoding leaves out a space at the beginning of a response, as with SentencePiece, where words begin with one."""


@cache
def _bytes_of_characters() -> dict[str, int]:
    """Characters by which byte-level BPE spells bytes: what can be printed stands for itself, the rest from U+0100 on (GPT-2's
    `bytes_to_unicode`)."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(rest)}


def token_texts(backend: "tokenizers.Tokenizer", size: int, without: Collection[int]) -> Texts:
    """Return the texts of the tokens 0 to size - 1.

    Args:
        backend: The tokenizer.
        size: Number of token ids.
        without: Tokens without a text: special ones.

    Raises:
        UserError: The text of a token depends on the tokens before it, as with WordPiece.
    """
    steps = _steps(json.loads(backend.decoder.__getstate__())) if backend.decoder is not None else []
    names = [None if id in without else backend.id_to_token(id) for id in range(size)]
    texts = tuple(None if name is None else _text(name, steps) for name in names)
    whole = {id: text.decode() for id, text in enumerate(texts) if text and _is_whole(text)}
    anchor = next((id for id, text in whole.items() if not text.startswith(" ")), None)
    if anchor is None:
        raise _dependent("each begins with a space")
    # What was worked out from the decoder's description is what the decoder does, at the beginning and behind another token.
    behind = backend.decode_batch([[anchor, id] for id in whole], skip_special_tokens=True)
    for (id, text), found in zip(whole.items(), behind, strict=True):
        if found != whole[anchor] + text:
            raise _dependent(f"token {id} is {text!r}, but behind {whole[anchor]!r} the two are {found!r}")
    first = backend.decode_batch([[id] for id in whole], skip_special_tokens=True)
    drops = any(found != text for text, found in zip(whole.values(), first, strict=True))
    for (id, text), found in zip(whole.items(), first, strict=True):
        if found != (text.removeprefix(" ") if drops else text):
            raise _dependent(f"token {id} is {text!r}, but {found!r} at the beginning")
    return Texts(texts, drops)


def _dependent(why: str) -> UserError:
    return UserError(
        f"tokenizer: got tokens whose text depends on those before them ({why}), want a tokenizer of bytes, characters or "
        "SentencePiece for rollout.control"
    )


def _steps(decoder: dict) -> list[dict]:
    """Description of a decoder, without nesting."""
    return (
        [step for part in decoder["decoders"] for step in _steps(part)] if decoder["type"] == "Sequence" else [decoder]
    )


def _text(name: str, steps: list[dict]) -> bytes:
    """Text of a token by the parts of the decoder that change it; what they do beside that is found by decoding."""
    for step in steps:
        if step["type"] == "ByteLevel":
            known = _bytes_of_characters()
            return bytes(known[c] for c in name) if all(c in known for c in name) else name.encode()
        if step["type"] == "ByteFallback" and (byte := BYTE.fullmatch(name)):
            return bytes([int(byte[1], 16)])
        if step["type"] == "Replace" and "String" in step["pattern"]:
            name = name.replace(step["pattern"]["String"], step["content"])
        if step["type"] == "Metaspace":
            name = name.replace(step["replacement"], " ")
    return name.encode()


def _is_whole(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True

"""Encoding names of special tokens inside data as ordinary text, so that a row cannot close its own turn.

Names in data are replaced by markers before the chat template is rendered. All names left in the rendered text are then the
template's; they are renamed, and encoded with a copy of the tokenizer whose special tokens have the new names.
"""

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks.turns import FilledText, Spans

if TYPE_CHECKING:
    import tokenizers

PRIVATE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


class SpecialTokens:
    """The special tokens of one tokenizer."""

    def __init__(self, backend: "tokenizers.Tokenizer", also: frozenset[int] = frozenset()):
        """`also`: added tokens to treat as special although they are not flagged as such."""
        added = {id: t for id, t in backend.get_added_tokens_decoder().items() if t.special or id in also}
        self.ids = frozenset(added)
        # Longest first: one name may be a prefix of another.
        self._names = sorted((token.content for token in added.values()), key=len, reverse=True)
        self._pattern = _any_of(self._names)
        normalized = [token.content for token in added.values() if token.normalized]
        self._normalize = backend.normalizer.normalize_str if normalized and backend.normalizer else None
        self._normalized = _any_of([*normalized, *map(self._normalize, normalized)] if self._normalize else [])
        self._copy = cache(lambda mark: _renamed(backend, self._names, mark))

    def names_in_data(self, text: str, data: Spans) -> list[str]:
        """Names of special tokens that overlap with a data span."""
        found = [match.group() for match in self._pattern.finditer(text) if _meets(match, data)]
        if not found and self._normalize:
            found = [
                m.group() for start, end in data for m in self._normalized.finditer(self._normalize(text[start:end]))
            ]
        return found

    def mark_names(self, filled: FilledText, mark: str) -> FilledText:
        """Replace each name in data by its number between two `mark` characters."""

        def put(match: re.Match) -> str:
            return f"{mark}{self._names.index(match.group())}{mark}" if _meets(match, filled.data) else match.group()

        return FilledText(self._pattern.sub(put, filled.text), ())

    def encode(self, texts: Sequence[str], mark: str) -> list[list[int]]:
        """Encode texts from `mark_names`. Raises UserError if the tokenizer cannot be copied with other names."""
        if not texts:
            return []
        pattern = re.compile(f"{mark}(?P<number>[0-9]+){mark}|(?P<name>{self._pattern.pattern})|{mark}")

        def put(match: re.Match) -> str:
            if match["name"]:
                return f"{mark}{match['name']}{mark}"
            return self._names[int(match["number"])] if match["number"] else ""

        found = self._copy(mark).encode_batch_fast([pattern.sub(put, text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in found]


def unused_character(texts: Iterable[str]) -> str:
    """A private-use character that occurs in none of the texts."""
    used = set().union(*texts)
    return next(c for c in map(chr, itertools.chain(*PRIVATE)) if c not in used)


def _any_of(names: Sequence[str]) -> re.Pattern:
    return re.compile("|".join(re.escape(name) for name in names if name) or "(?!)")


def _meets(match: re.Match, data: Spans) -> bool:
    return any(match.start() < end and start < match.end() for start, end in data)


def _renamed(backend: "tokenizers.Tokenizer", names: Sequence[str], mark: str) -> "tokenizers.Tokenizer":
    """A copy of the tokenizer whose special tokens are named `mark` name `mark`."""
    from tokenizers import Tokenizer

    new = {name: f"{mark}{name}{mark}" for name in names}
    try:
        values = json.loads(backend.to_str())
        for token in values["added_tokens"]:
            token["content"] = new.get(token["content"], token["content"])
        values["post_processor"] = None  # it refers to special tokens by name, and is not used
        _rename(values["model"], new)
        copy = Tokenizer.from_str(json.dumps(values))
        if any(copy.token_to_id(new[name]) != backend.token_to_id(name) for name in names):
            raise ValueError("a copy with other names gives other tokens")
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(
            f"tokenizer: special tokens in data cannot be told from text ({error}), want tokenizer.special_in_data: keep, or data "
            "without them"
        ) from None
    return copy


def _rename(model: dict[str, Any], new: dict[str, str]) -> None:
    """Rename in the vocabulary and merges too, where the model would still find the old name."""
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {new.get(word, word): id for word, id in vocab.items()}
    else:
        model["vocab"] = [[new.get(word, word), score] for word, score in vocab]
    if model.get("unk_token") in new:
        model["unk_token"] = new[model["unk_token"]]
    if "merges" in model:
        pairs = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
        model["merges"] = [list(pair) for pair in pairs if not new.keys() & {*pair, "".join(pair)}]

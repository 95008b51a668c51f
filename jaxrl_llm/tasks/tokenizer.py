"""Text to tokens and back. A prompt is encoded once; a completion is decoded for graders and logs, and never re-encoded."""

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks.config import CharacterTokenizer, PretrainedTokenizer
from jaxrl_llm.tasks.special_tokens import SpecialTokens, unused_character
from jaxrl_llm.tasks.token_texts import Texts, token_texts
from jaxrl_llm.tasks.turns import FilledText, PromptError, Turn, Turns, as_turns, from_data, unicode_problem

if TYPE_CHECKING:
    import tokenizers

PAD = "<pad>"
# File of a model directory that says that its tokenizer is one of characters.
CHARACTERS = "character_tokenizer.json"
# An encoding has offsets and the text of each token, about 100 bytes per token: allocating them for all texts at once takes
# longer than the encoding itself.
BATCH = 1024
# Tokens that are read at once where no end is looked for.
SKIPS = 16, 4


def _plain_text(prompts: Sequence[Turns], arguments: Mapping[str, Any]) -> list[str | UserError]:
    many = "got messages, want a prompt of one text: there is no chat template (tokenizer.chat: true, of a pretrained tokenizer)"
    return [
        turns[0].content.text if len(turns) == 1 and turns[0].role == "user" else UserError(many) for turns in prompts
    ]


def _added(whole: str, before: str, rest: str) -> str | None:
    """Return what the whole has behind the text before it, "" if it ends in an incomplete character; None if that is not how the
    rest begins."""
    if whole.startswith(before) and rest.startswith(whole[len(before) :]):
        return whole[len(before) :]
    return "" if whole.endswith("\ufffd") else None


@dataclass(frozen=True, eq=False, repr=False)
class Tokenizer:
    """A tokenizer of the `tokenizers` library with padding, end tokens and prompt rendering."""

    backend: "tokenizers.Tokenizer"
    pad: int
    """Padding token. May equal an end token: padding is identified by length, never by value."""
    eos: tuple[int, ...]
    """End tokens. Any of them ends a sampled response; the first is appended to target responses."""
    write: Callable[[Path], None]
    """Saves files that `AutoTokenizer.from_pretrained` reads."""
    render: Callable[[Sequence[Turns], Mapping[str, Any]], list[str | UserError]] = _plain_text
    """Renders prompts to text, with the chat template if there is one and further arguments for it. Returns errors in place of
    texts; the result may end at an error."""
    chat_template: str | None = None
    """Source of the chat template; None: prompts are plain texts."""
    prefix: tuple[int, ...] = ()
    """Tokens prepended to each prompt (BOS). Empty with a chat template, which renders its own."""
    alphabet: frozenset[str] | None = None
    """Characters that can be encoded. None: all."""
    delimiters: frozenset[int] = frozenset()
    """Added, not special tokens that separate turns in the chat template: in data they are encoded as text, like special ones."""
    keeps_special: bool = False
    """Encode names of special tokens in data as those tokens instead of as text."""

    @property
    def size(self) -> int:
        """Vocabulary size: the largest token id + 1, added tokens included."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS or EOS. Raises UserError for characters outside the alphabet."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text; names of special tokens become those tokens."""
        if unknown := list(dict.fromkeys(c for text in texts for c in self.unknown_characters(text))):
            raise UserError(f"tokenizer.alphabet: got characters {' '.join(map(repr, unknown))}, want only those in it")
        for text in texts:
            if wrong := unicode_problem(text):
                raise UserError(wrong)
        batches = (list(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH))
        return [e.ids for batch in batches for e in self.backend.encode_batch_fast(batch, add_special_tokens=False)]

    def special_in(self, filled: FilledText) -> list[str]:
        """Names of special tokens in the data spans; empty if they are to be kept."""
        return [] if self.keeps_special else self._control.names_in_data(*filled)

    def encode_filled(self, texts: Sequence[FilledText]) -> list[list[int]]:
        """Like `encode_batch`, but names of special tokens in data spans are encoded as text."""
        marked = {i for i, filled in enumerate(texts) if self.special_in(filled)}
        mark = unused_character(texts[i].text for i in marked)
        return self._encode(
            [self._control.mark_names(f, mark).text if i in marked else f.text for i, f in enumerate(texts)],
            marked,
            mark,
        )

    def _encode(self, texts: Sequence[str], marked: set[int], mark: str) -> list[list[int]]:
        """`marked`: indices of the texts that contain marks."""
        split = iter(self._control.encode([texts[i] for i in sorted(marked)], mark))
        plain = iter(self.encode_batch([text for i, text in enumerate(texts) if i not in marked]))
        return [next(split if i in marked else plain) for i in range(len(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the tokens, without special tokens and without further clean-up."""
        return self.backend.decode(ids, skip_special_tokens=True)

    def decode_batch(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """As `decode`, for each row."""
        return self.backend.decode_batch(rows, skip_special_tokens=True)

    def tokens_at(self, ids: Sequence[int], ends: Sequence[int]) -> list[int]:
        """Return per number of characters of `decode(ids)`, ascending, the index of the token with the last of them: the one that
        completes it, if its bytes are those of several tokens."""
        text, own = self.decode(ids), [i for i, id in enumerate(ids) if id not in self._special.ids]
        words, found = [ids[i] for i in own], list[int]()
        if self._num_bytes is not None:
            behind, of_text = np.cumsum(self._num_bytes[words]), text.encode("utf-8", "surrogatepass")
            # Else some of the bytes are no text.
            if len(of_text) == behind[-1:].sum():
                last = [len(text[:n].encode("utf-8", "surrogatepass")) for n in ends]
                return [own[i] for i in np.searchsorted(behind, last)]
        # The first `length` characters are those of words[:done]. What follows is read together with the words from `start` on:
        # whether a word begins with a space depends on the one before it.
        start, done, length = 0, 0, 0
        while len(found) < len(ends):
            before = self.decode(words[start:done])
            # Many words at once if no end is among them, else as few as add something.
            for some, end in itertools.chain(
                ((n, done + n) for n in SKIPS), ((0, n) for n in range(done + 1, len(words) + 1))
            ):
                added = _added(self.decode(words[start:end]), before, text[length:])
                if added is None and not some:
                    # Bytes that are text by themselves, but not behind all the others.
                    added = _added(self.decode(words[:end]), text[:length], text[length:])
                if added and end <= len(words) and (not some or length + len(added) < ends[len(found)]):
                    break
            else:
                break
            start, done, length = done, end, length + len(added)
            found += [own[done - 1] for n in ends[len(found) :] if n <= length]
        return found + [len(ids) - 1] * (len(ends) - len(found))

    def spellings(self, ids: Sequence[int]) -> tuple[str, ...]:
        """Texts in which stop strings are searched: with special tokens, and without them if that differs."""
        whole = self.backend.decode(ids, skip_special_tokens=False)
        return (whole,) if self._special.ids.isdisjoint(ids) else (whole, self.decode(ids))

    @cached_property
    def _num_bytes(self) -> np.ndarray | None:
        """Bytes of each token, where decoding joins them and does nothing else; None for other tokenizers."""
        if type(self.backend.decoder).__name__ != "ByteLevel":
            return None
        # Each byte is spelled as one character.
        return np.array([len(self.backend.id_to_token(id) or "") for id in range(self.size)])

    @cached_property
    def texts(self) -> Texts:
        """Text of each token as `decode` has it. Raises UserError if it depends on the tokens before, as with WordPiece."""
        return token_texts(self.backend, self.size, self._special.ids | ({self.pad} - set(self.eos)))

    @cached_property
    def _special(self) -> SpecialTokens:
        return SpecialTokens(self.backend)

    @cached_property
    def _control(self) -> SpecialTokens:
        return SpecialTokens(self.backend, self.delimiters)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the vocabulary, the end and padding tokens and the special tokens."""
        vocabulary = sorted((id, token) for token, id in self.backend.get_vocab(with_added_tokens=True).items())
        known = [self.eos, self.pad, sorted(self._special.ids), vocabulary]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def has_special(self, text: str) -> bool:
        """True if the text has a special token, which decoded responses never have."""
        return bool(self._special.names_in_data(*from_data(text)))

    def token(self, id: int) -> str:
        """A token for display: its text, or its name if it is special or not a complete character."""
        name = self.backend.id_to_token(id)
        if name is None:
            return f"<{id}>"
        text = self.backend.decode([id], skip_special_tokens=False)
        # A SentencePiece decoder takes the space off the front of the first word.
        return name.replace("▁", " ") if "▁" in name or not text or "\ufffd" in text else text

    def prompt(self, text: str) -> list[int]:
        """Token ids of a prompt, chat template included. Raises PromptError if it cannot be rendered."""
        return self.prompt_batch([text])[0]

    def prompt_batch(self, prompts: Sequence[str | Turns], arguments: Mapping[str, Any] = {}) -> list[list[int]]:
        """Token ids of prompts, chat template included; a string is a user turn of data. Raises PromptError naming all bad ones.
        `arguments`: further ones of the chat template."""
        conversations = [as_turns(prompt) for prompt in prompts]
        wrong = ((i, unicode_problem(turn.content.text)) for i, turns in enumerate(conversations) for turn in turns)
        if wrong := [(i, why) for i, why in wrong if why]:
            raise PromptError(wrong)
        marked = {i for i, turns in enumerate(conversations) if any(self.special_in(turn.content) for turn in turns)}
        mark = unused_character(turn.content.text for i in marked for turn in conversations[i])
        for i in marked:
            conversations[i] = tuple(
                Turn(role, self._control.mark_names(content, mark)) for role, content in conversations[i]
            )
        texts: list[str | UserError] = []
        while len(texts) < len(conversations) and len(texts) % BATCH == 0:  # a short batch ended at an error
            texts += self.render(conversations[len(texts) : len(texts) + BATCH], arguments)
        if wrong := [(i, str(text)) for i, text in enumerate(texts) if isinstance(text, UserError)]:
            raise PromptError(wrong)
        return [[*self.prefix, *ids] for ids in self._encode(texts, marked, mark)]

    def unknown_characters(self, text: str) -> list[str]:
        """Characters of the text that cannot be encoded, in order, without duplicates."""
        return [c for c in dict.fromkeys(text) if c not in self.alphabet] if self.alphabet is not None else []

    def unspellable_characters(self, text: str) -> list[str]:
        """Characters of the text that no sampled response can contain, in order, without duplicates."""
        if self.alphabet is not None or text in self.spellings(self.encode(text))[0]:
            return self.unknown_characters(text)
        # A normalizer changes encoded text but not sampled text, so look at the tokens themselves.
        texts = self.backend.decode_batch([[id] for id in range(self.size)], skip_special_tokens=False)
        letters = frozenset("".join(texts))
        # A token that is not a complete character is made of bytes, and bytes can spell everything.
        return [] if "\ufffd" in letters else [c for c in dict.fromkeys(text) if c not in letters]

    @cached_property
    def max_token_bytes(self) -> int:
        """Bytes of the longest token's text (an upper bound for incomplete characters)."""
        texts = self.backend.decode_batch([[id] for id in range(self.size)], skip_special_tokens=False)
        return max(len(text.encode()) for text in texts)

    def save(self, directory: Path) -> None:
        """Save for `AutoTokenizer.from_pretrained`. `tokenizer.stop` belongs into generation_config.json, which is not written."""
        self.write(directory)


def load_tokenizer(cfg: CharacterTokenizer | PretrainedTokenizer) -> Tokenizer:
    """Load a tokenizer. Raises UserError for anything wrong with the directory, its files or its chat template."""
    if isinstance(cfg, CharacterTokenizer):
        return character_tokenizer(cfg.alphabet)
    if not isinstance(cfg, PretrainedTokenizer):
        raise UserError(
            f"tokenizer: got {type(cfg).__name__}, want model.tokenizer, a CharacterTokenizer or a PretrainedTokenizer"
        )
    from jaxrl_llm.tasks import pretrained_tokenizer

    return pretrained_tokenizer.load(cfg)


def stop_problems(stop: Sequence[str], tokenizer: Tokenizer, most: int) -> list[str]:
    """Errors in `rollout.stop`: empty texts, and texts that cannot occur in a response of `most` tokens."""
    found = ["rollout.stop: got '', want text: every response would end with its first token"] if "" in stop else []
    for text in filter(None, stop):
        if unknown := tokenizer.unspellable_characters(text):
            characters = " ".join(map(repr, unknown))
            found.append(f"rollout.stop: got {text!r}, want text that tokens can spell: no token has {characters}")
        elif (size := len(text.encode())) > most and size > most * tokenizer.max_token_bytes:
            found.append(
                f"rollout.stop: got {text[:80]!r}, want text that rollout.max_new_tokens ({most}) tokens can hold"
            )
    return found


def saved_characters(directory: Path) -> CharacterTokenizer | None:
    """Return the character tokenizer that was saved in a directory; None if another was."""
    path = directory / CHARACTERS
    return CharacterTokenizer(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def character_tokenizer(alphabet: str) -> Tokenizer:
    """Make a tokenizer with padding as token 0 and one token per character. No token is special, so graders see the end token."""
    if len(set(alphabet)) != len(alphabet) or len(alphabet) < 2:
        raise UserError(f"tokenizer.alphabet: got {alphabet!r}, want at least two characters, without duplicates")
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.WordLevel({token: i for i, token in enumerate([PAD, *alphabet])}, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()

    def write(directory: Path) -> None:
        from transformers import PreTrainedTokenizerFast

        wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=alphabet[-1])
        wrapped.save_pretrained(directory)
        # transformers makes the end token special, so that it is left out of texts.
        (directory / CHARACTERS).write_text(json.dumps({"alphabet": alphabet}), encoding="utf-8")

    return Tokenizer(backend, pad=0, eos=(len(alphabet),), write=write, alphabet=frozenset(alphabet))

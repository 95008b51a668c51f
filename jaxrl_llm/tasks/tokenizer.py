"""Text to tokens and back. Tokens in, tokens out: a prompt is encoded once, a completion is decoded for graders and people only."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks.config import CharacterTokenizer, PretrainedTokenizer
from jaxrl_llm.tasks.special import SpecialTokens, unused
from jaxrl_llm.tasks.turns import Filled, PromptError, Turn, Turns, as_turns, from_data, no_unicode

if TYPE_CHECKING:
    import tokenizers

PAD = "<pad>"
# An encoding holds offsets and the text of each token, a hundred bytes a token: kept for all texts at once they cost more
# time in fresh memory than the encoding itself.
BATCH = 1024


def _as_it_is(prompts: Sequence[Turns]) -> list[str | UserError]:
    many = "got messages, want a prompt of one text: there is no chat template (tokenizer.chat: true, of a pretrained tokenizer)"
    return [
        turns[0].content.text if len(turns) == 1 and turns[0].role == "user" else UserError(many) for turns in prompts
    ]


@dataclass(frozen=True, eq=False, repr=False)
class Tokenizer:
    """A backend of the `tokenizers` library, with what a policy needs to know about it."""

    backend: "tokenizers.Tokenizer"
    pad: int
    """Fills rows up. It may be an end token as well: padding is known by length, never by value."""
    eos: tuple[int, ...]
    """Each of them ends a response; the first ends the responses that we write ourselves."""
    write: Callable[[Path], None]
    """Saves what `AutoTokenizer.from_pretrained` reads."""
    render: Callable[[Sequence[Turns]], list[str | UserError]] = _as_it_is
    """Prompts as the policy reads them: in the chat template, if there is one. Or what is wrong with one, and then no more need
    follow."""
    prefix: tuple[int, ...] = ()
    """Tokens before each prompt. A chat template writes its own beginning, so it has none."""
    alphabet: frozenset[str] | None = None
    """Characters that it can spell. None: any."""
    delimiters: frozenset[int] = frozenset()
    """Added tokens that are not special and stand between the chat template's turns: in data they are text as special ones are."""
    keeps_special: bool = False
    """Names of special tokens in data are encoded as those tokens, not as text."""

    @property
    def size(self) -> int:
        """One more than the largest token, added ones included."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """The text's tokens and nothing else. Raises UserError for characters that it cannot spell."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode`; names of special tokens become those tokens."""
        if unknown := list(dict.fromkeys(c for text in texts for c in self.unknown(text))):
            raise UserError(f"tokenizer.alphabet: got characters {' '.join(map(repr, unknown))}, want only those in it")
        for text in texts:
            if wrong := no_unicode(text):
                raise UserError(wrong)
        batches = (list(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH))
        return [e.ids for batch in batches for e in self.backend.encode_batch_fast(batch, add_special_tokens=False)]

    def special_in(self, filled: Filled) -> list[str]:
        """Names of special tokens in what comes from data, unless they are kept."""
        return [] if self.keeps_special else self._control.inside(*filled)

    def encode_filled(self, texts: Sequence[Filled]) -> list[list[int]]:
        """As `encode_batch`, but for names of special tokens in what comes from data: they are encoded as text."""
        held = {i for i, filled in enumerate(texts) if self.special_in(filled)}
        mark = unused(texts[i].text for i in held)
        return self._encode(
            [self._control.marked(f, mark).text if i in held else f.text for i, f in enumerate(texts)], held, mark
        )

    def _encode(self, texts: Sequence[str], held: set[int], mark: str) -> list[list[int]]:
        """`held`: which of them have marks in them."""
        split = iter(self._control.encode([texts[i] for i in sorted(held)], mark))
        plain = iter(self.encode_batch([text for i, text in enumerate(texts) if i not in held]))
        return [next(split if i in held else plain) for i in range(len(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        """Special tokens are left out, nothing else is cleaned."""
        return self.backend.decode(ids, skip_special_tokens=True)

    def decode_batch(self, rows: Sequence[Sequence[int]]) -> list[str]:
        return self.backend.decode_batch(rows, skip_special_tokens=True)

    def spellings(self, ids: Sequence[int]) -> tuple[str, ...]:
        """The text with special tokens in it, and the one that `decode` gives where that differs: what stop texts may stand in."""
        whole = self.backend.decode(ids, skip_special_tokens=False)
        return (whole,) if self._special.ids.isdisjoint(ids) else (whole, self.decode(ids))

    @cached_property
    def _special(self) -> SpecialTokens:
        return SpecialTokens(self.backend)

    @cached_property
    def _control(self) -> SpecialTokens:
        return SpecialTokens(self.backend, self.delimiters)

    @property
    def fingerprint(self) -> str:
        """Of its tokens, and of those that end, pad and are not shown."""
        vocabulary = sorted((id, token) for token, id in self.backend.get_vocab(with_added_tokens=True).items())
        known = [self.eos, self.pad, sorted(self._special.ids), vocabulary]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def hidden(self, text: str) -> bool:
        """Whether the text holds a special token, which no decoded response does."""
        return bool(self._special.inside(*from_data(text)))

    def token(self, id: int) -> str:
        """One token for people: its text, or its name where it is special or not a whole character."""
        name = self.backend.id_to_token(id)
        if name is None:
            return f"<{id}>"
        text = self.backend.decode([id], skip_special_tokens=False)
        # A SentencePiece decoder takes the space off the front of the first word.
        return name.replace("▁", " ") if "▁" in name or not text or "\ufffd" in text else text

    def prompt(self, text: str) -> list[int]:
        """The prompt as the policy reads it. Raises PromptError where the chat template does."""
        return self.prompt_batch([text])[0]

    def prompt_batch(self, prompts: Sequence[str | Turns]) -> list[list[int]]:
        """Prompts as the policy reads them; a text is the user's turn, and data. Raises PromptError that names all bad ones."""
        asked = [as_turns(prompt) for prompt in prompts]
        wrong = ((i, no_unicode(turn.content.text)) for i, turns in enumerate(asked) for turn in turns)
        if wrong := [(i, why) for i, why in wrong if why]:
            raise PromptError(wrong)
        held = {i for i, turns in enumerate(asked) if any(self.special_in(turn.content) for turn in turns)}
        mark = unused(turn.content.text for i in held for turn in asked[i])
        for i in held:
            asked[i] = tuple(Turn(role, self._control.marked(content, mark)) for role, content in asked[i])
        texts: list[str | UserError] = []
        while len(texts) < len(asked) and len(texts) % BATCH == 0:  # a batch that is cut short is the last
            texts += self.render(asked[len(texts) : len(texts) + BATCH])
        if wrong := [(i, str(text)) for i, text in enumerate(texts) if isinstance(text, UserError)]:
            raise PromptError(wrong)
        return [[*self.prefix, *ids] for ids in self._encode(texts, held, mark)]

    def unknown(self, text: str) -> list[str]:
        """Characters that it cannot spell, in order, each once."""
        return [c for c in dict.fromkeys(text) if c not in self.alphabet] if self.alphabet is not None else []

    def unspellable(self, text: str) -> list[str]:
        """Characters of the text that no response can hold, in order, each once."""
        if self.alphabet is not None or text in self.spellings(self.encode(text))[0]:
            return self.unknown(text)
        # A normalizer may change what is encoded and not what is drawn: the tokens themselves have the last word.
        texts = self.backend.decode_batch([[id] for id in range(self.size)], skip_special_tokens=False)
        letters = frozenset("".join(texts))
        # A token that is no whole character stands for bytes, and with bytes all can be spelled.
        return [] if "\ufffd" in letters else [c for c in dict.fromkeys(text) if c not in letters]

    @cached_property
    def widest(self) -> int:
        """Bytes of the longest token's text; more for one that is no whole character."""
        texts = self.backend.decode_batch([[id] for id in range(self.size)], skip_special_tokens=False)
        return max(len(text.encode()) for text in texts)

    def save(self, directory: Path) -> None:
        """Writes what `AutoTokenizer.from_pretrained` reads. Stop tokens belong to generation_config.json, which is not written."""
        self.write(directory)


def load_tokenizer(cfg: CharacterTokenizer | PretrainedTokenizer) -> Tokenizer:
    """Raises UserError for everything that is wrong with the directory, its files or its chat template."""
    if isinstance(cfg, CharacterTokenizer):
        return character_tokenizer(cfg.alphabet)
    from jaxrl_llm.tasks import pretrained_tokenizer

    return pretrained_tokenizer.load(cfg)


def stop_problems(stop: Sequence[str], tokenizer: Tokenizer, most: int) -> list[str]:
    """What is wrong with `rollout.stop`: a text at which every response would end, and texts at which none of `most` tokens can."""
    found = ["rollout.stop: got '', want text: every response would end with its first token"] if "" in stop else []
    for text in filter(None, stop):
        if unknown := tokenizer.unspellable(text):
            characters = " ".join(map(repr, unknown))
            found.append(f"rollout.stop: got {text!r}, want text that tokens can spell: no token has {characters}")
        elif (size := len(text.encode())) > most and size > most * tokenizer.widest:
            found.append(
                f"rollout.stop: got {text[:80]!r}, want text that rollout.max_new_tokens ({most}) tokens can hold"
            )
    return found


def character_tokenizer(alphabet: str) -> Tokenizer:
    """Padding and then one token a character. Neither it nor the end token is special: a grader sees all that was sampled."""
    if len(set(alphabet)) != len(alphabet) or len(alphabet) < 2:
        raise UserError(f"tokenizer.alphabet: got {alphabet!r}, want two different characters or more, each once")
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.WordLevel({token: i for i, token in enumerate([PAD, *alphabet])}, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()

    def write(directory: Path) -> None:
        from transformers import PreTrainedTokenizerFast

        wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=alphabet[-1])
        wrapped.save_pretrained(directory)

    return Tokenizer(backend, pad=0, eos=(len(alphabet),), write=write, alphabet=frozenset(alphabet))

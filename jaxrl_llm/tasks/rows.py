"""Rows: what a policy is asked, what a grader compares with, and the tokens of both, made once."""

import difflib
import hashlib
import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks.records import Record, refuse
from jaxrl_llm.tasks.tokenizer import Tokenizer
from jaxrl_llm.tasks.turns import (
    Filled,
    PromptError,
    Turn,
    Turns,
    answered,
    are_messages,
    asked,
    no_unicode,
    read_messages,
    shown,
)


@dataclass(frozen=True, eq=False)
class Row:
    prompt: str
    """What is asked, before the chat template."""
    answer: str
    """What graders compare with."""
    response: str | None
    """The whole right response without the end token; None where it is unknown."""
    tokens: Int32[np.ndarray, " s"]
    """The prompt as the policy reads it, chat template included."""
    target: Int32[np.ndarray, " t"] | None
    """The response with the end token."""
    columns: Mapping[str, Any]
    """All that the source knows about the row."""
    split: tuple[str, ...] = ()
    """Special tokens' names in its data, which are encoded as text."""
    where: str = ""
    """For people: file and line."""


@dataclass(frozen=True)
class Text:
    """A row before it has tokens."""

    where: str
    turns: Turns
    answer: str
    response: Filled | None
    columns: Mapping[str, Any]

    @property
    def parts(self) -> list[tuple[str, Filled]]:
        """All that becomes tokens, each with its name."""
        return [
            *(("prompt", turn.content) for turn in self.turns),
            *([("response", self.response)] if self.response else []),
        ]


MAX_WIDTH_DIGITS = 4


class _Columns(string.Formatter):
    """Fills a template from columns; a value that is no text and no number is an error and not its Python spelling."""

    def get_value(self, key: int | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if key in kwargs:
            return kwargs[key]
        near = difflib.get_close_matches(str(key), kwargs, n=1)
        hint = f" (perhaps you meant {near[0]})" if near else ""
        raise ValueError(f"got no column {key!r}, want one of {', '.join(kwargs)}{hint}")

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None or isinstance(value, list | tuple | dict | bytes):
            shown = "nothing (null)" if value is None else f"a {type(value).__name__}"
            raise ValueError(f"got {shown}, want text or a number")
        # They may come from the row itself, as in {a:{b}}.
        if any(len(digits) > MAX_WIDTH_DIGITS for digits in re.findall(r"\d+", format_spec)):
            raise ValueError(
                f"got the form {format_spec[:60]!r}, want at most {MAX_WIDTH_DIGITS} digits of a width or precision"
            )
        return super().format_field(value, format_spec)


def fill(template: str, columns: Mapping[str, Any]) -> Filled:
    """Raises ValueError in words."""
    text, data = "", []
    try:
        for literal, field, spec, conversion in string.Formatter().parse(template):
            text += literal
            if field is not None:
                alone = "".join(
                    ["{", field, *([f"!{conversion}"] if conversion else []), f":{spec}" if spec else "", "}"]
                )
                value = _Columns().vformat(alone, (), columns)
                data.append((len(text), len(text) + len(value)))
                text += value
    except (KeyError, IndexError, AttributeError, TypeError, OverflowError, MemoryError) as error:
        raise ValueError(f"{template!r} does not fit the row: {type(error).__name__}: {error}") from None
    if wrong := no_unicode(text):
        raise ValueError(wrong)
    return Filled(text, tuple(data))


def _messages(template: str, columns: Mapping[str, Any]) -> Turns | None:
    """Those of the column that the template names alone, if that is what it holds. Raises ValueError in words."""
    (literal, field, *form), *more = [*string.Formatter().parse(template), ("", None)]
    if literal or field is None or any(form) or len(more) > 1:
        return None
    try:
        value, _ = _Columns().get_field(field, (), columns)
    except (KeyError, IndexError, AttributeError, TypeError):
        return None  # `fill` says what is wrong
    return read_messages(value) if are_messages(value) else None


def _fill_one(name: str, template: str, columns: Mapping[str, Any]) -> Turns | Filled:
    """Raises ValueError in words."""
    messages = _messages(template, columns)
    if messages is not None:
        return asked(messages) if name == "prompt" else answered(messages)
    found = fill(template, columns)
    if not found.text and (template or name == "prompt"):
        raise ValueError('got "", want text')
    return (Turn("user", found),) if name == "prompt" else found


def fill_all(records: Iterable[Record], prompt: str, answer: str, response: str) -> list[Text]:
    """Texts of the records. Raises UserError that names the first few bad ones: where, which template, got, want."""
    texts, bad = [], []
    for record in records:
        found = {}
        for name, template in (("prompt", prompt), ("answer", answer), ("response", response)):
            try:
                found[name] = _fill_one(name, template, record.columns)
            except ValueError as error:
                bad.append((record.where, f"task.{name}: {error}"))
        if len(found) == 3:
            right = found["response"] if response else None
            texts.append(Text(record.where, found["prompt"], found["answer"].text, right, record.columns))
    refuse(_once(bad, len(records)))
    return texts


def _once(problems: Sequence[tuple[str, str]], num_rows: int) -> list[str]:
    """A line for each place and reason; what is wrong with every row is wrong with the template, and told once."""
    times = Counter(why for _, why in problems)
    common = [f"all {num_rows} rows: {why}" for why, n in times.items() if n == num_rows > 1]
    return common + [f"{where}: {why}" for where, why in problems if not times[why] == num_rows > 1]


def make_rows(texts: Sequence[Text], tokenizer: Tokenizer) -> tuple[Row, ...]:
    """Rows with their tokens. Raises UserError that names the first few texts that cannot be spelled."""
    refuse([f"{text.where}: {why}" for text in texts for why in _unspelled(text, tokenizer)])
    try:
        prompts = tokenizer.prompt_batch([text.turns for text in texts])
    except PromptError as error:
        refuse([f"{texts[i].where}: {why}" for i, why in error.problems])
    refuse([f"{t.where}: got a prompt without tokens" for t, ids in zip(texts, prompts, strict=True) if not ids])
    known = [text for text in texts if text.response is not None]
    refuse([f"{text.where}: task.response: {why}" for text in known for why in _ended(text.response.text, tokenizer)])
    targets = iter(tokenizer.encode_filled([text.response for text in known]))
    return tuple(
        Row(
            shown(text.turns),
            text.answer,
            None if text.response is None else text.response.text,
            np.array(ids, np.int32),
            None if text.response is None else np.array([*next(targets), tokenizer.eos[0]], np.int32),
            text.columns,
            tuple(name for _, part in text.parts for name in tokenizer.special_in(part)),
            text.where,
        )
        for text, ids in zip(texts, prompts, strict=True)
    )


def _unspelled(text: Text, tokenizer: Tokenizer) -> list[str]:
    return [
        f"{name}: got characters {' '.join(map(repr, unknown))}, want only those of tokenizer.alphabet"
        for name, part in text.parts
        if (unknown := tokenizer.unknown(part.text))
    ]


def _ended(response: str, tokenizer: Tokenizer) -> list[str]:
    """An end token in the middle. Spelled as text it would teach the policy to spell it, and never to end."""
    ends = [token for token in tokenizer.encode(response) if token in tokenizer.eos]
    return [f"got the end token {tokenizer.token(ends[0])!r} in it, want none: it is added"] if ends else []


def limit(
    rows: Sequence[Row], texts: Sequence[Text], most: int, too_long: Literal["refuse", "drop"]
) -> tuple[tuple[Row, ...], int]:
    """Rows of at most `most` prompt tokens (0: of any), and how many were dropped.

    Raises UserError if none may be dropped, or if none is left.
    """
    long = [i for i, row in enumerate(rows) if most and len(row.tokens) > most]
    found = [f"{texts[i].where}: got a prompt of {len(rows[i].tokens)} tokens" for i in long]
    if long and too_long == "refuse":
        refuse([f"{f}, want task.max_prompt_tokens ({most}) at most, or task.too_long: drop" for f in found])
    if len(long) == len(rows):
        raise UserError(f"{found[0]}, and no row has task.max_prompt_tokens ({most}) or less: none is left")
    dropped = set(long)
    return tuple(row for i, row in enumerate(rows) if i not in dropped), len(dropped)


def without(rows: Sequence[Row], others: Sequence[Row], where: str) -> tuple[Row, ...]:
    """Rows whose prompt is not among the others'. Raises UserError if none is left."""
    known = {row.prompt for row in others}
    left = tuple(row for row in rows if row.prompt not in known)
    if not left:
        raise UserError(f"{where}: every prompt for training is held out too, want more different prompts")
    return left


def hash_rows(rows: Sequence[Row]) -> str:
    """Of all that policy and graders read, in order."""
    digest = hashlib.sha256()
    for row in rows:
        tokens = [None if ids is None else ids.tolist() for ids in (row.tokens, row.target)]
        digest.update(json.dumps([*tokens, row.answer, row.columns], sort_keys=True, default=_plain).encode())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """What JSON does not know, the same in every process: no order of a set, no address of an object."""
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return str(value) if type(value).__str__ is not object.__str__ else type(value).__name__

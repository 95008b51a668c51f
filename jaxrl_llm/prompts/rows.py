"""Rows: what a policy is asked, what a grader compares with, and the tokens of both, made once."""

import difflib
import hashlib
import json
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32

from jaxrl_llm.errors import UserError
from jaxrl_llm.prompts.records import Record, refuse
from jaxrl_llm.prompts.tokenizer import Tokenizer


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
    where: str = ""
    """For people: file and line."""


@dataclass(frozen=True)
class Text:
    """A row before it has tokens."""

    where: str
    prompt: str
    answer: str
    response: str | None
    columns: Mapping[str, Any]


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
        return super().format_field(value, format_spec)


def fill(template: str, columns: Mapping[str, Any]) -> str:
    """Raises ValueError in words."""
    try:
        text = _Columns().vformat(template, (), columns)
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(f"{template!r} does not fit the row: {type(error).__name__}: {error}") from None
    text.encode()  # a lone surrogate, which JSON can spell and no tokenizer can
    return text


def fill_all(records: Iterable[Record], prompt: str, answer: str, response: str) -> list[Text]:
    """Texts of the records. Raises UserError that names the first few bad ones: where, which template, got, want."""
    texts, bad = [], []
    for record in records:
        found = {}
        for name, template in (("prompt", prompt), ("answer", answer), ("response", response)):
            try:
                found[name] = fill(template, record.columns)
                if not found[name] and (template or name == "prompt"):
                    raise ValueError('got "", want text')
            except ValueError as error:
                bad.append(f"{record.where}: task.{name}: {error}")
        if len(found) == 3:
            texts.append(
                Text(record.where, found["prompt"], found["answer"], found["response"] or None, record.columns)
            )
    refuse(bad)
    return texts


def make_rows(texts: Sequence[Text], tokenizer: Tokenizer) -> tuple[Row, ...]:
    """Rows with their tokens. Raises UserError that names the first few texts that cannot be spelled."""
    refuse([f"{text.where}: {why}" for text in texts for why in _unspelled(text, tokenizer)])
    prompts = _prompts(texts, tokenizer)
    known = [text for text in texts if text.response is not None]
    responses = tokenizer.encode_batch([text.response for text in known])
    refuse([f"{t.where}: got a prompt without tokens" for t, ids in zip(texts, prompts, strict=True) if not ids])
    refuse(
        [
            f"{text.where}: task.response: got the end token {tokenizer.token(ends[0])!r} in it, want none: it is added"
            for text, ids in zip(known, responses, strict=True)
            if (ends := [token for token in ids if token in tokenizer.eos])
        ]
    )
    targets = iter(responses)
    return tuple(
        Row(
            text.prompt,
            text.answer,
            text.response,
            np.array(ids, np.int32),
            None if text.response is None else np.array([*next(targets), tokenizer.eos[0]], np.int32),
            text.columns,
            text.where,
        )
        for text, ids in zip(texts, prompts, strict=True)
    )


def _unspelled(text: Text, tokenizer: Tokenizer) -> list[str]:
    found = []
    for name in ("prompt", "response"):
        if unknown := tokenizer.unknown(getattr(text, name) or ""):
            found.append(
                f"{name}: got characters {' '.join(map(repr, unknown))}, want only those of tokenizer.alphabet"
            )
    return found


def _prompts(texts: Sequence[Text], tokenizer: Tokenizer) -> list[list[int]]:
    try:
        return tokenizer.prompt_batch([text.prompt for text in texts])
    except UserError:
        bad = []
        for text in texts:
            try:
                tokenizer.prompt(text.prompt)
            except UserError as error:
                bad.append(f"{text.where}: {error}")
        refuse(bad)
        raise


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

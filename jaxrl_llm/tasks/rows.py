"""Rows of a task: prompt, reference answer and their tokens, made once from records and templates."""

import difflib
import hashlib
import json
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int32

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks.records import Record, refuse
from jaxrl_llm.tasks.tokenizer import Tokenizer
from jaxrl_llm.tasks.turns import (
    FilledText,
    PromptError,
    Turn,
    Turns,
    answer_text,
    are_messages,
    as_text,
    prompt_turns,
    read_messages,
    unicode_problem,
)


class Question(NamedTuple):
    """A row's prompt in one form, before tokenization."""

    form: str
    """Name of the form; empty: that of the evaluation."""
    text: str
    """The prompt without a system prompt, before the chat template."""
    turns: Turns
    arguments: Mapping[str, Any] = {}
    """Arguments of the chat template, beside those of the tokenizer."""


class AskedPrompt(NamedTuple):
    """A row's prompt as the policy reads it."""

    form: str
    text: str
    """As in `Question`: without examples."""
    tokens: Int32[np.ndarray, " s"]
    num_examples: int = 0
    """Few-shot examples before the question."""


@dataclass(frozen=True, eq=False)
class Row:
    prompt: str
    """The prompt by the task's own template, before the chat template. Rows of equal prompts are the same question."""
    answer: str
    """Reference answer for graders."""
    response: str | None
    """A complete correct response without the end token; None if unknown."""
    tokens: Int32[np.ndarray, " s"]
    """Prompt tokens, chat template included."""
    target: Int32[np.ndarray, " t"] | None
    """Response tokens with the end token."""
    columns: Mapping[str, Any]
    """All columns of the record."""
    split: tuple[str, ...] = ()
    """Names of special tokens in the row's data, which were encoded as text."""
    where: str = ""
    """File and line, for messages."""
    task: str = ""
    """Name of its task in a mixture; empty if there is one task only."""
    max_new_tokens: int | None = None
    """Maximum completion tokens; None: that of the rollouts."""
    asks: AskedPrompt | None = None
    """The form of `tokens`, if that is not simply `prompt`."""
    forms: tuple[AskedPrompt, ...] = ()
    """Further forms in which a visit may ask, all that are known before the run."""
    visit: Callable[[int], AskedPrompt] | None = None
    """Prompt of the visit with this uid; None: every visit has `tokens`."""
    source: "UntokenizedRow | None" = None
    """What the tokens were made from, where few-shot examples are made of it."""

    @property
    def text(self) -> str:
        """The prompt as it is asked, without examples, before the chat template."""
        return self.asks.text if self.asks else self.prompt

    @property
    def stated(self) -> "Row":
        """The row in its one form of the evaluation."""
        return self if self.visit is None else replace(self, visit=None)

    def asked(self, uid: int) -> "Row":
        """Return the row with the prompt of one visit: a function of the run's seed, the row and `uid`."""
        return self if self.visit is None else self.with_prompt(self.visit(int(uid)))

    def with_prompt(self, asks: AskedPrompt) -> "Row":
        return replace(self, tokens=asks.tokens, asks=asks, visit=None)

    def asked_by(self, uid: int, tokens: Int32[np.ndarray, " s"]) -> "Row":
        """Return the row in the form that has these tokens: of the visit, or, for prompts of other runs, of any."""
        if self.visit is None:
            return self
        others = (self.stated, *(self.with_prompt(form) for form in self.forms))
        mine = self.asked(uid)
        return next((row for row in (mine, *others) if np.array_equal(row.tokens, tokens)), mine)


@dataclass(frozen=True)
class UntokenizedRow:
    """A row with filled templates, before tokenization."""

    where: str
    turns: Turns
    answer: str
    response: FilledText | None
    columns: Mapping[str, Any]
    more: Mapping[str, Turns | FilledText] = field(default_factory=dict)
    """Further filled templates, by the name of the config field."""
    questions: tuple[Question, ...] = ()
    """The prompt in each form, that of the evaluation first; (): `turns` are its only one."""
    own: int | None = None
    """Number of the only form in which the row is asked, if a column names one."""
    max_new_tokens: int | None = None

    @property
    def asks(self) -> tuple[Question, ...]:
        """The forms in which the row may be asked, that of the evaluation first."""
        every = self.questions or (Question("", as_text(self.turns), self.turns),)
        return every if self.own is None else (every[self.own],)

    @property
    def parts(self) -> list[tuple[str, FilledText]]:
        """Every text to tokenize, with the name of its config field."""
        turns = (turn for asks in self.asks for turn in asks.turns)
        return [
            *(("prompt", turn.content) for turn in turns),
            *([("response", self.response)] if self.response else []),
        ]


MAX_WIDTH_DIGITS = 4


class _Columns(string.Formatter):
    """Fills a template from columns. Values other than text and numbers are errors, instead of being formatted as Python."""

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
        # The format spec may come from the row itself, as in {a:{b}}.
        if any(len(digits) > MAX_WIDTH_DIGITS for digits in re.findall(r"\d+", format_spec)):
            raise ValueError(
                f"got the form {format_spec[:60]!r}, want at most {MAX_WIDTH_DIGITS} digits of a width or precision"
            )
        return super().format_field(value, format_spec)


def fill(template: str, columns: Mapping[str, Any]) -> FilledText:
    """Fill a format template from a row's columns. Raises ValueError with a message for the user."""
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
    if wrong := unicode_problem(text):
        raise ValueError(wrong)
    return FilledText(text, tuple(data))


def _messages(template: str, columns: Mapping[str, Any]) -> Turns | None:
    """Turns, if the template is a single field that contains chat messages, else None. Raises ValueError for bad messages."""
    (literal, field, *form), *more = [*string.Formatter().parse(template), ("", None)]
    if literal or field is None or any(form) or len(more) > 1:
        return None
    try:
        value, _ = _Columns().get_field(field, (), columns)
    except (KeyError, IndexError, AttributeError, TypeError):
        return None  # `fill` reports the error
    return read_messages(value) if are_messages(value) else None


def _fill_one(name: str, template: str, columns: Mapping[str, Any]) -> Turns | FilledText:
    """Fill the template of task.`name`. Raises ValueError with a message for the user."""
    messages = _messages(template, columns)
    if messages is not None:
        return prompt_turns(messages) if name.endswith("prompt") else answer_text(messages)
    found = fill(template, columns)
    if not found.text and (template or name == "prompt"):
        raise ValueError('got "", want text')
    return (Turn("user", found),) if name.endswith("prompt") else found


def fill_rows(
    records: Iterable[Record], prompt: str, answer: str, response: str, more: Mapping[str, str] = {}
) -> list[UntokenizedRow]:
    """Fill the templates for every record. Raises UserError naming the first few bad records: where, template, got, want.

    Args:
        records: The data.
        prompt: Template of the prompt.
        answer: Template of the reference answer; "" for none.
        response: Template of the correct response; "" if unknown.
        more: Further templates, by the name of the config field; names of prompts end with "prompt".
    """
    texts, bad, templates = [], [], {"prompt": prompt, "answer": answer, "response": response, **more}
    for record in records:
        found = {}
        for name, template in templates.items():
            try:
                found[name] = _fill_one(name, template, record.columns)
            except ValueError as error:
                bad.append((record.where, f"task.{name}: {error}"))
        if len(found) == len(templates):
            turns, reference, right = (found.pop(name) for name in ("prompt", "answer", "response"))
            right = right if response else None
            texts.append(UntokenizedRow(record.where, turns, reference.text, right, record.columns, found))
    refuse(by_row(bad, len(records)))
    return texts


def by_row(problems: Sequence[tuple[str, str]], num_rows: int) -> list[str]:
    """One message per record and reason; a reason that applies to every record is reported once."""
    times = Counter(why for _, why in problems)
    common = [f"all {num_rows} rows: {why}" for why, n in times.items() if n == num_rows > 1]
    return common + [f"{where}: {why}" for where, why in problems if not times[why] == num_rows > 1]


def make_rows(texts: Sequence[UntokenizedRow], tokenizer: Tokenizer) -> tuple[Row, ...]:
    """Tokenize rows. Raises UserError naming the first few that cannot be tokenized."""
    refuse([f"{text.where}: {why}" for text in texts for why in _unknown_characters(text, tokenizer)])
    of_text = [i for i, text in enumerate(texts) for _ in text.asks]
    try:
        prompts = tokenize([asks for text in texts for asks in text.asks], tokenizer)
    except PromptError as error:
        refuse([f"{texts[of_text[i]].where}: {why}" for i, why in error.problems])
    refuse(
        [
            f"{texts[i].where}: got a prompt without tokens"
            for i, ask in zip(of_text, prompts, strict=True)
            if not len(ask.tokens)
        ]
    )
    known = [text for text in texts if text.response is not None]
    refuse(
        [
            f"{text.where}: task.response: {why}"
            for text in known
            for why in _end_tokens_inside(text.response.text, tokenizer)
        ]
    )
    targets, asked = iter(tokenizer.encode_filled([text.response for text in known])), iter(prompts)
    rows = []
    for text in texts:
        first, *forms = (next(asked) for _ in text.asks)
        rows.append(
            Row(
                as_text(text.turns),
                text.answer,
                None if text.response is None else text.response.text,
                first.tokens,
                None if text.response is None else np.array([*next(targets), tokenizer.eos[0]], np.int32),
                text.columns,
                tuple(name for _, part in text.parts for name in tokenizer.special_in(part)),
                text.where,
                max_new_tokens=text.max_new_tokens,
                asks=first if text.questions else None,
                forms=tuple(forms),
                source=text if text.questions else None,
            )
        )
    return tuple(rows)


def tokenize(questions: Sequence[Question], tokenizer: Tokenizer, num_examples: int = 0) -> list[AskedPrompt]:
    """Return the prompts in the same order. Raises PromptError naming all that cannot be rendered."""
    # Conversations with equal arguments are rendered together.
    alike: dict[str, list[int]] = {}
    for i, question in enumerate(questions):
        alike.setdefault(json.dumps(question.arguments, sort_keys=True, default=str), []).append(i)
    found, bad = [None] * len(questions), []
    for index in alike.values():
        try:
            ids = tokenizer.prompt_batch([questions[i].turns for i in index], questions[index[0]].arguments)
        except PromptError as error:
            bad += [(index[i], why) for i, why in error.problems]
            continue
        for i, own in zip(index, ids, strict=True):
            found[i] = AskedPrompt(questions[i].form, questions[i].text, np.array(own, np.int32), num_examples)
    if bad:
        raise PromptError(sorted(bad))
    return found


def _unknown_characters(text: UntokenizedRow, tokenizer: Tokenizer) -> list[str]:
    return [
        f"{name}: got characters {' '.join(map(repr, unknown))}, want only those of tokenizer.alphabet"
        for name, part in text.parts
        if (unknown := tokenizer.unknown_characters(part.text))
    ]


def _end_tokens_inside(response: str, tokenizer: Tokenizer) -> list[str]:
    """Error for end tokens inside a response: trained on as text they would teach the policy to write them but not to stop."""
    ends = [token for token in tokenizer.encode(response) if token in tokenizer.eos]
    return [f"got the end token {tokenizer.token(ends[0])!r} in it, want none: it is added"] if ends else []


def limit_prompts(
    rows: Sequence[Row], texts: Sequence[UntokenizedRow], most: int, too_long: Literal["refuse", "drop"]
) -> tuple[tuple[Row, ...], int]:
    """Return the rows of at most `most` prompt tokens, and the number of dropped rows.

    Args:
        rows: Tokenized rows.
        texts: The same rows before tokenization, for messages.
        most: Maximum number of prompt tokens; 0: no limit.
        too_long: "refuse" raises UserError for longer rows.

    Raises:
        UserError: If a row is refused or none is left.
    """
    longest = [longest_prompt([row]) for row in rows]
    long = [i for i, n in enumerate(longest) if most and n > most]
    found = [f"{texts[i].where}: got a prompt of {longest[i]} tokens" for i in long]
    if long and too_long == "refuse":
        refuse([f"{f}, want task.max_prompt_tokens ({most}) at most, or task.too_long: drop" for f in found])
    if len(long) == len(rows):
        raise UserError(f"{found[0]}, and no row has task.max_prompt_tokens ({most}) or less: none is left")
    dropped = set(long)
    return tuple(row for i, row in enumerate(rows) if i not in dropped), len(dropped)


def exclude_prompts(rows: Sequence[Row], others: Sequence[Row], where: str) -> tuple[Row, ...]:
    """Return the rows whose prompt is not among those of `others`. Raises UserError if none is left."""
    known = {row.prompt for row in others}
    left = tuple(row for row in rows if row.prompt not in known)
    if not left:
        raise UserError(f"{where}: every training prompt is also held out, want more distinct prompts")
    return left


def longest_prompt(rows: Iterable[Row]) -> int:
    """Return the tokens of the longest prompt in any form that is known before the run; 0 for no rows."""
    return max(
        (len(tokens) for row in rows for tokens in (row.tokens, *(form.tokens for form in row.forms))), default=0
    )


def longest_target(rows: Iterable[Row]) -> int:
    """Return the tokens of the longest known response, end token included; 0 if none is known."""
    return max((0 if row.target is None else len(row.target) for row in rows), default=0)


def hash_rows(rows: Sequence[Row]) -> str:
    """Hash of everything that policy and graders read, in order."""
    digest = hashlib.sha256()
    for row in rows:
        forms = (form.tokens for form in row.forms)
        tokens = [None if ids is None else ids.tolist() for ids in (row.tokens, row.target, *forms)]
        digest.update(json.dumps([*tokens, row.answer, row.columns], sort_keys=True, default=_json_default).encode())
    return digest.hexdigest()


def _json_default(value: Any) -> Any:
    """JSON form of other values, equal in every process: independent of set order and object addresses."""
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return str(value) if type(value).__str__ is not object.__str__ else type(value).__name__

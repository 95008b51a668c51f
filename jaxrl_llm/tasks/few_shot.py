"""Few-shot examples: which training rows stand before a question, and how they are written there."""

import itertools
import json
import string
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from jaxrl_llm.tasks.chat import SYSTEM_ROLES
from jaxrl_llm.tasks.config import ExamplesConfig
from jaxrl_llm.tasks.prompt_forms import WHERE, example_of
from jaxrl_llm.tasks.records import refuse
from jaxrl_llm.tasks.rows import AskedPrompt, Question, Row, tokenize
from jaxrl_llm.tasks.tokenizer import Tokenizer
from jaxrl_llm.tasks.turns import FilledText, Turn


class ExamplePool:
    """Training rows that may be examples: of a known response, of a prompt that is not held out, each prompt once."""

    def __init__(self, cfg: ExamplesConfig, train: Sequence[Row], held_out: Sequence[Row]):
        """
        Args:
            cfg: of the examples.
            train: rows that may be chosen.
            held_out: rows whose prompts may not.
        """
        self.cfg, hidden = cfg, {row.prompt for row in held_out}
        rows: dict[str, dict[str, Row]] = {}
        for row in train:
            if row.prompt not in hidden and example_of(row.source, "")[1].text:
                rows.setdefault(self._value(row), {}).setdefault(row.prompt, row)
        self.rows = {value: tuple(some.values()) for value, some in rows.items()}
        """By the value of the column `same`."""
        self.place = {value: {prompt: i for i, prompt in enumerate(some)} for value, some in rows.items()}

    def _value(self, row: Row) -> str:
        same = self.cfg.same
        return json.dumps(row.columns.get(same), sort_keys=True, default=str) if same else ""

    def draw(self, row: Row, rng: np.random.Generator) -> list[Row]:
        """Return examples for a row in random order: never the row itself, nor one of the same prompt."""
        rows, own = self._others(row)
        number = rng.choice(len(rows) - (own is not None), self.cfg.number, replace=False)
        return [rows[n + (own is not None and n >= own)] for n in number.tolist()]

    def refuse(self, rows: Sequence[Row]) -> None:
        """Raise UserError if there are too few examples for some of these rows."""
        short: Counter[tuple[str, int]] = Counter()
        for row in rows:
            some, own = self._others(row)
            if (left := len(some) - (own is not None)) < self.cfg.number:
                short[self._value(row), left] += 1
        alike = f" with the same {self.cfg.same}" if self.cfg.same else ""
        refuse(
            [
                f"{WHERE}.examples.number: got {self.cfg.number}, want {left} at most for {n} rows"
                f"{f' of {self.cfg.same} {value}' if self.cfg.same else ''}: there are {left} other training prompts{alike} with a "
                "response or an answer"
                for (value, left), n in short.items()
            ]
        )

    def _others(self, row: Row) -> tuple[Sequence[Row], int | None]:
        """Rows with the same value, and the place of the row's own prompt among them."""
        value = self._value(row)
        return self.rows.get(value, ()), self.place.get(value, {}).get(row.prompt)


def unknown_characters(cfg: ExamplesConfig, rows: Sequence[Row], tokenizer: Tokenizer) -> list[str]:
    """Errors for characters of the examples that the tokenizer does not have."""
    around = cfg.text.format(prompt="", response="") if cfg.place == "text" else ""
    texts = [
        (f"{WHERE}.examples.text", around),
        *(
            (row.where, example_of(row.source, question.form)[1].text)
            for row in rows
            for question in row.source.questions
        ),
    ]
    return [
        f"{where}: got characters {' '.join(map(repr, unknown))} in an example, want only those of tokenizer.alphabet"
        for where, text in texts
        if (unknown := tokenizer.unknown_characters(text))
    ]


def with_examples(cfg: ExamplesConfig, question: Question, examples: Sequence[Row]) -> Question:
    """Return the question after the examples, which are asked in the same form."""
    shown = [example_of(row.source, question.form) for row in examples]
    if not shown:
        return question
    start = tuple(itertools.takewhile(lambda turn: turn.role in SYSTEM_ROLES, question.turns))
    turns = question.turns[len(start) :]
    if cfg.place == "turns":
        before = [turn for prompt, response in shown for turn in (*prompt, Turn("assistant", response))]
        return question._replace(turns=(*start, *before, *turns))
    parts = [_written(cfg.text, {"prompt": prompt[-1].content, "response": response}) for prompt, response in shown]
    return question._replace(turns=(*start, Turn("user", _joined([*parts, turns[-1].content]))))


def left_out(asks: Sequence[tuple[Question, Sequence[Row]]], cfg: ExamplesConfig, tokenizer: Tokenizer) -> str:
    """Return an example's response that the chat template does not write as it is; "" if it writes those of all these prompts.
    Some templates leave the thoughts of earlier turns out."""
    if cfg.place == "text":
        return ""
    for question, examples in asks:
        (text,) = tokenizer.render([with_examples(cfg, question, examples).turns], question.arguments)
        responses = [example_of(row.source, question.form)[1].text for row in examples]
        if wrong := [response for response in responses if response.strip() not in str(text)]:
            return wrong[0]
    return ""


def _written(template: str, parts: Mapping[str, FilledText]) -> FilledText:
    """Fill the template of an example; what is data in the parts stays data."""
    fields = [(FilledText(literal, ()), name) for literal, name, *_ in string.Formatter().parse(template)]
    return _joined([text for literal, name in fields for text in (literal, *([parts[name]] if name else []))])


def _joined(parts: Sequence[FilledText]) -> FilledText:
    text, data = "", []
    for part in parts:
        data += [(len(text) + start, len(text) + end) for start, end in part.data]
        text += part.text
    return FilledText(text, tuple(data))


def fitted(
    cfg: ExamplesConfig, asks: Sequence[tuple[Question, Sequence[Row]]], most: int, tokenizer: Tokenizer
) -> list[AskedPrompt]:
    """Return each prompt with as many of its examples as fit.

    Args:
        cfg: of the examples.
        asks: each question with its examples.
        most: maximum number of prompt tokens; 0: no limit.
        tokenizer: encodes them.

    Raises:
        PromptError: names all that cannot be rendered.
    """
    found, left = [None] * len(asks), list(range(len(asks)))
    for number in range(cfg.number, -1, -1):
        some = [with_examples(cfg, asks[i][0], asks[i][1][:number]) for i in left]
        for i, asked in zip(left, tokenize(some, tokenizer, number), strict=True):
            found[i] = asked if not number or not most or len(asked.tokens) <= most else None
        left = [i for i in left if found[i] is None]
    return found

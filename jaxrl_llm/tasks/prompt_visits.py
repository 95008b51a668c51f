"""How rows are asked, visit by visit: a pure function of the run's seed, the row and the visit."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks.config import FileTask, ReasoningGymTask
from jaxrl_llm.tasks.few_shot import ExamplePool, fitted, left_out, unknown_characters
from jaxrl_llm.tasks.prompt_forms import WHERE, is_active
from jaxrl_llm.tasks.records import refuse
from jaxrl_llm.tasks.rows import AskedPrompt, Question, Row
from jaxrl_llm.tasks.tokenizer import Tokenizer
from jaxrl_llm.tasks.turns import PromptError

log = logging.getLogger("jaxrl_llm.tasks")
# Second number of the seeds: those of other random numbers of a run are small.
FORM, EXAMPLES, HELD_OUT = 2**32 - 1, 2**32 - 2, 2**32 - 3
# Visits whose prompts are kept: a step asks for each of its prompts a few times.
REMEMBERED = 4096
# Rows of which it is checked that the chat template writes their examples.
CHECKED = 64


def slots_needed(task: FileTask | ReasoningGymTask) -> int:
    """Tokens of the longest prompt that a visit can draw; 0: all are made before the run."""
    examples = task.prompting.examples
    return task.max_prompt_tokens if examples.number and examples.by == "visit" else 0


def problems(task: FileTask | ReasoningGymTask) -> list[str]:
    """Errors about a limit that is needed."""
    examples = task.prompting.examples
    if not examples.number or examples.by == "row" or task.max_prompt_tokens:
        return []
    return [
        f"{WHERE}.examples.by: got visit, want task.max_prompt_tokens above 0 as well: it sets the width of every batch, and how "
        "long examples can be is not known before they are drawn"
    ]


class PromptVisits:
    """Prompts of the training rows of a task."""

    def __init__(self, task: FileTask | ReasoningGymTask, tokenizer: Tokenizer, seed: int, pool: ExamplePool | None):
        """
        Args:
            task: the task's config.
            tokenizer: encodes the prompts.
            seed: of the run.
            pool: of the examples; None: there are none.
        """
        self.cfg, self.most = task.prompting, task.max_prompt_tokens
        self.tokenizer, self.seed, self.pool = tokenizer, seed, pool
        self.rows: tuple[Row, ...] = ()
        """The training rows."""
        self.draws_examples = slots_needed(task) > 0
        """Each visit draws examples."""
        weight = np.array([form.weight for form in self.cfg.forms])
        # The last form's begins where that of all others ends.
        self.begins = np.cumsum(weight)[:-1] / weight.sum()
        self.remembered = lru_cache(REMEMBERED)(self._with_new_examples)

    def _rng(self, *numbers: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, *numbers))

    def form_of(self, row: Row, i: int, uid: int) -> int:
        """Number of the form among the row's, that of the evaluation first. `i`: number of the row."""
        if not row.forms:
            return 0
        rng = self._rng(FORM, i, uid + 1 if self.cfg.by == "visit" else 0)
        return 1 + int(np.searchsorted(self.begins, rng.random(), side="right"))

    def __call__(self, i: int, uid: int) -> AskedPrompt:
        """Prompt of a visit of row i."""
        row = self.rows[i]
        form = self.form_of(row, i, uid)
        return self.remembered(i, form, uid) if self.draws_examples else (row.asks, *row.forms)[form]

    def _with_new_examples(self, i: int, form: int, uid: int) -> AskedPrompt:
        row = self.rows[i]
        examples = self.pool.draw(row, self._rng(EXAMPLES, i, uid + 1))
        (asked,) = fitted(self.cfg.examples, [(row.source.asks[form], examples)], self.most, self.tokenizer)
        return asked

    def with_own_examples(self, rows: Sequence[Row], stream: int, forms: bool) -> list[Row]:
        """Return the rows with the examples that they keep.

        Args:
            rows: of the task.
            stream: names the random numbers.
            forms: in all forms; else in that of the evaluation alone.

        Raises:
            UserError: names the first few rows whose prompts cannot be rendered.
        """
        asks: list[tuple[Question, Sequence[Row]]] = []
        of_row, checked = [], []
        for i, row in enumerate(rows):
            examples, questions = self.pool.draw(row, self._rng(stream, i)), row.source.asks
            checked += [(question, examples) for question in questions if i < CHECKED]
            questions = questions if forms else questions[:1]
            asks += [(question, examples) for question in questions]
            of_row += [i] * len(questions)
        try:
            found = fitted(self.cfg.examples, asks, self.most, self.tokenizer)
        except PromptError as error:
            refuse([f"{rows[of_row[i]].where}: {why}" for i, why in error.problems])
        if response := left_out(checked, self.cfg.examples, self.tokenizer):
            raise UserError(
                f"{WHERE}.examples: the chat template writes the response {response[:60]!r} of an example otherwise, want place: "
                "text, or a template `response` of what it writes"
            )
        each: list[list[AskedPrompt]] = [[] for _ in rows]
        for i, asked in zip(of_row, found, strict=True):
            each[i].append(asked)
        if few := sum(asked.num_examples < self.cfg.examples.number for asked in found):
            log.warning(
                "%s.examples: %d of %d prompts have fewer than %d examples: more do not fit into task.max_prompt_tokens (%d)",
                WHERE, few, len(found), self.cfg.examples.number, self.most,
            )  # fmt: skip
        return [
            replace(row.with_prompt(asked[0]), forms=tuple(asked[1:]) if forms else row.forms)
            for row, asked in zip(rows, each, strict=True)
        ]


def ask(
    task: FileTask | ReasoningGymTask, train: Sequence[Row], held_out: Sequence[Row], tokenizer: Tokenizer, seed: int
) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Return training and held-out rows that know how they are asked.

    Args:
        task: the task's config.
        train: training rows.
        held_out: rows of the evaluation, of which nothing is shown to others.
        tokenizer: encodes the prompts.
        seed: of the run.

    Raises:
        UserError: there are too few examples, or a prompt cannot be made.
    """
    cfg = task.prompting
    if not is_active(cfg):
        return tuple(train), tuple(held_out)
    pool = ExamplePool(cfg.examples, train, held_out) if cfg.examples.number else None
    visits = PromptVisits(task, tokenizer, seed, pool)
    if pool is not None:
        pool.refuse([*train, *held_out])
        refuse(unknown_characters(cfg.examples, [row for some in pool.rows.values() for row in some], tokenizer))
        train = visits.with_own_examples(train, EXAMPLES, forms=not visits.draws_examples)
        held_out = visits.with_own_examples(held_out, HELD_OUT, forms=False)
    if not visits.draws_examples:
        train, visits.pool = [replace(row, source=None) for row in train], None
    visits.rows = tuple(train)
    if visits.draws_examples or cfg.forms:
        train = [replace(row, visit=partial(visits, i)) for i, row in enumerate(train)]
    return tuple(train), tuple(replace(row, forms=(), source=None) for row in held_out)

"""Loading a task: training rows, held-out rows and the tokenizer."""

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from jaxrl_llm.config.options import with_options
from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks import distillation, prompt_forms, prompt_visits, reasoning_gym, records
from jaxrl_llm.tasks.config import (
    ArithmeticTask,
    CharacterTokenizer,
    FileTask,
    MixtureTask,
    PretrainedTokenizer,
    ReasoningGymTask,
    RolloutsTask,
    SingleTask,
    TaskPart,
)
from jaxrl_llm.tasks.rows import (
    Row,
    UntokenizedRow,
    exclude_prompts,
    fill_rows,
    hash_rows,
    limit_prompts,
    longest_prompt,
    longest_target,
    make_rows,
)
from jaxrl_llm.tasks.tokenizer import Tokenizer, load_tokenizer
from jaxrl_llm.tasks.turns import as_turns, from_data

log = logging.getLogger("jaxrl_llm.tasks")
DIGITS = "0123456789"


class Part(NamedTuple):
    """One task's training rows in a mixture."""

    rows: range
    """Indices into `Task.train`."""
    weight: float
    """Share of the prompts, relative to the other weights."""


@dataclass(frozen=True, eq=False, repr=False)
class Task:
    train: tuple[Row, ...]
    held_out: tuple[Row, ...]
    tokenizer: Tokenizer
    dropped: int = 0
    """Number of rows dropped because their prompt was too long, training and held-out together."""
    repeated: int = 0
    """Number of rows left out of training because their prompt is held out."""
    slots: int = 0
    """Prompt slots, at least: the longest prompt that a visit may have, if that is not known."""
    forms: tuple[str, ...] = ()
    """Names of the forms in which training rows are asked; (): that of the evaluation."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Weights of the tasks of a mixture, by name; the rows of each are neighbors. Empty: there is one task only."""

    @property
    def pad(self) -> int:
        return self.tokenizer.pad

    @property
    def eos(self) -> tuple[int, ...]:
        return self.tokenizer.eos

    @cached_property
    def num_tokens(self) -> int:
        """Size of the vocabulary to sample from: token ids 0 to num_tokens - 1."""
        return self.tokenizer.size

    @cached_property
    def prompt_slots(self) -> int:
        """S: tokens of the longest prompt in any form, held-out rows included."""
        return max(self.slots, longest_prompt(self.train + self.held_out))

    @cached_property
    def target_slots(self) -> int:
        """Tokens of the longest known response, end token and held-out rows included; 0 if none is known."""
        return longest_target(self.train + self.held_out)

    @cached_property
    def has_targets(self) -> bool:
        """True if a correct response is known for every row, as supervised training and the exact evaluation need."""
        return all(self.targets_known.values())

    @cached_property
    def targets_known(self) -> dict[str, bool]:
        """Whether a correct response is known for every row of each task; "" names a single one."""
        known = {row.task: True for row in self.held_out + self.train}
        return known | {row.task: False for row in self.train + self.held_out if row.target is None}

    @cached_property
    def parts(self) -> dict[str, Part]:
        """Training rows of each task by name; those of a single task have the name ""."""
        found, first = {}, 0
        for name, rows in itertools.groupby(self.train, key=lambda row: row.task):
            found[name] = Part(range(first, first := first + len(list(rows))), self.weights.get(name, 1.0))
        return found

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Hashes of training rows, held-out rows and tokenizer, reproducible on every host and after every restart."""
        return {
            "training rows": hash_rows(self.train),
            "held-out rows": hash_rows(self.held_out),
            "tokenizer": self.tokenizer.fingerprint,
        }

    def changed(self, saved: Mapping[str, str] | None) -> str:
        """Warning if the task differs from a saved fingerprint; "" if it is equal or none was saved."""
        differing = [name for name, now in self.fingerprint.items() if saved and saved.get(name) != now]
        if not differing:
            return ""
        return (
            f"task: got other {', '.join(differing)} than at the checkpoint (data file, chat template, tokenizer, or the library "
            "that generates them): the resumed run will differ from an uninterrupted one; restore them to resume exactly"
        )

    def decode(self, tokens: Int32[np.ndarray, "n t"], length: Int32[np.ndarray, " n"]) -> list[str]:
        """Text of the first `length` tokens of each row, special tokens left out."""
        return self.tokenizer.decode_batch([row[:n].tolist() for row, n in zip(tokens, length, strict=True)])

    def row(self, prompt: str) -> Row:
        """Return the row with this prompt in the form of the evaluation, or a new one without an answer. Raises UserError if it
        cannot be tokenized."""
        known = (row.stated for row in self.held_out + self.train if row.prompt == prompt)
        row = (
            next(known, None)
            or make_rows([UntokenizedRow("prompt", as_turns(prompt), "", None, {})], self.tokenizer)[0]
        )
        _warn_special_names([row])
        return row


def load_task(
    source: str | Path | SingleTask | MixtureTask,
    tokenizer: Tokenizer | CharacterTokenizer | PretrainedTokenizer,
    seed: int = 0,
    **fields: Any,
) -> Task:
    """Load the rows of a task.

        task = rl.load_task("problems.jsonl", model.tokenizer, prompt="{question}", answer="{solution}", held_out=200)

    Args:
        source: a .jsonl, .json or .parquet file or a saved dataset; or the config of a task, or of a mixture of several.
        tokenizer: encodes prompts and responses; or its config.
        seed: chooses the held-out rows; also seeds generated tasks.
        fields: with a path, the other fields of `FileTask`.

    Raises:
        UserError: names file, line and reason, or every wrong field.
    """
    if isinstance(source, MixtureTask) and not fields:
        return _mixture(source, tokenizer, seed)
    tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
    cfg = _single(source, fields)
    return _asked(cfg, _load(cfg, tokenizer, seed), seed)


def _single(source: str | Path | SingleTask, fields: Mapping[str, Any]) -> SingleTask:
    if isinstance(source, str | Path):
        return with_options(FileTask(str(source)), fields)
    if fields:
        raise UserError(
            f"load_task: got {type(source).__name__} with {', '.join(fields)}, want a path with these, or the config of a task"
        )
    return source


def _load(cfg: SingleTask, tokenizer: Tokenizer, seed: int) -> Task:
    """Load the rows, asked by the task's own prompt and in each form, without examples."""
    if isinstance(cfg, ArithmeticTask):
        return _arithmetic(cfg, tokenizer, seed)
    if isinstance(cfg, RolloutsTask):
        train, held_out, dropped = distillation.read_rows(cfg, tokenizer, seed)
        return _task(train, held_out, tokenizer, dropped, None)
    return _file(cfg, tokenizer, seed) if isinstance(cfg, FileTask) else _reasoning_gym(cfg, tokenizer, seed)


def _asked(cfg: SingleTask, task: Task, seed: int) -> Task:
    """Return the task with rows that know how they are asked."""
    if not isinstance(cfg, FileTask | ReasoningGymTask):
        return task
    train, held_out = prompt_visits.ask(cfg, task.train, task.held_out, task.tokenizer, seed)
    names = tuple(form.name for form in cfg.prompting.forms)
    return replace(task, train=train, held_out=held_out, slots=prompt_visits.slots_needed(cfg), forms=names)


def _mixture(cfg: MixtureTask, tokenizer: Tokenizer | CharacterTokenizer | PretrainedTokenizer, seed: int) -> Task:
    whole = tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
    parts, errors = [], []
    for part in cfg.tasks:
        try:
            own = load_tokenizer(_with_own(tokenizer, part)) if part.system or part.template else whole
            parts.append(_part(part, _load(part.task, own, seed)))
        except UserError as error:
            errors += _of_part(part, error)
    if errors:
        raise UserError("\n".join(errors))
    held_out = tuple(row for part in parts for row in part.held_out)
    kept, asked = [], []
    for part, task in zip(cfg.tasks, parts, strict=True):
        kept.append(exclude_prompts(task.train, held_out, f"task {part.name!r}"))
        try:
            asked.append(_asked(part.task, replace(task, train=kept[-1]), seed))
        except UserError as error:
            errors += _of_part(part, error)
    if errors:
        raise UserError("\n".join(errors))
    if also := sum(len(part.train) for part in parts) - sum(map(len, kept)):
        log.warning("task: %d rows were left out of training: another task of the mixture holds their prompt out", also)
    return Task(
        tuple(row for part in asked for row in part.train),
        tuple(row for part in asked for row in part.held_out),
        whole,
        dropped=sum(part.dropped for part in parts),
        repeated=sum(part.repeated for part in parts) + also,
        slots=max(part.slots for part in asked),
        forms=tuple(dict.fromkeys(name for part in asked for name in part.forms)),
        weights={part.name: part.weight for part in cfg.tasks},
    )


def _of_part(part: TaskPart, error: UserError) -> list[str]:
    return [f"task {part.name!r}: {line}" for line in str(error).splitlines()]


def _with_own(tokenizer: Tokenizer | CharacterTokenizer | PretrainedTokenizer, part: TaskPart) -> PretrainedTokenizer:
    """Return the tokenizer with the part's system prompt and arguments of the chat template."""
    if not isinstance(tokenizer, PretrainedTokenizer):
        name, got = ("system", part.system[:80]) if part.system else ("template", part.template)
        raise UserError(f"{name}: got {got!r}, want it empty, or a pretrained tokenizer with a chat template")
    return replace(tokenizer, system=part.system or tokenizer.system, template={**tokenizer.template, **part.template})


def _part(cfg: TaskPart, task: Task) -> Task:
    """Return the task with rows that know which part of a mixture they belong to."""
    taken = next((row for row in (*task.train, *task.held_out) if "task" in row.columns), None)
    # Stored responses name the task that they were sampled for.
    if taken and not isinstance(cfg.task, RolloutsTask):
        raise UserError(
            f"{taken.where}: got a column task, want another name for it: in a mixture it holds the name of the task"
        )
    if not task.train:
        raise UserError("got no training rows, want one or more")

    def of(rows: tuple[Row, ...]) -> tuple[Row, ...]:
        return tuple(
            replace(
                row,
                task=cfg.name,
                max_new_tokens=row.max_new_tokens or cfg.max_new_tokens,
                columns={**row.columns, "task": cfg.name},
            )
            for row in rows
        )

    return replace(task, train=of(task.train), held_out=of(task.held_out))


def _arithmetic(cfg: ArithmeticTask, tokenizer: Tokenizer, seed: int) -> Task:
    # The answer is the complete response as graders see it: with the end token, unless that is special.
    end = tokenizer.decode([tokenizer.eos[0]])
    texts = []
    for terms in itertools.product(DIGITS, repeat=cfg.terms):
        prompt, total = cfg.prompt(terms), str(sum(map(int, terms)))
        columns = {"prompt": prompt, "answer": total}
        texts.append(UntokenizedRow("arithmetic", as_turns(prompt), total + end, from_data(total), columns))
    if cfg.held_out >= len(texts):
        raise UserError(
            f"task.held_out: got {cfg.held_out}, want less than the {len(texts)} sums of {cfg.terms} digits"
        )
    train, held_out = _split(make_rows(texts, tokenizer), cfg.held_out, seed)
    return Task(train, held_out, tokenizer)


def _split(rows: Sequence[Row], held_out: int, seed: int) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    order = np.random.default_rng(seed).permutation(len(rows))
    shuffled = [rows[i] for i in order]
    return tuple(shuffled[held_out:]), tuple(shuffled[:held_out])


def _file(cfg: FileTask, tokenizer: Tokenizer, seed: int) -> Task:
    apart = bool(cfg.held_out_path or cfg.held_out_split)
    if apart == bool(cfg.held_out):
        got = "both" if apart else "neither"
        raise UserError(
            f"task: got {got} of held_out ({cfg.held_out}) and held_out_path ({cfg.held_out_path!r}) or held_out_split "
            f"({cfg.held_out_split!r}), want a number of rows or a location: the run is evaluated on held-out rows"
        )
    setting = "task.split" if cfg.split != FileTask.split else ""
    rows, dropped = _rows(cfg, records.read(Path(cfg.path), cfg.split, setting), tokenizer)
    if not apart:
        if cfg.held_out >= len(rows):
            raise UserError(f"task.held_out: got {cfg.held_out}, want less than the {len(rows)} rows of {cfg.path}")
        train, held_out = _split(rows, cfg.held_out, seed)
        return _task(train, held_out, tokenizer, dropped, cfg.path)
    place = Path(cfg.held_out_path or cfg.path), cfg.held_out_split or cfg.split
    setting = "task.held_out_split" if cfg.held_out_split else ""
    held_out, more = _rows(cfg, records.read(*place, setting), tokenizer)
    if shared := {row.prompt for row in rows} & {row.prompt for row in held_out}:
        log.warning("task.held_out_path: %d of its prompts are also trained on, e.g. %r", len(shared), min(shared))
    return _task(rows, held_out, tokenizer, dropped + more, None)


def _reasoning_gym(cfg: ReasoningGymTask, tokenizer: Tokenizer, seed: int) -> Task:
    parts = reasoning_gym.generate(cfg, cfg.size, (seed, 0)), reasoning_gym.generate(cfg, cfg.held_out, (seed, 1))
    (train, dropped), (held_out, more) = (_rows(cfg, part, tokenizer) for part in parts)
    return _task(train, held_out, tokenizer, dropped + more, f"task.size: {cfg.name}")


def _filled(cfg: FileTask | ReasoningGymTask, entries: list[records.Record]) -> list[UntokenizedRow]:
    """Rows with their templates filled. Where several answers of a generated entry are correct its answer may be empty: the
    dataset's scorer decides."""
    more = prompt_forms.templates(cfg.prompting)
    if isinstance(cfg, FileTask):
        return fill_rows(entries, cfg.prompt, cfg.answer, cfg.response, more)
    texts = fill_rows(entries, cfg.prompt, "", cfg.response, more)
    answers = [text.columns["answer"] for text in texts]
    return [replace(t, answer="" if a is None else str(a)) for t, a in zip(texts, answers, strict=True)]


def _rows(
    cfg: FileTask | ReasoningGymTask, entries: list[records.Record], tokenizer: Tokenizer
) -> tuple[tuple[Row, ...], int]:
    wrong = [*prompt_forms.problems(cfg.prompting, tokenizer), *prompt_visits.problems(cfg)]
    if cfg.too_long == "drop" and not cfg.max_prompt_tokens:
        wrong.append(
            "task.too_long: got drop, want task.max_prompt_tokens above 0 as well: without it no prompt is too long"
        )
    try:
        texts = prompt_forms.with_questions(cfg.prompting, _filled(cfg, entries))
    except UserError as error:
        wrong.append(str(error))
    if wrong:
        raise UserError("\n".join(wrong))
    return limit_prompts(make_rows(texts, tokenizer), texts, cfg.max_prompt_tokens, cfg.too_long)


def _task(
    train: tuple[Row, ...], held_out: tuple[Row, ...], tokenizer: Tokenizer, dropped: int, source: str | None
) -> Task:
    """Make the task, with a warning for each reason why rows were left out.

    Training rows whose prompt is held out are removed, unless `source` is None.
    """
    kept = train if source is None else exclude_prompts(train, held_out, source)
    if dropped:
        log.warning("task.max_prompt_tokens: %d rows with longer prompts were dropped", dropped)
    if affected := [row.answer for row in (*kept, *held_out) if tokenizer.has_special(row.answer)]:
        example = affected[0][:100]
        log.warning(
            "task.answer: %d hold special tokens, which graders never see in a response, e.g. %r",
            len(affected),
            example,
        )
    _warn_special_names([*kept, *held_out])
    if len(kept) < len(train):
        log.warning("task: %d rows were left out of training: their prompt is held out", len(train) - len(kept))
    return Task(kept, held_out, tokenizer, dropped, len(train) - len(kept))


def _warn_special_names(rows: Sequence[Row]) -> None:
    split = [name for row in rows for name in row.split[:1]]
    if split:
        log.warning(
            "task: %d rows hold special tokens' names in their data, which are encoded as text, e.g. %r; "
            "tokenizer.special_in_data: keep makes them special tokens",
            len(split), split[0],
        )  # fmt: skip

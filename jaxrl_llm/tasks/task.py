"""Tasks: rows for training, a held-out part, and the tokenizer that spells them."""

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks import reasoning_gym, records
from jaxrl_llm.tasks.config import ArithmeticTask, FileTask, ReasoningGymTask
from jaxrl_llm.tasks.rows import Row, Text, fill_all, hash_rows, limit, make_rows, without
from jaxrl_llm.tasks.tokenizer import Tokenizer
from jaxrl_llm.tasks.turns import as_turns, from_data

log = logging.getLogger("jaxrl_llm.tasks")
DIGITS = "0123456789"


@dataclass(frozen=True, eq=False, repr=False)
class Task:
    train: tuple[Row, ...]
    held_out: tuple[Row, ...]
    tokenizer: Tokenizer
    dropped: int = 0
    """Rows of both parts whose prompt was too long."""
    repeated: int = 0
    """Rows left out of training because their prompt is held out."""

    @property
    def pad(self) -> int:
        return self.tokenizer.pad

    @property
    def eos(self) -> tuple[int, ...]:
        return self.tokenizer.eos

    @cached_property
    def num_tokens(self) -> int:
        """Tokens that a policy may draw: 0 to num_tokens - 1."""
        return self.tokenizer.size

    @cached_property
    def prompt_slots(self) -> int:
        """S: the longest prompt of both parts, in tokens."""
        return max(len(row.tokens) for row in self.train + self.held_out)

    @cached_property
    def target_slots(self) -> int:
        """The longest response of both parts, in tokens, end token included; 0 if none is known."""
        return max(0 if row.target is None else len(row.target) for row in self.train + self.held_out)

    @cached_property
    def has_targets(self) -> bool:
        """Whether the right response of every row is known: what a warm start and the exact evaluation need."""
        return all(row.target is not None for row in self.train + self.held_out)

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """What prompts, answers and tokens are, by part: equal for equal ones, on every host and after every restart."""
        return {
            "training rows": hash_rows(self.train),
            "held-out rows": hash_rows(self.held_out),
            "tokenizer": self.tokenizer.fingerprint,
        }

    def changed(self, saved: Mapping[str, str] | None) -> str:
        """What to say where the task is no longer the one of this fingerprint; nothing where it is, or where none was saved."""
        differing = [name for name, now in self.fingerprint.items() if saved and saved.get(name) != now]
        if not differing:
            return ""
        return (
            f"task: got other {', '.join(differing)} than at the checkpoint (data file, chat template, tokenizer, or the library "
            "that makes them): from here on this is another run than one that was never stopped; put them back to go on exactly"
        )

    def decode(self, tokens: Int32[np.ndarray, "n t"], length: Int32[np.ndarray, " n"]) -> list[str]:
        return self.tokenizer.decode_batch([row[:n].tolist() for row, n in zip(tokens, length, strict=True)])

    def row(self, prompt: str) -> Row:
        """The row that asks this, or a new one without an answer. Raises UserError for what cannot be spelled."""
        known = (row for row in self.held_out + self.train if row.prompt == prompt)
        row = next(known, None) or make_rows([Text("prompt", as_turns(prompt), "", None, {})], self.tokenizer)[0]
        _tell_split([row])
        return row


def load_task(cfg: ArithmeticTask | FileTask | ReasoningGymTask, tokenizer: Tokenizer, seed: int) -> Task:
    """Raises UserError that names file, line and reason of what cannot be read."""
    if isinstance(cfg, ArithmeticTask):
        return _arithmetic(cfg, tokenizer, seed)
    return _file(cfg, tokenizer, seed) if isinstance(cfg, FileTask) else _gym(cfg, tokenizer, seed)


def _arithmetic(cfg: ArithmeticTask, tokenizer: Tokenizer, seed: int) -> Task:
    # The answer is the whole response as a grader sees it: with the end token, unless that is a special one.
    end = tokenizer.decode([tokenizer.eos[0]])
    texts = []
    for terms in itertools.product(DIGITS, repeat=cfg.terms):
        prompt, total = cfg.prompt(terms), str(sum(map(int, terms)))
        columns = {"prompt": prompt, "answer": total}
        texts.append(Text("arithmetic", as_turns(prompt), total + end, from_data(total), columns))
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
            f"({cfg.held_out_split!r}), want a number of rows or a place: they are what the run is evaluated on"
        )
    setting = "task.split" if cfg.split != FileTask.split else ""
    rows, dropped = _rows(cfg, _file_texts(cfg, Path(cfg.path), cfg.split, setting), tokenizer)
    if not apart:
        if cfg.held_out >= len(rows):
            raise UserError(f"task.held_out: got {cfg.held_out}, want less than the {len(rows)} rows of {cfg.path}")
        train, held_out = _split(rows, cfg.held_out, seed)
        return _task(train, held_out, tokenizer, dropped, cfg.path)
    place = Path(cfg.held_out_path or cfg.path), cfg.held_out_split or cfg.split
    setting = "task.held_out_split" if cfg.held_out_split else ""
    held_out, more = _rows(cfg, _file_texts(cfg, *place, setting), tokenizer)
    if shared := {row.prompt for row in rows} & {row.prompt for row in held_out}:
        log.warning("task.held_out_path: %d of its prompts are trained on too, e.g. %r", len(shared), min(shared))
    return _task(rows, held_out, tokenizer, dropped + more, None)


def _file_texts(cfg: FileTask, path: Path, split: str, setting: str) -> list[Text]:
    return fill_all(records.read(path, split, setting), cfg.prompt, cfg.answer, cfg.response)


def _gym(cfg: ReasoningGymTask, tokenizer: Tokenizer, seed: int) -> Task:
    parts = reasoning_gym.draw(cfg, cfg.size, (seed, 0)), reasoning_gym.draw(cfg, cfg.held_out, (seed, 1))
    (train, dropped), (held_out, more) = (_rows(cfg, _gym_texts(cfg, part), tokenizer) for part in parts)
    return _task(train, held_out, tokenizer, dropped + more, f"task.size: {cfg.name}")


def _gym_texts(cfg: ReasoningGymTask, entries: list[records.Record]) -> list[Text]:
    """Where several answers are right an entry may have none: the dataset's own scorer decides."""
    texts = fill_all(entries, cfg.prompt, "", cfg.response)
    answers = [text.columns["answer"] for text in texts]
    return [replace(t, answer="" if a is None else str(a)) for t, a in zip(texts, answers, strict=True)]


def _rows(cfg: FileTask | ReasoningGymTask, texts: list[Text], tokenizer: Tokenizer) -> tuple[tuple[Row, ...], int]:
    if cfg.too_long == "drop" and not cfg.max_prompt_tokens:
        raise UserError(
            "task.too_long: got drop, want a task.max_prompt_tokens above 0 beside it: without one, none is too long"
        )
    return limit(make_rows(texts, tokenizer), texts, cfg.max_prompt_tokens, cfg.too_long)


def _task(
    train: tuple[Row, ...], held_out: tuple[Row, ...], tokenizer: Tokenizer, dropped: int, source: str | None
) -> Task:
    """The task, and a warning for each way in which rows were left out. Without a source the parts stay as they are."""
    kept = train if source is None else without(train, held_out, source)
    if dropped:
        log.warning("task.max_prompt_tokens: %d rows with longer prompts were dropped", dropped)
    if hidden := [row.answer for row in (*kept, *held_out) if tokenizer.hidden(row.answer)]:
        example = hidden[0][:100]
        log.warning(
            "task.answer: %d hold special tokens, which graders never see in a response, e.g. %r", len(hidden), example
        )
    _tell_split([*kept, *held_out])
    if len(kept) < len(train):
        log.warning("task: %d rows were left out of training: their prompt is held out", len(train) - len(kept))
    return Task(kept, held_out, tokenizer, dropped, len(train) - len(kept))


def _tell_split(rows: Sequence[Row]) -> None:
    split = [name for row in rows for name in row.split[:1]]
    if split:
        log.warning(
            "task: %d rows hold special tokens' names in their data, which are encoded as text, e.g. %r; "
            "tokenizer.special_in_data: keep makes them special tokens",
            len(split), split[0],
        )  # fmt: skip

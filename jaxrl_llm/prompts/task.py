"""Tasks: rows of prompt and answer, a held-out part, and the tokenizer that spells them."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from jaxrl_llm.errors import UserError
from jaxrl_llm.prompts.config import ArithmeticTask, JsonlTask
from jaxrl_llm.prompts.tokenizer import PAD, character_tokenizer, unknown_characters

DIGITS = "0123456789"
ARITHMETIC_ALPHABET = DIGITS + "+<> #"
SHOWN = 5


class Row(NamedTuple):
    prompt: str
    answer: str
    """The whole right response, end token included."""


@dataclass(frozen=True)
class Task:
    train: tuple[Row, ...]
    held_out: tuple[Row, ...]
    tokenizer: Tokenizer
    eos: int

    @property
    def pad(self) -> int:
        return self.tokenizer.token_to_id(PAD)

    @property
    def num_tokens(self) -> int:
        return self.tokenizer.get_vocab_size()

    @property
    def prompt_slots(self) -> int:
        """S: the longest prompt of both parts, in tokens."""
        return max(len(row.prompt) for row in self.train + self.held_out)

    @property
    def answer_slots(self) -> int:
        return max(len(row.answer) for row in self.train + self.held_out)

    def encode(self, texts: list[str], slots: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens i32[n, slots], right-padded, and lengths i32[n]."""
        ids = [e.ids for e in self.tokenizer.encode_batch(texts)]
        tokens = np.full((len(ids), slots), self.pad, np.int32)
        for i, row in enumerate(ids):
            tokens[i, : len(row)] = row
        return tokens, np.array([len(row) for row in ids], np.int32)

    def decode(self, tokens: np.ndarray, length: np.ndarray) -> list[str]:
        return self.tokenizer.decode_batch([row[:n].tolist() for row, n in zip(tokens, length, strict=True)])


def load_task(cfg: ArithmeticTask | JsonlTask, seed: int) -> Task:
    """Raises UserError that names file, line and reason of what cannot be read."""
    if isinstance(cfg, ArithmeticTask):
        return _arithmetic(cfg, seed)
    return _jsonl(cfg)


def _arithmetic(cfg: ArithmeticTask, seed: int) -> Task:
    rows = [
        Row(f"<{'+'.join(terms)}>", f"{sum(map(int, terms))}#") for terms in itertools.product(DIGITS, repeat=cfg.terms)
    ]
    if cfg.held_out >= len(rows):
        raise UserError(f"task.held_out: got {cfg.held_out}, want less than the {len(rows)} sums of {cfg.terms} digits")
    order = np.random.default_rng(seed).permutation(len(rows))
    shuffled = [rows[i] for i in order]
    tokenizer = character_tokenizer(ARITHMETIC_ALPHABET)
    return Task(
        tuple(shuffled[cfg.held_out :]),
        tuple(shuffled[: cfg.held_out]),
        tokenizer,
        tokenizer.token_to_id(ARITHMETIC_ALPHABET[-1]),
    )


def _jsonl(cfg: JsonlTask) -> Task:
    if len(set(cfg.alphabet)) != len(cfg.alphabet) or len(cfg.alphabet) < 2:
        raise UserError(f"task.alphabet: got {cfg.alphabet!r}, want two different characters or more, each once")
    tokenizer = character_tokenizer(cfg.alphabet)
    train, held_out = (tuple(_rows(Path(path), tokenizer)) for path in (cfg.path, cfg.held_out_path))
    return Task(train, held_out, tokenizer, tokenizer.token_to_id(cfg.alphabet[-1]))


def _rows(path: Path, tokenizer: Tokenizer) -> Iterator[Row]:
    """The file's rows, or all that is wrong with its first few bad lines."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    rows, bad = [], []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(_row(line, tokenizer))
        except ValueError as error:
            bad.append(f"{path}:{number}: {error}")
    if bad:
        more = f"\n... and {len(bad) - SHOWN} more lines" if len(bad) > SHOWN else ""
        raise UserError("\n".join(bad[:SHOWN]) + more)
    if not rows:
        raise UserError(f"{path}: got an empty file, want one JSON object a line")
    yield from rows


def _row(line: bytes, tokenizer: Tokenizer) -> Row:
    try:
        value = json.loads(line.decode())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"got {type(value).__name__}, want an object with prompt and answer")
    for name in Row._fields:
        if not isinstance(value.get(name), str) or not value[name]:
            raise ValueError(f"{name}: got {json.dumps(value.get(name))}, want a string that is not empty")
        if unknown := unknown_characters(value[name], tokenizer):
            raise ValueError(f"{name}: got characters {' '.join(map(repr, unknown))}, want only those of task.alphabet")
    return Row(value["prompt"], value["answer"])

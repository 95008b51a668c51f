"""Requests of a session: a prompt and the samples asked for, split into sequence groups."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Int

from jaxrl_llm.control.config import budget_of
from jaxrl_llm.errors import UserError
from jaxrl_llm.rollout.config import RolloutConfig
from jaxrl_llm.rollout.request_checks import check_ids
from jaxrl_llm.rollout.sample import Controls, Vocabulary
from jaxrl_llm.types import Prompts

PromptsLike = Prompts | Sequence[str] | Sequence[Sequence[int]]
"""Prompts, their texts, or their token ids."""
NO_ROW = -1
"""`Prompts.row` of a prompt that is no row of a task."""


class PromptTokenizer(Protocol):
    """The part of a tokenizer that sampling uses."""

    def prompt_batch(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of prompts, chat template included."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""

    @property
    def texts(self) -> tuple[Sequence[bytes | None], bool]:
        """`texts` and `drops_space` of `TokenTexts`."""

    @property
    def fingerprint(self) -> str:
        """Hash of the vocabulary."""

    def spellings(self, ids: Sequence[int]) -> Sequence[str]:
        """Texts of token ids in which stop strings are searched."""


@dataclass(eq=False)
class Request:
    """One prompt and its samples."""

    id: int
    prompt: Prompts
    """One prompt: arrays without the dimension P."""
    controls: Controls
    """One number per row, [G]."""
    sample: Int[np.ndarray, " G"]
    """Sample numbers."""
    rows: Int[np.ndarray, " G"]
    """Rows of the output buffer."""
    stop: tuple[str, ...]
    trunk: Int[np.ndarray, " n"]
    """Completion tokens whose keys and values the rows share, as those of the prompt."""
    begin: Int[np.ndarray, " G"]
    """Leading tokens of the trunk that each row begins with."""
    groups: int = 0
    """Sequence groups that are queued or active; 0: nothing of it is decoded."""


class QueuedGroup(NamedTuple):
    """A sequence group that waits for a slot: rows of one request."""

    request: Request
    first: int
    """Index in the request of the row of the first lane."""
    rows: Int[np.ndarray, " F"]
    """Row of the output buffer in each lane; -1: none."""
    age: Int[np.ndarray, " F"]
    """Completion tokens of each row known so far beside those of the trunk."""


def split(
    request: Request, lanes: int, unfinished: Bool[np.ndarray, " G"], length: Int[np.ndarray, " G"]
) -> Iterator[QueuedGroup]:
    """Yield the sequence groups of the unfinished rows.

    Args:
        request: the request.
        lanes: F, rows per sequence group.
        unfinished: rows to decode.
        length: completion tokens known per row.
    """
    for first in range(0, len(request.rows), lanes):
        at = slice(first, first + lanes)
        if unfinished[at].any():
            rows, age, num = np.full(lanes, -1), np.zeros(lanes, np.int32), len(request.rows[at])
            rows[:num] = np.where(unfinished[at], request.rows[at], -1)
            age[:num] = np.where(unfinished[at], length[at] - request.begin[at], 0)
            yield QueuedGroup(request, first, rows, age)


def shared_tokens(
    tokens: Int[np.ndarray, "G C"], length: Int[np.ndarray, " G"], slides: bool
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " G"]]:
    """Return the known tokens of the longest of a prompt's rows, as far as others share them, and how many each row begins with.

    Args:
        tokens: of each row.
        length: known tokens.
        slides: the model has layers with a sliding window, which keep the last keys alone: all rows begin with the same tokens.
    """
    longest = tokens[length.argmax()]
    equal = (tokens == longest) & (np.arange(tokens.shape[1]) < length[:, None])
    begin = np.cumprod(equal, axis=1, dtype=np.int32).sum(axis=1, dtype=np.int32)
    begin = np.full_like(begin, begin.min()) if slides else begin
    return longest[: begin.max()], begin


def as_prompts(given: PromptsLike, tokenizer: PromptTokenizer | None, vocab: Vocabulary, first_uid: int) -> Prompts:
    """Return prompts given as texts or token ids as `Prompts`, whose uids count from `first_uid`.

    Args:
        given: prompts in any form; `Prompts` are returned as they are.
        tokenizer: encodes texts, with its chat template.
        vocab: the tokenizer's vocabulary.
        first_uid: uid of the first prompt.

    Raises:
        UserError: not prompts, or texts without a tokenizer.
        ValueError: an id is no token.
    """
    if isinstance(given, Prompts):
        return given
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise UserError(
            f"prompts: got {type(given).__name__}, want Prompts, a list of texts, or a list of lists of ids"
        )
    if not len(given):
        raise ValueError("prompts: got none, want one or more")
    texts = [isinstance(prompt, str) for prompt in given]
    if any(texts) != all(texts):
        raise UserError("prompts: got texts and token ids in one list, want one kind")
    if any(texts) and tokenizer is None:
        raise UserError("prompts: got texts for a model without a tokenizer, want token ids")
    ids = [np.asarray(x) for x in (tokenizer.prompt_batch(given) if any(texts) else given)]
    for i, prompt in enumerate(ids):
        if prompt.ndim != 1 or (prompt.size and prompt.dtype.kind not in "iu"):
            raise UserError(f"prompts[{i}]: got {prompt.dtype}{list(prompt.shape)}, want a text or a list of token ids")
        check_ids(f"prompts[{i}]", prompt, vocab)
    length = np.array([len(prompt) for prompt in ids], np.int32)
    tokens = np.full((len(ids), length.max(initial=1)), vocab.pad, np.int32)
    for i, prompt in enumerate(ids):
        tokens[i, : len(prompt)] = prompt
    uid = first_uid + np.arange(len(ids), dtype=np.int32)
    return Prompts(tokens=tokens, length=length, uid=uid, row=np.full(len(ids), NO_ROW, np.int32))


def stack_prompts(prompts: Sequence[Prompts], pad: int) -> Prompts:
    """Return single prompts as one batch, right-padded to the longest."""
    tokens = np.full((len(prompts), max(len(prompt.tokens) for prompt in prompts)), pad, np.int32)
    for p, prompt in enumerate(prompts):
        tokens[p, : len(prompt.tokens)] = prompt.tokens
    numbers = ([getattr(prompt, name) for prompt in prompts] for name in ("length", "uid", "row"))
    return Prompts(tokens, *(np.array(x, np.int32) for x in numbers))


def controls_for(cfg: RolloutConfig, prompts: int, temperature: float | None = None, start: int = 0) -> Controls:
    """Return the configured sampling parameters for `prompts` prompts.

    Args:
        cfg: the rollouts.
        prompts: number of prompts.
        temperature: another one than the configured; None: the configured one.
        start: state in which the rows' control starts.
    """
    full = lambda value, dtype: np.full(prompts, value, dtype)  # noqa: E731
    return Controls(
        temperature=full(cfg.temperature if temperature is None else temperature, np.float32),
        top_p=full(cfg.top_p, np.float32),
        top_k=full(cfg.top_k, np.int32),
        min_p=full(cfg.min_p, np.float32),
        min_new_tokens=full(cfg.min_new_tokens, np.int32),
        control=full(start, np.int32),
        budget=full(budget_of(cfg.control), np.int32),
    )


def controls_of_samples(cfg: RolloutConfig, sample: Int[np.ndarray, " B"], start: int = 0) -> Controls:
    """Return the configured sampling parameters of rows with these sample numbers; `start` as in `controls_for`."""
    each = {name: np.float32(values)[sample % len(values)] for name, values in vars(cfg.per_sample).items() if values}
    return controls_for(cfg, len(sample), start=start).replace(**each)

"""Requests of a session: a prompt and the samples asked for, checked at the border and split into sequence groups."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxrl_llm.errors import UserError
from jaxrl_llm.rollout.sample import Controls, Vocabulary
from jaxrl_llm.types import Prompts, Rollouts

PromptsLike = Prompts | Sequence[str] | Sequence[Sequence[int]]
"""Prompts, their texts, or their token ids."""
NO_ROW = -1
"""`Prompts.row` of a prompt that is no row of a task."""


class PromptTokenizer(Protocol):
    """The part of a tokenizer that sampling uses."""

    def prompt_batch(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of prompts, chat template included."""

    def spellings(self, ids: Sequence[int]) -> Sequence[str]:
        """Texts of token ids in which stop strings are searched."""


@dataclass(eq=False)
class Request:
    """One prompt and its samples."""

    id: int
    prompt: Prompts
    """One prompt: arrays without the dimension P."""
    controls: Controls
    """One number each."""
    first_sample: int
    """Sample number of the first row."""
    rows: Int[np.ndarray, " G"]
    """Rows of the output buffer."""
    stop: tuple[str, ...]
    groups: int = 0
    """Sequence groups that are queued or active; 0: nothing of it is decoded."""


class QueuedGroup(NamedTuple):
    """A sequence group that waits for a slot: rows of one request that stand at the same age."""

    request: Request
    first: int
    """Index in the request of the row of the first lane."""
    rows: Int[np.ndarray, " F"]
    """Row of the output buffer in each lane; -1: none."""
    age: int
    """Completion tokens known so far, the same number in all rows."""


def split(
    request: Request, lanes: int, unfinished: Bool[np.ndarray, " G"], length: Int[np.ndarray, " G"]
) -> Iterator[QueuedGroup]:
    """Yield the sequence groups of the unfinished rows. A lane is a sample number, so its noise does not depend on the split.

    Args:
        request: the request.
        lanes: F, rows per sequence group.
        unfinished: rows to decode.
        length: completion tokens known per row.
    """
    for first in range(0, len(request.rows), lanes):
        at = slice(first, first + lanes)
        for age in np.unique(length[at][unfinished[at]]):
            rows = np.full(lanes, -1)
            rows[: len(request.rows[at])] = np.where(unfinished[at] & (length[at] == age), request.rows[at], -1)
            yield QueuedGroup(request, first, rows, int(age))


def as_prompts(given: PromptsLike, tokenizer: PromptTokenizer | None, pad: int, first_uid: int) -> Prompts:
    """Return prompts given as texts or token ids as `Prompts`, whose uids count from `first_uid`.

    Args:
        given: prompts in any form; `Prompts` are returned as they are.
        tokenizer: encodes texts, with its chat template.
        pad: the pad token.
        first_uid: uid of the first prompt.

    Raises:
        UserError: not prompts, or texts without a tokenizer.
    """
    if isinstance(given, Prompts):
        return given
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise UserError(
            f"prompts: got {type(given).__name__}, want Prompts, a list of texts, or a list of lists of ids"
        )
    texts = [isinstance(prompt, str) for prompt in given]
    if any(texts) != all(texts):
        raise UserError("prompts: got texts and token ids in one list, want one kind")
    if any(texts) and tokenizer is None:
        raise UserError("prompts: got texts for a model without a tokenizer, want token ids")
    ids = [np.asarray(x) for x in (tokenizer.prompt_batch(given) if any(texts) else given)]
    for i, prompt in enumerate(ids):
        if prompt.ndim != 1 or (prompt.size and prompt.dtype.kind not in "iu"):
            raise UserError(f"prompts[{i}]: got {prompt.dtype}{list(prompt.shape)}, want a text or a list of token ids")
    length = np.array([len(prompt) for prompt in ids], np.int32)
    tokens = np.full((len(ids), length.max(initial=1)), pad, np.int32)
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


def check_prompts(prompts: Prompts, most: int, vocab: Vocabulary) -> None:
    """Raise ValueError unless there are prompts of 1 to `most` tokens of the vocabulary."""
    if not len(prompts.length):
        raise ValueError("prompts: got none, want one or more")
    limits_of("prompts.length", prompts.length, (len(prompts.length), 1), most)
    known = np.arange(prompts.tokens.shape[1]) < prompts.length[:, None]
    _check_ids("prompts.tokens", prompts.tokens[known], vocab)


def limits_of(name: str, given: Int[np.ndarray, "..."], shape: tuple[int, int], most: int) -> Int[np.ndarray, "P G"]:
    """Return numbers from 1 to `most` per row, given per prompt or per row. `shape`: P prompts, G samples.

    Raises:
        ValueError: names the field if a number is out of range, or if there are not as many as there should be.
    """
    given = np.asarray(given)
    if (
        given.shape not in (shape[:1], shape)
        or given.dtype.kind not in "iu"
        or not ((given >= 1) & (given <= most)).all()
    ):
        raise ValueError(f"{name}: got {given.tolist()}, want {shape[0]} numbers from 1 to {most}")
    return np.broadcast_to(given[:, None] if given.ndim == 1 else given, shape)


def check_rollouts(
    known: Rollouts,
    limit: Int[np.ndarray, "P G"],
    temperature: Float[np.ndarray, " B"],
    columns: Mapping[str, np.ndarray],
) -> None:
    """Raise ValueError unless rows can continue these rollouts: their log-probs must be those of the distribution that is recorded.

    Args:
        known: one row per sample of each prompt.
        limit: maximum completion tokens.
        temperature: at which the rows continue.
        columns: of the output buffer.
    """
    if len(known.length) != limit.size:
        raise ValueError(f"known: got {len(known.length)} rows, want {limit.size}, one per sample of each prompt")
    for b in np.flatnonzero(known.length > limit.reshape(-1))[:1]:
        raise ValueError(f"known[{b}]: got {known.length[b]} tokens, want at most the row's limit of {limit.flat[b]}")
    for name in ("kept_tokens", "raw_logprobs"):
        got, want = (None if x is None else x.shape[2:] for x in (getattr(known, name), columns.get(name)))
        if got != want:
            describe = lambda dims: "none" if dims is None else f"[B C{''.join(f' {n}' for n in dims)}]"  # noqa: E731
            raise ValueError(f"known.{name}: got {describe(got)}, want {describe(want)}, as this engine records")
    for b in np.flatnonzero(known.sampled.any(axis=1) & (known.temperature != temperature))[:1]:
        raise ValueError(
            f"controls.temperature: got {temperature[b]} for row {b} of known, want its own of {known.temperature[b]}: a row is "
            "scored at one temperature"
        )


def check_forced(name: str, rows: Sequence[Sequence[int]], room: Int[np.ndarray, " B"], vocab: Vocabulary) -> None:
    """Raise ValueError unless there is a list of token ids of the vocabulary for each row, none longer than its `room`."""
    if len(rows) != len(room):
        raise ValueError(f"{name}: got {len(rows)} rows, want {len(room)}, one per sample of each prompt")
    for b, tokens in enumerate(rows):
        ids = np.asarray(tokens)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ValueError(f"{name}[{b}]: got {ids.dtype}{list(ids.shape)}, want a list of token ids")
        if len(ids) > room[b]:
            raise ValueError(
                f"{name}[{b}]: got {len(ids)} tokens, want at most the {max(room[b], 0)} up to the row's limit"
            )
        _check_ids(f"{name}[{b}]", ids, vocab)


def _check_ids(name: str, ids: Int[np.ndarray, " n"], vocab: Vocabulary) -> None:
    """Raise ValueError unless all ids are tokens: the embedding would take others for its last row."""
    if wrong := ids[(ids < 0) | (ids >= vocab.size)].tolist():
        raise ValueError(f"{name}: got {wrong[0]}, want token ids from 0 to {vocab.size - 1}")

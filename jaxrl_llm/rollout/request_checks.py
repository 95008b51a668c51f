"""Checks of what a caller hands to a session. Each raises ValueError with the field, what it is and what is wanted, before anything
has changed."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxrl_llm.rollout.sample import Controls, Vocabulary
from jaxrl_llm.types import Prompts, Rollouts, check

MAX_INT = 2**31 - 1
# Per field of `Controls`: smallest and largest value, and the value that truncates nothing.
RANGES = {
    "temperature": (0, np.inf, None),
    "top_p": (0, 1, 1),
    "top_k": (0, MAX_INT, 0),
    "min_p": (0, 1, 0),
    "min_new_tokens": (0, MAX_INT, None),
    "control": (0, MAX_INT, None),
    "budget": (0, MAX_INT, None),
}


def per_prompt(name: str, given: Any, prompts: int, least: int, most: int = MAX_INT) -> Int[np.ndarray, " P"]:
    """Return one number per prompt. Raises ValueError unless all are whole and in range. `given`: one number, or one per prompt."""
    found = np.asarray(given)
    fits = found.shape in ((), (prompts,)) and found.dtype.kind in "iu"
    if not fits or not ((found >= least) & (found <= most)).all():
        raise ValueError(f"{name}: got {given!r}, want a whole number from {least} to {most}, or one for each prompt")
    return np.broadcast_to(found, prompts)


def check_prompts(prompts: Prompts, most: int, vocab: Vocabulary) -> None:
    """Check that there are prompts of 1 to `most` tokens of the vocabulary."""
    if not len(prompts.length):
        raise ValueError("prompts: got none, want one or more")
    one_each, why = np.ones(len(prompts.length), int), "; the most is the engine's prompt_slots"
    limits_of("prompts.length", prompts.length, one_each, most, why)
    for name in ("uid", "row"):
        _check_array(f"prompts.{name}", getattr(prompts, name), "iu", prompts.length.shape)
    if (large := np.flatnonzero((prompts.uid < 0) | (prompts.uid > MAX_INT))).size:
        raise ValueError(f"prompts.uid: got {prompts.uid[large[0]]}, want numbers from 0 to {MAX_INT}")
    slots = max(prompts.length.max(), prompts.tokens.shape[-1])
    _check_array("prompts.tokens", prompts.tokens, "iu", (len(prompts.length), slots))
    check_ids("prompts.tokens", prompts.tokens[np.arange(slots) < prompts.length[:, None]], vocab)


def limits_of(
    name: str, given: Int[np.ndarray, "..."], size: Int[np.ndarray, " P"], most: int, why: str = ""
) -> Int[np.ndarray, " B"]:
    """Return numbers from 1 to `most` per row.

    Args:
        name: in the error message.
        given: per prompt, or per row, [P G] or [B].
        size: rows per prompt.
        most: largest number.
        why: end of the error message.
    """
    given = np.asarray(given)
    fits = given.shape in (size.shape, (len(size), size[0]), (size.sum(),)) and given.dtype.kind in "iu"
    if not fits or not ((given >= 1) & (given <= most)).all():
        raise ValueError(f"{name}: got {given.tolist()}, want {len(size)} numbers from 1 to {most}{why}")
    return np.repeat(given, size) if given.shape == size.shape else given.reshape(-1)


def check_controls(controls: Controls, size: Int[np.ndarray, " P"], truncates: bool) -> None:
    """Check the sampling parameters, which are per prompt or per row.

    Args:
        controls: the parameters.
        size: rows per prompt.
        truncates: the engine records the tokens that truncation keeps.
    """
    if not isinstance(controls, Controls):
        raise ValueError(
            f"controls: got {type(controls).__name__}, want what engine.controls(prompts, control=...) returns"
        )
    for name, (least, most, off) in RANGES.items():
        given = getattr(controls, name)
        if not hasattr(given, "dtype"):
            raise ValueError(f"controls.{name}: got {type(given).__name__}, want an array")
        given = np.asarray(given)
        kinds = "iuf" if name in ("temperature", "top_p", "min_p") else "iu"
        _check_array(f"controls.{name}", given, kinds, (len(size),), (int(size.sum()),))
        # Not `<`, which NaN passes. A top_p of 0 and a min_p of 1 would keep nothing.
        inside = (given >= least) & (given <= most) & (given > 0 if name == "top_p" else given < np.inf)
        if not (inside & (given < 1 if name == "min_p" else True)).all():
            raise ValueError(f"controls.{name}: got {given.tolist()}, want numbers from {least} to {most}")
        if not truncates and off is not None and (given != off).any():
            raise ValueError(
                f"controls.{name}: got {given.tolist()}, want {off}: an engine that is made without top_p, top_k and min_p "
                "does not truncate"
            )


def check_stop(stop: Sequence[str], has_tokenizer: bool) -> tuple[str, ...]:
    """Return the stop strings."""
    if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
        raise ValueError(f"stop: got {stop!r}, want a list of texts that are not empty")
    if stop and not has_tokenizer:
        raise ValueError(f"stop: got {tuple(stop)} for a model without a tokenizer, want no stop strings")
    return tuple(stop)


def check_rollouts(
    known: Rollouts,
    limit: Int[np.ndarray, " B"],
    temperature: Float[np.ndarray, " B"],
    columns: Mapping[str, np.ndarray],
    vocab: Vocabulary,
) -> None:
    """Check that rows can continue these rollouts: their log-probs must be those of the distribution that is recorded.

    Args:
        known: one row per sample of each prompt.
        limit: maximum completion tokens.
        temperature: at which the rows continue.
        columns: of the output buffer.
        vocab: the tokenizer's vocabulary.
    """
    try:
        check(known)
    except ValueError as error:
        raise ValueError(str(error).replace("Rollouts.", "known.", 1)) from None
    if len(known.length) != len(limit):
        raise ValueError(f"known: got {len(known.length)} rows, want {len(limit)}, one per sample of each prompt")
    most = np.minimum(limit, known.tokens.shape[1])
    for b in np.flatnonzero((known.length < 0) | (known.length > most))[:1]:
        raise ValueError(f"known.length[{b}]: got {known.length[b]} tokens, want 0 to {most[b]}, the row's limit")
    check_ids("known.tokens", known.tokens[np.arange(known.tokens.shape[1]) < known.length[:, None]], vocab)
    for name in ("kept_tokens", "raw_logprobs"):
        got, want = (None if x is None else x.shape[2:] for x in (getattr(known, name), columns.get(name)))
        if got != want:
            describe = lambda dims: "none" if dims is None else f"[B C{''.join(f' {n}' for n in dims)}]"  # noqa: E731
            raise ValueError(f"known.{name}: got {describe(got)}, want {describe(want)}, as this engine records")
    for b in np.flatnonzero(known.sampled.any(axis=1) & (known.temperature != temperature))[:1]:
        raise ValueError(
            f"known.temperature[{b}]: got {known.temperature[b]}, want {temperature[b]}, that of the request: a row is scored at "
            "one temperature"
        )


def check_forced(name: str, rows: Sequence[Sequence[int]], room: Int[np.ndarray, " B"], vocab: Vocabulary) -> None:
    """Check that there is a list of token ids of the vocabulary for each row, none longer than its `room`."""
    if not isinstance(rows, Sequence | np.ndarray):
        raise ValueError(f"{name}: got {type(rows).__name__}, want a list of token ids for each row")
    if len(rows) != len(room):
        raise ValueError(f"{name}: got {len(rows)} rows, want {len(room)}, one per sample of each prompt")
    for b, tokens in enumerate(rows):
        try:
            ids = np.asarray(tokens)
        except ValueError:
            raise ValueError(f"{name}[{b}]: got lists of several lengths, want a list of token ids") from None
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ValueError(f"{name}[{b}]: got {ids.dtype}{list(ids.shape)}, want a list of token ids")
        if len(ids) > room[b]:
            raise ValueError(
                f"{name}[{b}]: got {len(ids)} tokens, want at most the {max(room[b], 0)} that limit= leaves"
            )
        check_ids(f"{name}[{b}]", ids, vocab)


def check_ids(name: str, ids: Int[np.ndarray, " n"], vocab: Vocabulary) -> None:
    """Check that all ids are tokens: the embedding would take others for its last row."""
    if wrong := ids[(ids < 0) | (ids >= vocab.size)].tolist():
        raise ValueError(f"{name}: got {wrong[0]}, want token ids from 0 to {vocab.size - 1}")


def _check_array(name: str, given: Any, kinds: str, *shapes: tuple[int, ...]) -> None:
    got = np.asarray(given)
    if got.shape not in shapes or got.dtype.kind not in kinds:
        want = "whole numbers" if "f" not in kinds else "numbers"
        fits = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise ValueError(f"{name}: got {got.dtype}{list(got.shape)}, want {want} {fits}")

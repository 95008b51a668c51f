"""Groups that are put together of the rows of several others, fresh and stored."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from jaxrl_llm.types import FILLER, PER_PROMPT, Groups, number_rows


class Composition(NamedTuple):
    """Which prompts and rows make groups. Numbers count over all parts, one behind the other."""

    prompt: Int[np.ndarray, " P"]
    """Prompt of each group; -1: an empty group."""
    rows: list[Int[np.ndarray, " n"]]
    """Rows of each group."""
    num_rows: int
    """B, filler rows included."""


def compose(parts: Sequence[Groups], made: Composition, pad: int) -> Groups:
    """Return the groups of a composition, with the slots of the first part; others may have fewer. A row's sample number stays, but
    among the rows of another prompt it is larger than any of theirs. `pad`: the pad token."""
    first_prompt = np.cumsum([0, *(len(part.failure) for part in parts)])
    first_row = np.cumsum([0, *(len(part.keep) for part in parts)])
    prompt, place = number_rows(np.array([len(rows) for rows in made.rows]), made.num_rows)
    source = np.full(made.num_rows, -1)
    source[prompt >= 0] = np.concatenate([np.zeros(0, int), *made.rows])

    def put(path: tuple, *arrays: np.ndarray) -> np.ndarray:
        names = {getattr(key, "name", None) for key in path}
        index, first = (made.prompt, first_prompt) if names & PER_PROMPT else (source, first_row)
        fill = pad if "tokens" in names else next((FILLER[name] for name in names if name in FILLER), 0)
        out = np.empty((len(index), *arrays[0].shape[1:]), arrays[0].dtype)
        for i, x in enumerate(arrays):
            here = (index >= first[i]) & (index < first[i + 1])
            if x.shape[1:] == out.shape[1:]:
                out[here] = x[index[here] - first[i]]
            else:
                # Slots that this part lacks.
                out[here] = fill
                out[(here, *(slice(n) for n in x.shape[1:]))] = x[index[here] - first[i]]
        out[index < 0] = fill
        return out

    whole = jax.tree_util.tree_map_with_path(put, *parts)
    home = np.concatenate([part.rollouts.prompt + first for part, first in zip(parts, first_prompt, strict=False)])
    of_other = (source >= 0) & (home[source] != made.prompt[prompt])
    sample = whole.rollouts.sample
    sample = np.where(of_other, 1 + sample.max(initial=0) + place, sample).astype(np.int32)
    prompts = whole.rollouts.prompts
    # An empty group, too, has a prompt of one token.
    prompts = prompts.replace(length=np.where(made.prompt < 0, 1, prompts.length).astype(np.int32))
    return whole.replace(rollouts=whole.rollouts.replace(prompts=prompts, prompt=prompt, sample=sample))


def widened(groups: Groups, like: Groups, pad: int) -> Groups:
    """Return the groups with as many slots and kept tokens as others have."""
    size, first = groups.rollouts.size, len(like.keep)
    rows = np.split(first + np.arange(size.sum()), np.cumsum(size)[:-1])
    return compose([like, groups], Composition(len(like.failure) + np.arange(len(size)), rows, int(size.sum())), pad)

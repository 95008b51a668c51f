"""Reuse in a run: which responses of a prompt's last visit a new visit begins with, and under which noise."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxrl_llm.experience.packed_groups import Packed, Packing
from jaxrl_llm.roles.collector import Asked, Collected
from jaxrl_llm.rollout.config import ExactReuse, InexactReuse
from jaxrl_llm.tasks.stream import make_prompts
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import COLUMNS, Finish, Groups, Prompts, Rollouts, number_rows

NEVER = -1
BLANK = {"length": 0, "temperature": 0, "finish": Finish.UNFINISHED}
"""Numbers of a row without an earlier response."""


class StoredVisits(NamedTuple):
    """The last visit of each row of the task."""

    uid: Int[np.ndarray, " rows"]
    """Uid of its prompt; -1: it was never visited."""
    repeats: Int[np.ndarray, " rows"]
    """Visits in a row, up to this one, that repeated the noise of an earlier one."""
    packed: dict[str, Packed]
    """Its groups, by the number of the row, as text. Never changed: a checkpoint writes each once."""


class NoReusing:
    """Every response is sampled from its first token on."""

    def init(self, num_rows: int) -> tuple:
        return ()

    def start(self, state: tuple) -> "NoReusing":
        return self

    def visit(self, prompts: Prompts) -> Prompts:
        return prompts

    def add(self, asked: Asked) -> Asked:
        return asked

    def finish(self, groups: Groups) -> tuple:
        return ()

    def describe(self, found: Collected) -> dict[str, float]:
        return {}


@dataclass(frozen=True)
class Reusing:
    """Reuse by a rule. Its state is `StoredVisits`."""

    rule: ExactReuse | InexactReuse
    task: Task
    packing: Packing
    most: int
    """Completion slots."""
    max_kept_tokens: int = 0
    """K, of the run."""

    def init(self, num_rows: int) -> StoredVisits:
        return StoredVisits(np.full(num_rows, NEVER, np.int32), np.zeros(num_rows, np.int32), {})

    def start(self, state: StoredVisits) -> "StepReuse":
        return StepReuse(self, state)


class StepReuse:
    """Reuse in one step."""

    def __init__(self, reusing: Reusing, state: StoredVisits):
        self.reusing, self.state = reusing, state
        self.seen: set[int] = set()
        """Rows visited in this step. A second visit of one in the same step samples afresh."""
        self.known: dict[int, int] = {}
        """Row of each prompt that has earlier responses, by the prompt's uid."""
        self.num_prompts = 0

    def visit(self, prompts: Prompts) -> Prompts:
        """Return the prompts as they are asked. A visit that repeats the noise of another one has that one's uid."""
        exact, state = isinstance(self.reusing.rule, ExactReuse), self.state
        uid, most = prompts.uid.copy(), self.reusing.rule.max_repeats if exact else 0
        for p, row in enumerate(prompts.row.tolist()):
            if row not in self.seen and state.uid[row] != NEVER and not (most and state.repeats[row] >= most):
                uid[p] = state.uid[row] if exact else uid[p]
                self.known[int(uid[p])] = row
            self.seen.add(row)
        self.num_prompts += len(uid)
        same = np.array_equal(uid, prompts.uid)
        # Its uid decides in which form a prompt is asked.
        return prompts if same else make_prompts(self.reusing.task, self.reusing.task.train, prompts.row, uid)

    def add(self, asked: Asked) -> Asked:
        """Return the requests with the earlier responses of their prompts."""
        there = [p for p, uid in enumerate(asked.prompts.uid.tolist()) if uid in self.known]
        if not there:
            return asked
        rows = [str(self.known[uid]) for uid in asked.prompts.uid[there].tolist()]
        earlier = self.reusing.packing.unpack([self.state.packed[row] for row in rows]).rollouts
        place, of = _places(asked, np.array(there), earlier)
        prompt, sample = number_rows(asked.samples)
        columns = {name: np.full(len(prompt), blank, getattr(earlier, name).dtype) for name, blank in BLANK.items()}
        for name, out in columns.items():
            out[place] = getattr(earlier, name)[of]
        for column in COLUMNS:
            if column.rollouts and (x := getattr(earlier, column.name)) is not None:
                shape = (len(prompt), self.reusing.most, *(self.reusing.max_kept_tokens for _ in column.dims))
                # As wide as the longest of them; their kept tokens as many as the most that one token has.
                columns[column.name] = out = np.full(shape, column.fill, x.dtype)
                out[(place, *(slice(n) for n in x.shape[1:]))] = x[of]
        sample += np.repeat(asked.first_sample, asked.samples).astype(np.int32)
        known = Rollouts(prompts=asked.prompts, prompt=prompt, sample=sample, **columns)
        return asked._replace(known=known)

    def finish(self, groups: Groups) -> StoredVisits:
        """Return the state after the step. `groups`: all that it sampled."""
        uid, repeats, packed = self.state.uid.copy(), self.state.repeats.copy(), dict(self.state.packed)
        prompts = groups.rollouts.prompts
        for number, row, blob in zip(
            prompts.uid.tolist(), prompts.row.tolist(), self.reusing.packing.pack(groups), strict=True
        ):
            repeats[row] = repeats[row] + 1 if number in self.known else 0
            uid[row], packed[str(row)] = number, blob
        return StoredVisits(uid, repeats, packed)

    def describe(self, found: Collected) -> dict[str, float]:
        """Metrics. reuse/prompts: share of the prompts that had earlier responses; reuse/tokens: share of all tokens that were
        kept of them; reuse/whole: share of the rows that were kept as they were; reuse/decoded: tokens that were decoded."""
        length = found.groups.rollouts.length
        return {
            "reuse/prompts": len(self.known) / self.num_prompts,
            "reuse/tokens": float(found.kept.sum() / length.sum()),
            "reuse/whole": float(np.mean(found.kept == length)),
            "reuse/decoded": float(found.stats.tokens),
        }


def _places(
    asked: Asked, there: Int[np.ndarray, " n"], earlier: Rollouts
) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"]]:
    """Return the rows asked for that have an earlier response of the same sample number, and which these are.

    Args:
        asked: the requests.
        there: prompts with earlier responses.
        earlier: these, a group for each.
    """
    begin, p = np.cumsum(asked.samples) - asked.samples, there[earlier.prompt]
    number = earlier.sample - asked.first_sample[p]
    fits = np.flatnonzero((number >= 0) & (number < asked.samples[p]))
    return (begin[p] + number)[fits], fits

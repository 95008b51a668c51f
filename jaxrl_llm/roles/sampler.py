"""The sampler: prompts -> generate -> reward. It needs no optimizer and no loss."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Int, Key

from jaxrl_llm.errors import UserError
from jaxrl_llm.experience.curricula import Curriculum, Uniform, VisitCount
from jaxrl_llm.experience.gates import Gate
from jaxrl_llm.experience.independent_rows import independent_rows
from jaxrl_llm.experience.stage_checks import as_array
from jaxrl_llm.roles.asking import Asking, join_prompts, select_prompts
from jaxrl_llm.roles.collector import Asked, Collected, never
from jaxrl_llm.roles.hinting import Hinting, NoHinting
from jaxrl_llm.roles.reusing import NoReusing, Reusing, StoredVisits
from jaxrl_llm.tasks.stream import make_prompts
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import Groups, Policy, Prompts, join_groups

# Third number of the seed of curriculum and gate, which makes their generators others than that of filter and replay.
CURRICULUM, GATE = 1, 2
# Rows that the curriculum chooses for each one that is wanted, at most, while the gate skips them.
MOST_CHOICES = 50


def next_prompts(
    task: Task, curriculum: Curriculum | Uniform, choice: VisitCount, rng: np.random.Generator, n: int
) -> tuple[VisitCount, Prompts]:
    """Return the curriculum's next state, and the prompts of the n training rows that it chooses.

        choice = curriculum.init(len(task.train))
        choice, prompts = rl.next_prompts(task, curriculum, choice, rng, 64)

    Args:
        task: its `train` rows are chosen from.
        curriculum: one that counts visits: `rl.curricula.Uniform()`, or `rl.curricula.counted` of your own.
        choice: its state.
        rng: for its random numbers.
        n: number of prompts.

    Raises:
        UserError: the curriculum counts no visits, or its rows are not n indices of the task's rows.
    """
    if not isinstance(choice, VisitCount):
        raise UserError(
            f"choice: got {type(choice).__name__}, the state of a curriculum that counts no visits, from which each visit of a "
            "prompt gets its noise; want curriculum = rl.curricula.counted(yours), and choice = curriculum.init(len(task.train))"
        )
    after, chosen = curriculum.choose(choice, rng, n)
    num, row = len(task.train), as_array(chosen)
    if row.shape != (n,) or row.dtype.kind not in "iu" or not ((row >= 0) & (row < num)).all():
        raise UserError(f"curriculum: got rows {row.tolist()}, want {n} indices of the task's {num} rows")
    return after, make_prompts(task, task.train, row, choice.visits + np.arange(n))


class SourceState(NamedTuple):
    """State of a `Sampler`."""

    choice: VisitCount
    gate: Any
    asking: Any
    visits: Int[np.ndarray, " rows"]
    """Times that each row of the task was sampled."""
    num_tokens: np.ndarray
    """Completion tokens sampled so far."""
    hints: Any = ()
    reuse: StoredVisits | tuple = ()


class Stages(NamedTuple):
    """What decides which prompts are sampled, how often, and how responses begin."""

    curriculum: Curriculum
    """One that counts visits."""
    gate: Gate
    asking: Asking
    hints: Hinting | NoHinting = NoHinting()
    reuse: Reusing | NoReusing = NoReusing()

    @property
    def asks_at_once(self) -> int | None:
        """As in `Asking`; with hints, or reused tokens, a step's rows stand at different ages from the start."""
        from_start = isinstance(self.hints, NoHinting) and isinstance(self.reuse, NoReusing)
        return self.asking.asks_at_once if from_start else None


class Draws:
    """Prompts of one step: chosen by the curriculum, admitted by the gate."""

    def __init__(self, task: Task, stages: Stages, state: SourceState, rng: tuple[int, ...]):
        self.task, self.stages, self.state = task, stages, state
        self.choosing, self.admitting = (np.random.default_rng((*rng, stage)) for stage in (CURRICULUM, GATE))
        self.reuse = stages.reuse.start(state.reuse)
        self.skipped = self.forced = 0

    def __call__(self, n: int) -> Prompts:
        """The next n prompts. If the gate skips too many, the last ones are taken although it would skip them."""
        found: list[Prompts] = []
        missing, left = n, MOST_CHOICES * n
        while missing:
            choice, prompts = next_prompts(self.task, self.stages.curriculum, self.state.choice, self.choosing, missing)
            gate, admitted = self.stages.gate.admit(self.state.gate, self.admitting, prompts.row)
            self.state, left = self.state._replace(choice=choice, gate=gate), left - missing
            if left <= 0:
                self.forced += np.count_nonzero(~admitted)
                admitted = np.ones_like(admitted)
            self.skipped += np.count_nonzero(~admitted)
            found.append(select_prompts(prompts, admitted))
            missing -= np.count_nonzero(admitted)
        return self.reuse.visit(join_prompts(found))

    @property
    def metrics(self) -> dict[str, float]:
        return {"gate/skipped": float(self.skipped), "gate/forced": float(self.forced)}


class Sampler:
    """A source of graded groups: `use` a policy, `take` a step's groups, `observe` them."""

    def __init__(self, task: Task, stages: Stages, collect: Callable[..., Collected], key: Key[Array, ""], seed: int):
        """
        Args:
            task: its `train` rows are sampled.
            stages: choose the rows and the number of samples.
            collect: a `Collector`.
            key: random key of all sampled tokens.
            seed: of the stages' random numbers.
        """
        self.task, self.stages, self.collect, self.key, self.seed = task, stages, collect, key, seed
        num = len(task.train)
        self.state = SourceState(
            stages.curriculum.init(num),
            stages.gate.init(num),
            stages.asking.init(num),
            np.zeros(num, np.int32),
            np.array(0),
            stages.hints.init(num),
            stages.reuse.init(num),
        )
        """Resumable state; part of `RunState`."""
        self.policy: Policy | None = None
        self.give_up: Callable[[], bool] = never
        self.last: Collected | None = None
        """All that the last `take` sampled, with its statistics."""
        self.metrics: dict[str, float] = {}
        """Metrics of the last `take`."""
        self.rejected: Groups | None = None
        """Groups of the last `take` beside those that it returned."""

    def use(self, policy: Policy) -> None:
        """Sample from `policy` in later calls of `take`."""
        self.policy = policy

    def take(self, step: int) -> Groups:
        """Graded groups of a step. Raises GivenUp, with the state unchanged, if `give_up` returns True meanwhile."""
        draws, asking, hints = (
            Draws(self.task, self.stages, self.state, (self.seed, step)),
            self.stages.asking,
            self.stages.hints,
        )
        requests = asking.start(self.state.asking)

        def begun(asked: Asked) -> Asked:
            return hints.add(draws.reuse.add(asked), self.state.hints, step)

        def more(groups: Groups, number: Int[np.ndarray, " n"]) -> Asked | None:
            asked = requests.more(groups, number)
            return asked and begun(asked)

        found = self.collect(
            self.policy, begun(requests.first(draws)), self.task.train, self.key, self.give_up,
            more if asking.follows_up else None,
        )  # fmt: skip
        taken = requests.finish(hints.mark(found.groups))
        visits = self.state.visits + np.bincount(found.groups.rollouts.prompts.row, minlength=len(self.task.train))
        self.last, self.rejected = found, taken.rejected
        self.state = draws.state._replace(
            asking=requests.state,
            visits=visits.astype(np.int32),
            num_tokens=self.state.num_tokens + np.count_nonzero(found.groups.rollouts.sampled),
            reuse=draws.reuse.finish(found.groups),
        )
        chosen = self.stages.curriculum.describe(draws.state.choice, found.groups.rollouts.prompts.row)
        self.metrics = (
            taken.metrics
            | draws.metrics
            | draws.reuse.describe(found)
            | {"prompts/never_seen": float(np.mean(visits == 0))}
            | {f"curriculum/{name}": value for name, value in chosen.items()}
        )
        return taken.fresh

    def with_rejected(self, groups: Groups) -> Groups:
        """Return the groups of the last `take` and those that it left out."""
        return groups if self.rejected is None else join_groups(groups, self.rejected)

    def observe(self, groups: Groups) -> None:
        """Update curriculum, gate, budget and hints with the groups of a step, and with those that `take` left out; none of them
        sees a response that began with a hint, or with tokens of another."""
        groups = independent_rows(self.with_rejected(groups))
        state, stages = self.state, self.stages
        self.state = state._replace(
            choice=stages.curriculum.observe(state.choice, groups),
            gate=stages.gate.observe(state.gate, groups),
            asking=stages.asking.observe(state.asking, groups),
            hints=stages.hints.observe(state.hints, groups),
        )

"""A session: requests join, stop, resume and leave while others decode.

    session = engine.session(policy, key)
    ids = session.add(["What is 3 + 4?"], samples=2)
    while session.pending:
        finished = session.advance()
    rollouts = session.take(ids)

A row's tokens depend on the weights, its prompt and known tokens, the session's key, its uid and its sample number, and on nothing
else: not on when it joined, was stopped or resumed. The random number of a token is named by its completion slot.
"""

import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int, Key

from jaxrl_llm.errors import UserError
from jaxrl_llm.model.cache import UNLIMITED, attention_windows
from jaxrl_llm.parallel import hosts
from jaxrl_llm.perf.work import Work, decode_step, weight_bytes
from jaxrl_llm.rollout.active_batch import ActiveBatch
from jaxrl_llm.rollout.batch_sizes import BatchSizes
from jaxrl_llm.rollout.config import RolloutConfig
from jaxrl_llm.rollout.control_set import ControlSet
from jaxrl_llm.rollout.decode import ChunkResult
from jaxrl_llm.rollout.output import OutputBuffer, Position
from jaxrl_llm.rollout.programs import Programs
from jaxrl_llm.rollout.request_checks import (
    MAX_INT,
    check_controls,
    check_forced,
    check_prompts,
    check_rollouts,
    check_stop,
    limits_of,
    per_prompt,
)
from jaxrl_llm.rollout.requests import (
    PromptsLike,
    PromptTokenizer,
    QueuedGroup,
    Request,
    as_prompts,
    controls_of_samples,
    shared_tokens,
    split,
    stack_prompts,
)
from jaxrl_llm.rollout.sample import Controls
from jaxrl_llm.types import Policy, Rollouts, number_rows

Ids = Int[np.ndarray, " n"]


class Stats(NamedTuple):
    """Counters of a session so far."""

    seconds: float = 0.0
    chunks: int = 0
    steps: int = 0
    """Decode steps."""
    row_steps: int = 0
    """Rows decoded, summed over all steps, finished rows included."""
    tokens: int = 0
    """Tokens sampled: row steps excluding those of finished rows."""
    overflow: int = 0
    """Tokens sampled where more than K tokens qualified."""
    work: Work = Work(0.0, 0.0)
    """Bytes and FLOPs of all steps on one device."""

    def least_seconds(self, bytes_per_s: float, flops_per_s: float) -> float:
        """Return the least time of all steps in seconds, at these hardware ceilings of one device."""
        return max(self.work.bytes / bytes_per_s, self.work.flops / flops_per_s)


def add_stats(a: Stats, b: Stats) -> Stats:
    """Return the counters of two sessions together."""
    return Stats(*(x + y for x, y in zip(a[:-1], b[:-1], strict=True)), Work(*np.add(a.work, b.work).tolist()))


class Session:
    """Open requests of one policy. All hosts of a job must make the same calls in the same order."""

    def __init__(
        self, cfg: RolloutConfig, sizes: BatchSizes, programs: Programs, tokenizer: PromptTokenizer | None,
        control_set: ControlSet, policy: Policy, key: Key[Array, ""],
    ):  # fmt: skip
        """Made by `Engine.session`.

        Args:
            cfg: defaults of each request.
            sizes, programs: of the engine. With `trunk_slots`, rows that continue rollouts keep their sample numbers, and those of
                a prompt share the keys of the known tokens that they have in common.
            tokenizer: for prompts given as text, and for stop strings.
            control_set: of the engine.
            policy: samples the tokens.
            key: random key of the session.
        """
        self.cfg, self.programs, self.tokenizer = cfg, programs, tokenizer
        self.decoding = programs.decoding
        self.trunk_slots, self.lanes = sizes.trunk_slots, sizes.rows_per_group
        self.prompt_slots = sizes.prompt_slots[-1] - self.trunk_slots
        self.output = OutputBuffer(cfg.max_new_tokens, self.decoding)
        self.batch = ActiveBatch(sizes, programs, self.output)
        self.key = hosts.put(np.asarray(jax.random.key_data(key)), self.decoding.layout.replicated)
        self.requests: dict[int, Request] = {}
        self.queue: deque[QueuedGroup] = deque()
        self.control_set, self.num_added, self.stats = control_set, 0, Stats()
        self.finished_early: set[int] = set()
        """Requests to report by the next `advance`, of which nothing was left to decode."""
        check_policy(policy)
        self.params, self.version = policy.params, int(policy.version)
        self.weights = weight_bytes(policy.params, self.decoding.model)

    @property
    def pending(self) -> bool:
        """True while `advance` has something to decode or to report."""
        return bool(self.queue or self.finished_early or self.batch.active.any())

    def add(
        self, prompts: PromptsLike, samples: int | Int[np.ndarray, " P"] | None = None, controls: Controls | None = None,
        limit: Int[np.ndarray, " P"] | Int[np.ndarray, "P G"] | None = None,
        known: Rollouts | Sequence[Sequence[int]] | None = None, stop: Sequence[str] | None = None,
        first_sample: int | Int[np.ndarray, " P"] = 0,
    ) -> Ids:  # fmt: skip
        """Add one request per prompt. They join the next chunk in which there is room.

        Args:
            prompts: `Prompts`, equal on every host; or texts, or lists of token ids, whose uids count up in the session.
            samples: G, samples per prompt, or a number for each prompt; the configured number by default.
            controls: sampling parameters, per prompt or per row; the configured ones by default.
            limit: maximum completion tokens, per prompt or per row, known ones included; `max_new_tokens` by default.
            known: first tokens of each of the B rows, from which it continues: token ids, which count as forced, or earlier
                rollouts, which keep their log-probs and versions. They are a part of the text that a control allows.
            stop: stop strings; the configured ones by default.
            first_sample: sample number of each prompt's first row, one number or one for each prompt.

        Returns:
            Ids of the requests: 0, 1, 2, ... in the order in which they were added.

        Raises:
            UserError: prompts of another type.
            ValueError: anything else that is wrong; it names the field, what it is and what is wanted. Nothing has changed.
        """
        vocab, most = self.decoding.vocab, self.cfg.max_new_tokens
        prompts = as_prompts(prompts, self.tokenizer, vocab, self.num_added)
        check_prompts(prompts, self.prompt_slots, vocab)
        num = len(prompts.length)
        size = per_prompt("samples", self.cfg.samples if samples is None else samples, num, 1)
        first = per_prompt("first_sample", first_sample, num, 0, MAX_INT - int(size.max()))
        limits = limits_of("limit", np.full(num, most) if limit is None else limit, size, most)
        stop = check_stop(self.cfg.stop if stop is None else stop, self.tokenizer is not None)
        sample = np.repeat(first, size).astype(np.int32) + number_rows(size)[1]
        sample = known.sample if self.trunk_slots and isinstance(known, Rollouts) else sample
        if controls is None:
            controls = controls_of_samples(self.cfg, sample, self.control_set.start(self.cfg.control))
        check_controls(controls, size, self.decoding.max_kept_tokens > 0)
        controls = jax.tree.map(lambda x: np.repeat(x, size) if len(x) == num else np.asarray(x), controls)
        if isinstance(known, Rollouts):
            check_rollouts(known, limits, controls.temperature, self.output.columns, vocab)
        elif known is not None:
            check_forced("known", known, limits, vocab)
        states = self.control_set.start_states(controls, limits, known)
        ids = self.num_added + np.arange(num)
        self.num_added += num
        rows = self.output.allocate(limits, controls.control)
        if isinstance(known, Rollouts):
            self.output.restore(rows, known, np.concatenate(states))
            self._end_in(rows, states)
        elif known is not None:
            self._force(rows, known, states)
        end = np.cumsum(size)
        for p, id in enumerate(ids.tolist()):
            prompt, own = jax.tree.map(lambda x, p=p: np.array(x[p]), prompts), slice(end[p] - size[p], end[p])
            of_rows = jax.tree.map(lambda x, own=own: np.array(x[own]), controls)
            self.requests[id] = Request(id, prompt, of_rows, sample[own], rows[own], stop, *self._shared(rows[own]))
            self._enqueue(id)
        return ids

    def _shared(self, rows: Int[np.ndarray, " G"]) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " G"]]:
        """Return `Request.trunk` and `Request.begin` of a request's rows."""
        if not self.trunk_slots:
            return np.zeros(0, np.int32), np.zeros(len(rows), np.int32)
        slides = min(attention_windows(self.decoding.model)) < UNLIMITED
        return shared_tokens(self.output.columns["tokens"][rows], self.output.length[rows], slides)

    def _force(
        self, rows: Int[np.ndarray, " n"], tokens: Sequence[Sequence[int]], states: list[Int[np.ndarray, " n+1"]]
    ) -> None:
        for row, ids, each in zip(rows.tolist(), tokens, states, strict=True):
            if len(ids):
                self.output.force(row, ids, each)
        self._end_in(rows, states)

    def _end_in(self, rows: Int[np.ndarray, " n"], states: list[Int[np.ndarray, "..."]]) -> None:
        """End rows in whose states nothing may follow."""
        if self.control_set.tables is not None:
            self.output.end_in(rows, self.control_set.tables.ends[[each[-1] for each in states]])

    def _enqueue(self, id: int) -> None:
        """Queue what is left to decode of a request."""
        request, output = self.requests[id], self.output
        self.finished_early.discard(id)
        groups = list(split(request, self.lanes, ~output.ended[request.rows], output.length[request.rows]))
        request.groups = len(groups)
        self.queue.extend(groups)
        if not groups:
            self.finished_early.add(id)

    def advance(self) -> Ids:
        """Decode one chunk. Returns the requests that finished, possibly none: all their rows ended.

        If it is interrupted, by Ctrl-C for example, the session is as it was before, and reads all keys again.
        """
        begun, finished = time.perf_counter(), []
        if self.queue or self.batch.active.any():
            hosts.check_alive("policy", self.params)
            decoding = [request for request in self.requests.values() if request.groups]
            before = self.output.position()
            try:
                self.batch.admit(self.params, self.queue)
                if self.cfg.engine.compact and not self.queue:
                    self.batch.compact()
                finished = self._decode()
            except BaseException:
                self._restart(decoding, before)
                raise
        self.stats = self.stats._replace(seconds=self.stats.seconds + time.perf_counter() - begun)
        finished, self.finished_early = [*self.finished_early, *finished], set()
        return np.array(sorted(finished), int)

    def _restart(self, requests: list[Request], before: Position) -> None:
        """Give up the caches, which a program may have taken, and queue the requests as all rows were before."""
        self.batch = ActiveBatch(self.batch.sizes, self.programs, self.output)
        self.queue.clear()
        for request in requests:
            self.output.cut(request.rows, Position(*(x[request.rows] for x in before)))
            self._enqueue(request.id)

    def _decode(self) -> list[int]:
        """Decode one chunk and store it. Returns the requests that it finished."""
        batch, before = self.batch, ~self.batch.groups.done
        age = batch.groups.age
        slot = batch.groups.begin + age
        result = batch.decode(self.params, self.key, self.control_set.on_device(self.decoding.layout))
        rows, tables = np.where(before, batch.rows, -1), self.control_set.tables
        ended = np.zeros(rows.shape, bool) if tables is None else result.done & tables.ends[result.state]
        stored = self.output.add(rows.reshape(-1), slot.reshape(-1), result, self.version, ended.reshape(-1))
        for u in np.flatnonzero(batch.active):
            if stop := batch.placed[u].request.stop:
                own = rows[u] >= 0
                self.output.stop(rows[u][own], slot[u][own], stop, self.tokenizer.spellings)
        self._count(result, stored, age)
        finished = []
        for request in batch.release():
            request.groups -= 1
            if not request.groups:
                finished.append(request.id)
        return finished

    def _count(self, result: ChunkResult, stored: int, age: Int[np.ndarray, "U F"]) -> None:
        """Add a chunk to the stats. `stored`: its tokens; `age`: of each row when it began."""
        decoding, batch, s, ran = self.decoding, self.batch, self.stats, int(result.steps)
        length, middle = (
            np.where(batch.active, x, 0) for x in (batch.groups.length.max(axis=1), age.max(axis=1) + ran // 2)
        )
        number_bytes = self.programs.caching.format.number_bytes(decoding.model)
        step = decode_step(decoding.model, length, middle, self.lanes, number_bytes)
        shards, chunk = decoding.layout.size("rows") * decoding.layout.size("heads"), result.chunk
        over = 0 if chunk.overflow is None else int((chunk.overflow[:ran] & chunk.active[:ran]).sum())
        work = Work(s.work.bytes + ran * (self.weights + step.bytes / shards), s.work.flops + ran * step.flops / shards)
        rows = ran * batch.rows.size
        self.stats = Stats(
            s.seconds, s.chunks + 1, s.steps + ran, s.row_steps + rows, s.tokens + stored, s.overflow + over, work
        )

    def stop(self, ids: Ids) -> None:
        """Stop decoding requests. Their unfinished rows keep their tokens, and continue with `resume`."""
        stopped = set(self._requests(ids))
        if any(request.groups for request in stopped):
            self.batch.remove(stopped)
            self.queue = deque(group for group in self.queue if group.request not in stopped)
        for request in stopped:
            request.groups = 0
            self.finished_early.discard(request.id)

    def resume(
        self, ids: Ids, tokens: Sequence[Sequence[int]] | None = None, limit: Int[np.ndarray, "..."] | None = None
    ) -> None:
        """Go on with requests that were stopped or have finished. Their known tokens are read again.

        Args:
            ids: the requests.
            tokens: token ids to append to each of their rows, as a user's next turn, or []. A row with new tokens continues
                even if it had ended, and its control starts again behind them; one without continues if it was stopped, or ended
                at a limit that is raised.
            limit: new maximum completion tokens, per request or per row; as before by default.

        Raises:
            ValueError: a request is still being decoded, tokens do not fit its limit, or its control could not end within it.
        """
        requests, vocab, most = self._waiting("resume", ids), self.decoding.vocab, self.cfg.max_new_tokens
        rows = np.concatenate([request.rows for request in requests])
        limits = self.output.limit[rows]
        if limit is not None:
            limits = limits_of("limit", limit, np.array([len(request.rows) for request in requests]), most)
        length = self.output.length[rows]
        if tokens is not None:
            check_forced("tokens", tokens, limits - length, vocab)
        elif (over := np.flatnonzero(length > limits)).size:
            raise ValueError(f"limit: got {limits[over[0]]}, want at least the {length[over[0]]} tokens that are known")
        controls, tokens = [request.controls for request in requests], [()] * len(rows) if tokens is None else tokens
        start, budget = (np.concatenate([getattr(c, name) for c in controls]) for name in ("control", "budget"))
        states = self.control_set.resumed(self.output, rows, tokens, limits, start, budget)
        self.output.limit[rows] = limits
        self.output.end_at_limit(rows)
        self._force(rows, tokens, states)
        for request in requests:
            self._enqueue(request.id)

    def use(self, policy: Policy) -> None:
        """Sample from another policy from now on. Keys of known tokens are read again, so that log-probs are the new policy's."""
        check_policy(policy)
        same, self.version = policy.params is self.params, int(policy.version)
        if same:
            return
        self.params = policy.params
        self.queue.extendleft(reversed(self.batch.remove()))

    def rollouts(self, ids: Ids) -> Rollouts:
        """Return the rollouts of requests so far; those of unfinished rows have the finish `UNFINISHED`.

        Raises:
            ValueError: an id is unknown.
        """
        requests, output = self._requests(ids), self.output
        rows = np.concatenate([request.rows for request in requests])
        size = np.array([len(request.rows) for request in requests])
        of = {name: column[rows] for name, column in output.columns.items()}
        codes = of.pop("control_state")
        return Rollouts(
            prompts=stack_prompts([request.prompt for request in requests], self.decoding.vocab.pad),
            prompt=number_rows(size)[0],
            sample=np.concatenate([request.sample for request in requests]),
            length=output.length[rows],
            temperature=np.concatenate([request.controls.temperature for request in requests]).astype(np.float32),
            finish=output.finish[rows],
            # Decided for the engine, so that the columns of a batch do not depend on its rows.
            control_state=None if self.control_set.tables is None else codes,
            **of,
        )

    def take(self, ids: Ids) -> Rollouts:
        """Return the rollouts of requests that have finished or were stopped, and forget the requests.

        Raises:
            ValueError: a request is still being decoded, or as in `rollouts`.
        """
        self._waiting("take", ids)
        found = self.rollouts(ids)
        self.cancel(ids)
        return found

    def cancel(self, ids: Ids) -> None:
        """Stop requests and forget them."""
        self.stop(ids)
        for request in self._requests(ids):
            self.output.release(request.rows)
            del self.requests[request.id]

    def _requests(self, ids: Ids) -> list[Request]:
        """Raises ValueError if an id is unknown or given twice."""
        if np.ndim(ids) > 1 or np.asarray(ids).dtype.kind not in "iu":
            raise ValueError(f"ids: got {ids!r}, want an id, or a list of ids")
        ids = np.atleast_1d(ids).tolist()
        if unknown := [id for id in ids if id not in self.requests]:
            raise ValueError(f"ids: got {unknown[0]}, want a request that was added and not taken")
        if not ids or len(set(ids)) < len(ids):
            raise ValueError(f"ids: got {ids}, want one or more requests, each once")
        return [self.requests[id] for id in ids]

    def _waiting(self, what: str, ids: Ids) -> list[Request]:
        found = self._requests(ids)
        if decoding := [request.id for request in found if request.groups]:
            raise ValueError(
                f"{what}: got request {decoding[0]}, which is being decoded; want one that finished or was stopped"
            )
        return found


def check_policy(policy: Policy) -> None:
    """Raise UserError unless it is a policy with its buffers."""
    if not isinstance(policy, Policy):
        raise UserError(f"policy: got {type(policy).__name__}, want a Policy, as publish(params) returns it")
    hosts.check_alive("policy", policy)

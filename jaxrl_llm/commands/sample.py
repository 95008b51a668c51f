"""`jaxrl sample`: responses of a policy to one prompt, token by token; or to many prompts, as a file of trajectories."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxrl_llm.commands.loaded_policy import LoadedPolicy, SamplingSetup, load_policy, prepare_sampling, with_batch
from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.environments.grader_pool import GraderPool
from jaxrl_llm.errors import UserError
from jaxrl_llm.metrics.console import shown_on_stderr
from jaxrl_llm.metrics.terminal import printable
from jaxrl_llm.model.config import PretrainedModel
from jaxrl_llm.model.hf.config import read_json
from jaxrl_llm.model.hf.source import resolve as resolve_model
from jaxrl_llm.roles import inputs, memory_check
from jaxrl_llm.roles.allowed_sets import AllowedSet, allowed_in_row
from jaxrl_llm.roles.build import make_keys
from jaxrl_llm.roles.collector import Collector
from jaxrl_llm.roles.stored_rollouts import trajectory_rows
from jaxrl_llm.tasks.rows import Row
from jaxrl_llm.tasks.stream import completion_limits, make_prompts
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.tasks.tokenizer import load_tokenizer
from jaxrl_llm.tasks.trajectory_writer import writing
from jaxrl_llm.types import Finish, Groups, Prompts, Rollouts
from jaxrl_llm.update.batch import ungraded

PROMPTS_AT_ONCE, PROMPTS_PER_WRITE = 64, 1024
"""Prompts in a batch, and prompts whose responses are sampled before they are written."""


class SampleRequest(NamedTuple):
    text: str | None
    """The prompt; None: those of the task."""
    samples: int
    """Responses per prompt."""
    has_task: bool
    """False if the target is a model by itself; then only the prompt is read."""


def sample_prompt(cfg: RunConfig, asked: SampleRequest) -> None:
    """Print responses to one prompt, by default the first held-out one of the task: tokens with log-prob and entropy, and the
    reward if the answer is known."""
    setup = _prepare(cfg, asked, 1, partial(_task_of_prompt, asked=asked))
    task, row, n = setup.task, setup.task.held_out[0], asked.samples
    memory_check.check(setup.blueprint, len(task.held_out), trains=False)
    loaded = load_policy(setup)
    with _sampler(setup, loaded, bool(row.answer)) as sample:
        # The batch is filled up with the same prompt.
        num_prompts = setup.blueprint.cfg.rollout.prompts
        groups = sample(make_prompts(task, (row,), np.zeros(num_prompts, int), np.arange(num_prompts)), (row,))
    reward = groups.reward if row.answer else np.full(n, np.nan)
    print(f"{printable(row.prompt)}   from {loaded.name}, temperature {cfg.rollout.temperature}")
    for b in range(n):
        allowed = allowed_in_row(setup.engine.tables, groups.rollouts, b, task.num_tokens)
        print(_line(task, groups.rollouts, b, float(reward[b]), allowed))


def sample_to_file(cfg: RunConfig, asked: SampleRequest, out: Path, split: str, most: int | None) -> str:
    """Write graded responses to a trajectory file. Returns what was written, in words.

    Args:
        asked: a prompt, which is not graded if its answer is unknown; or the task's.
        out: the file.
        split: train or held_out: which rows of the task.
        most: number of rows, from the first on; None: all.
    """
    alone = asked.text is not None
    of_prompt = partial(_task_of_prompt, asked=asked) if alone else None
    setup = _prepare(cfg, asked, 1 if alone else min(most or PROMPTS_AT_ONCE, PROMPTS_AT_ONCE), of_prompt)
    task = setup.task
    rows = task.held_out if alone or split == "held_out" else task.train
    if most is not None and most > len(rows):
        raise UserError(f"--prompts: got {most}, want {len(rows)} at most, the rows of the split {split}")
    rows = [row.stated for row in rows[:most]]
    memory_check.check(setup.blueprint, min(len(rows), PROMPTS_PER_WRITE), trains=False)
    num, right, graded = 0, 0, not alone or bool(rows[0].answer)
    with writing(out) if jax.process_index() == 0 else nullcontext(lambda records: None) as write:
        loaded = load_policy(setup)
        with _sampler(setup, loaded, graded) as sample:
            for first in range(0, len(rows), PROMPTS_PER_WRITE):
                index = np.arange(first, min(first + PROMPTS_PER_WRITE, len(rows)))
                with shown_on_stderr(f"sampling {asked.samples} responses to each of {len(rows):,} prompts"):
                    groups = sample(make_prompts(task, rows, index, index), rows)
                write(records := trajectory_rows(task, rows, groups))
                num, right = num + len(records), right + sum(record["success"] is True for record in records)
    score = f", {right / num:.1%} of them right" if graded else ""
    return f"{num:,} responses to {len(rows):,} prompts from {loaded.name}{score}: {out}"


def _prepare(
    cfg: RunConfig, asked: SampleRequest, prompts: int, read_task: Callable[..., Task] | None
) -> SamplingSetup:
    """Setup with batches of this many prompts. `read_task`: see `inputs.read`."""
    shaped = with_batch(cfg, prompts, asked.samples)
    return prepare_sampling(shaped, inputs.read(shaped, asked=read_task))


@contextmanager
def _sampler(
    setup: SamplingSetup, loaded: LoadedPolicy, graded: bool
) -> Iterator[Callable[[Prompts, Sequence[Row]], Groups]]:
    """A function of prompts and their rows that returns as many responses to each as the config says."""
    cfg, engine, key = setup.blueprint.cfg, setup.engine, make_keys(setup.blueprint.cfg.seed).evaluation

    def generate(prompts: Prompts, rows: Sequence[Row]) -> Groups:
        limit = completion_limits(rows, prompts.row, cfg.rollout.max_new_tokens)
        return _without_grades(engine.generate(loaded.policy, prompts, key, limit=limit))

    if not graded:
        yield generate
        return
    with GraderPool(cfg.reward) as pool:
        collect = Collector(engine, pool, setup.task, cfg.evaluation.threshold)
        yield lambda prompts, rows: collect(loaded.policy, prompts, rows, key).groups


def _without_grades(rollouts: Rollouts) -> Groups:
    groups = ungraded(rollouts)
    unknown = np.full_like(groups.reward, np.nan)
    return groups.replace(reward=unknown, components=unknown[:, None])


def _task_of_prompt(cfg: RunConfig, asked: SampleRequest) -> Task:
    """The task with the given prompt as its only held-out one, which may be longer than the task's own prompts."""
    task = inputs.read_task(cfg) if asked.has_task else Task((), (), load_tokenizer(cfg.tokenizer))
    if (text := asked.text) is None:
        return task
    if unknown := task.tokenizer.unknown_characters(text):
        raise UserError(
            f"--prompt: got characters {' '.join(map(repr, unknown))}, want only those of tokenizer.alphabet"
        )
    row, positions = task.row(text), _num_positions(cfg)
    most = positions - cfg.rollout.max_new_tokens
    if len(row.tokens) > most:
        raise UserError(
            f"--prompt: got {len(row.tokens):,} tokens, want {max(most, 0):,} at most: the model was made for {positions:,} "
            f"positions, and rollout.max_new_tokens takes {cfg.rollout.max_new_tokens:,} of them"
        )
    # A task must have training rows, though nothing is trained here.
    return dataclasses.replace(task, train=task.train or (row,), held_out=(row,))


def _num_positions(cfg: RunConfig) -> float:
    """Maximum length of prompt and response together by the model's config.json; infinite if it has none."""
    if not isinstance(cfg.model, PretrainedModel):
        return float("inf")
    values = read_json(resolve_model(cfg.model.path, ("config.json",)) / "config.json")
    inner = values.get("text_config")
    found = (inner if isinstance(inner, dict) else values).get("max_position_embeddings")
    return found if isinstance(found, int) else float("inf")


def _line(task: Task, rollouts: Rollouts, b: int, reward: float, allowed: Sequence[AllowedSet | None]) -> str:
    """One response as a line: text, reward, log-prob, finish reason, then its tokens with log-prob and entropy in nats. Tokens that
    the policy did not sample are in brackets; where not all were allowed, their number is shown.

    Args:
        task: decodes the tokens.
        rollouts: with the response, NumPy.
        b: its row.
        reward: of the response; NaN: unknown.
        allowed: in each slot; None: every token.
    """
    length = int(rollouts.length[b])
    tokens = [printable(task.tokenizer.token(int(i))) for i in rollouts.tokens[b, :length]]
    parts = [
        f"{token} {rollouts.behavior_logprobs[b, i]:.3f} (H {rollouts.entropy[b, i] + 0:.3f}{f', {of.size} allowed' if of else ''})"
        if rollouts.sampled[b, i]
        else f"[{token}]"
        for i, (token, of) in enumerate(zip(tokens, allowed, strict=True))
    ]
    graded = "?" if np.isnan(reward) else f"{reward:g}"
    total = float(rollouts.behavior_logprobs[b].sum())
    return (
        f"{b:3d}  {''.join(tokens):12s} reward {graded}  log-prob {total:8.3f}  {Finish(rollouts.finish[b]).name.lower():6s}  "
        + "  ".join(parts)
    )

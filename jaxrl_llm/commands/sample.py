"""`jaxrl sample`: responses of a policy to one prompt, token by token."""

import dataclasses
from functools import partial

import numpy as np

from jaxrl_llm.commands.loaded_policy import load_policy, prepare_sampling, with_batch
from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.environments.grader_pool import GraderPool
from jaxrl_llm.errors import UserError
from jaxrl_llm.metrics.terminal import printable
from jaxrl_llm.model.config import PretrainedModel
from jaxrl_llm.model.hf.config import read_json
from jaxrl_llm.model.hf.source import resolve as resolve_model
from jaxrl_llm.roles import inputs, memory_check
from jaxrl_llm.roles.build import make_keys
from jaxrl_llm.roles.collector import Collector
from jaxrl_llm.tasks.stream import make_prompts
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.tasks.tokenizer import load_tokenizer
from jaxrl_llm.types import Finish, Rollouts


def sample_prompt(cfg: RunConfig, text: str | None, n: int, has_task: bool = True) -> None:
    """Print `n` responses to one prompt: tokens with log-prob and entropy, and the reward if the answer is known.

    Args:
        text: the prompt; None: the first held-out prompt of the task.
        n: number of responses.
        has_task: False if the target is a model by itself; then only the prompt is read.
    """
    shaped = with_batch(cfg, 1, n)
    given = inputs.read(shaped, asked=partial(_task_of_prompt, text=text, has_task=has_task))
    setup = prepare_sampling(shaped, given)
    engine, task = setup.engine, setup.task
    memory_check.check(setup.blueprint, len(task.held_out), trains=False)
    loaded = load_policy(setup)
    row = task.held_out[0]
    num_prompts, key = setup.blueprint.cfg.rollout.prompts, make_keys(cfg.seed).evaluation
    prompts = make_prompts(task, (row,), np.zeros(num_prompts, int), np.arange(num_prompts))
    reward = np.full(n, np.nan)
    if row.answer:
        with GraderPool(cfg.reward) as pool:
            groups = Collector(engine, pool, task)(loaded.policy, prompts, (row,), key).groups
        rollouts, reward = groups.rollouts, groups.reward
    else:
        rollouts = engine.generate(loaded.policy, prompts, key)
    print(f"{printable(row.prompt)}   from {loaded.name}, temperature {cfg.rollout.temperature}")
    for b in range(n):
        print(_line(task, rollouts, b, float(reward[b])))


def _task_of_prompt(cfg: RunConfig, text: str | None, has_task: bool) -> Task:
    """The task with the prompt `text` as its only held-out one, which may be longer than the task's own prompts."""
    task = inputs.read_task(cfg) if has_task else Task((), (), load_tokenizer(cfg.tokenizer))
    if text is None:
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


def _line(task: Task, rollouts: Rollouts, b: int, reward: float) -> str:
    """One response as a line: text, reward, log-prob, finish reason, then its tokens with log-prob and entropy in nats."""
    length = int(rollouts.length[b])
    tokens = [printable(task.tokenizer.token(int(i))) for i in rollouts.tokens[b, :length]]
    parts = [
        f"{token} {logprob:.3f} (H {entropy:.3f})"
        for token, logprob, entropy in zip(tokens, rollouts.behavior_logprobs[b], rollouts.entropy[b], strict=False)
    ]
    graded = "?" if np.isnan(reward) else f"{reward:g}"
    total = float(rollouts.behavior_logprobs[b].sum())
    return (
        f"{b:3d}  {''.join(tokens):12s} reward {graded}  log-prob {total:8.3f}  {Finish(rollouts.finish[b]).name.lower():6s}  "
        + "  ".join(parts)
    )

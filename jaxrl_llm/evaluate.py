"""How good a policy is on the held-out part: exactly, and by sampling."""

import numpy as np

from jaxrl_llm.experience.batch import rows_of
from jaxrl_llm.parallel import hosts
from jaxrl_llm.prompts.stream import make_prompts
from jaxrl_llm.prompts.task import Row
from jaxrl_llm.rewards.pool import GraderPool
from jaxrl_llm.run import Run, grade, sample
from jaxrl_llm.types import Batch, Policy, PyTree


def evaluate(run: Run, params: PyTree, policy: Policy, pool: GraderPool) -> dict[str, float]:
    """`eval/exact`, the mean probability of the right response, and `eval/pass@1`, the share of right ones among samples."""
    rows = run.task.held_out
    return {
        "eval/exact": float(np.mean(probabilities(run, params, rows))),
        "eval/pass@1": sampled_accuracy(run, policy, pool, rows),
    }


def probabilities(run: Run, params: PyTree, rows: tuple[Row, ...]) -> np.ndarray:
    """f32[len(rows)]: of each row's answer, at the run's temperature. Teacher-forced, so there is no sampling noise."""
    found = []
    for part in _parts(len(rows), run.cfg.rollout.prompts):
        batch = supervised_batch(run, [rows[i] for i in part])
        logprobs = hosts.gather(run.score(params, run.put_batch(batch)))
        found.append(np.exp(np.sum(np.where(batch.loss_mask, logprobs, 0.0), axis=1)))
    return np.concatenate(found)[: len(rows)]


def supervised_batch(run: Run, rows: list[Row]) -> Batch:
    """Prompts with their answers, the answer in the loss mask."""
    prompt, prompt_length = run.task.encode([row.prompt for row in rows], run.task.prompt_slots)
    answer, length = run.task.encode([row.answer for row in rows], run.cfg.rollout.max_new_tokens)
    return rows_of(prompt, prompt_length, answer, length, run.task.pad, run.cfg.rollout.temperature)[0]


def sampled_accuracy(run: Run, policy: Policy, pool: GraderPool, rows: tuple[Row, ...]) -> float:
    """Mean reward of G samples for each row: the unbiased estimate of pass@1. Groups that could not be graded are left out."""
    rewards = []
    for part in _parts(len(rows), run.cfg.rollout.prompts):
        rollouts = sample(run, policy, make_prompts(run.task, rows, part, part), run.eval_key)
        rewards.append(grade(run, pool, rows, rollouts).reward)
    return float(np.nanmean(np.concatenate(rewards)[: len(rows)]))


def _parts(n: int, size: int) -> list[np.ndarray]:
    """Indices 0..n-1 in parts of exactly `size`, so that no part compiles anew; the last is filled up from the front."""
    return [np.arange(start, start + size) % n for start in range(0, n, size)]

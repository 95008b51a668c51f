"""How good a policy is on the held-out part: exactly, and by sampling."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxrl_llm.collect import collect
from jaxrl_llm.estimates import avg_at_k, correct, maj_at_k, pass_at_k
from jaxrl_llm.objective.reward_kl import KL
from jaxrl_llm.parallel import hosts
from jaxrl_llm.prompts.rows import Row
from jaxrl_llm.prompts.stream import make_prompts, pad_rows
from jaxrl_llm.rewards.pool import GraderPool
from jaxrl_llm.run import Run, score
from jaxrl_llm.types import Experience, Policy, PyTree, Rollouts
from jaxrl_llm.update.batch import make_batch, of_groups, supervised, to_rows, ungraded, unscored


class Answers(NamedTuple):
    """k graded responses to each of n rows, equal on every host."""

    right: Float[np.ndarray, "n k"]
    """1 where the first grader gave the threshold or more, else 0; NaN where the group could not be graded."""
    vote: Int[np.ndarray, "n k"]
    """A number for each final answer, 0 where there is none."""


def headline(run: Run) -> str:
    """The metric that a run is told by: exact where the right responses are known, else sampled."""
    return "eval/exact" if run.task.has_targets else "eval/pass@1"


def evaluate(run: Run, params: PyTree, policy: Policy, pool: GraderPool) -> dict[str, float]:
    """`eval/exact`, the mean probability of the right response, where that is known; from k samples per prompt `eval/pass@1`, the
    share of right ones (which is avg@k), `eval/pass@k` and `eval/maj@k`, absent where no prompt could be graded; `eval/left_out`,
    how many could not, where there are any.

    `eval/mismatch_kl` where training may reuse old rollouts, which cannot tell how far the sampler is from the trainer: these can.
    """
    k, rows = run.cfg.rollout.samples, run.task.held_out
    found = {"eval/exact": float(np.mean(probabilities(run, params, rows)))} if run.task.has_targets else {}
    (right, vote), rollouts = answers(run, policy, pool)
    left_out = np.isnan(right).any(axis=1)
    if left_out.any():
        found["eval/left_out"] = float(left_out.sum())
    if not left_out.all():
        found |= {
            "eval/pass@1": avg_at_k(right).value,
            f"eval/pass@{k}": pass_at_k(right, k).value,
            f"eval/maj@{k}": maj_at_k(right, vote).value,
        }
    return found | ({"eval/mismatch_kl": mismatch(run, params, rollouts)} if run.cfg.experience.replay.capacity else {})


def mismatch(run: Run, params: PyTree, rollouts: Rollouts) -> float:
    """KL(sampler || trainer) of the same parameters, nats per token: the k3 estimate, mean over the tokens of the rollouts of
    `rollout.prompts` prompts, or of all where they are fewer."""
    num = len(rollouts.prompts.length)
    part = _parts(num, run.cfg.rollout.prompts)[0]
    groups = of_groups(unscored(ungraded(rollouts)), part).groups
    # Where they are fewer the part is filled up with repetitions, which count once.
    once = np.repeat(np.arange(len(part)) < num, run.cfg.rollout.samples)
    d = (score(run, params, groups).logprobs - groups.rollouts.behavior_logprobs).astype(np.float64)
    d = d[groups.rollouts.sampled & once[:, None]]
    return float(np.mean(KL["k3"](-d)))


def probabilities(run: Run, params: PyTree, rows: tuple[Row, ...]) -> np.ndarray:
    """f32[len(rows)]: of each row's target, at the run's temperature. Teacher-forced, so there is no sampling noise."""
    found = []
    for part in _parts(len(rows), run.cfg.rollout.prompts):
        right = supervised_experience(run, [rows[i] for i in part])
        batch, where = make_batch(right, run.shapes.held_out, run.task.pad)
        scores = hosts.gather(run.score(params, run.put_batch(batch)).logprobs)
        logprobs = to_rows(scores, where, right.groups.rollouts)
        found.append(np.exp(np.sum(logprobs, axis=1)))
    return np.concatenate(found)[: len(rows)]


def supervised_experience(run: Run, rows: list[Row]) -> Experience:
    """Prompts with their targets, the target to be learned."""
    index = np.arange(len(rows))
    prompts = make_prompts(run.task, rows, index, index)
    target, length = pad_rows([row.target for row in rows], run.cfg.rollout.max_new_tokens, run.task.pad)
    return supervised(prompts, target, length, run.cfg.rollout.temperature)


def answers(run: Run, policy: Policy, pool: GraderPool) -> tuple[Answers, Rollouts]:
    """k = `rollout.samples` graded responses to each held-out row. Keys of their own: training is not disturbed."""
    rows = run.task.held_out
    prompts = make_prompts(run.task, rows, np.arange(len(rows)), np.arange(len(rows)))
    groups = collect(run, pool, policy, prompts, rows, run.eval_key).groups
    of_group = (len(rows), -1)
    right = correct(groups.components[:, 0].reshape(of_group), run.cfg.evaluation.threshold)
    return Answers(right, groups.vote.reshape(of_group)), groups.rollouts


def _parts(n: int, size: int) -> list[np.ndarray]:
    """Indices 0..n-1 in parts of exactly `size`, so that no part compiles anew; the last is filled up from the front."""
    return [np.arange(start, start + size) % n for start in range(0, n, size)]

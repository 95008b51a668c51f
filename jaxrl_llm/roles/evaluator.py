"""Evaluation on held-out prompts: exactly, where the right response is known, and by sampling."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxrl_llm.metrics.estimates import avg_at_k, maj_at_k, pass_at_k
from jaxrl_llm.objective.reward_kl import KL
from jaxrl_llm.roles.collector import Collected
from jaxrl_llm.roles.scorer import Scorer
from jaxrl_llm.tasks.rows import Row
from jaxrl_llm.tasks.stream import make_prompts
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import Experience, Policy, PyTree, Rollouts, select_groups
from jaxrl_llm.update.batch import ungraded


class Answers(NamedTuple):
    """k graded responses to each of n rows, equal on every host."""

    right: Float[np.ndarray, "n k"]
    """1 if the first grader of its task gave at least the threshold, else 0; NaN if the group could not be graded."""
    vote: Int[np.ndarray, "n k"]
    """One number per distinct final answer; 0 if there is none."""


@dataclass(frozen=True)
class Evaluator:
    task: Task
    collect: Callable[..., Collected]
    """A `Collector`."""
    key: Key[Array, ""]
    """Apart from training's, so that evaluating changes no training sample."""
    at_once: int
    """Prompts scored in one batch."""
    threshold: float
    """Least grade by the first grader of its task for a response that counts as right."""
    right: Callable[[list[Row]], Experience]
    """See `right_responses`."""
    score_right: Scorer
    """Scores right responses, one per prompt."""
    score: Scorer | None
    """Scores sampled groups. Set if training may replay old rollouts, or trains on hints, which cannot show how far the sampler is
    from the trainer; the evaluation's can."""

    @property
    def headline(self) -> str:
        """Name of the main metric: exact if the right responses are known, else sampled."""
        return "eval/exact" if self.task.has_targets else "eval/pass@1"

    def __call__(self, params: PyTree, policy: Policy) -> dict[str, float]:
        """Metrics of a policy on the held-out prompts.

        Args:
            params: the trainer's.
            policy: published from them.

        Returns:
            `eval/exact`, mean probability of the right response, if it is known. From k samples per prompt `eval/pass@1`, the
            fraction of right ones (equal to avg@k), `eval/pass@k` and `eval/maj@k`, absent if no prompt could be graded.
            `eval/left_out`, number of prompts that could not be graded, if any. `eval/mismatch_kl`, nats, if there is `score`.
            The same but for the last for each task of a mixture, `eval/<task>/exact` and so on.
        """
        exact = self.probabilities(params) if any(self.task.targets_known.values()) else None
        (right, vote), rollouts = self.answers(policy)
        found = _scores("eval", exact, right, vote)
        for name, rows in self.rows_of_tasks().items():
            of_task = None if exact is None else exact[rows]
            found |= _scores(f"eval/{name}", of_task, right[rows], vote[rows])
        return found | ({"eval/mismatch_kl": self._mismatch(params, rollouts)} if self.score else {})

    def rows_of_tasks(self) -> dict[str, Int[np.ndarray, " rows"]]:
        """Indices of the held-out rows of each task of a mixture."""
        tasks = np.array([row.task for row in self.task.held_out])
        return {name: found for name in self.task.weights if len(found := np.flatnonzero(tasks == name))}

    def probabilities(self, params: PyTree) -> Float[np.ndarray, " n"]:
        """Probability of each held-out row's right response at the run's temperature; NaN where none is known. Teacher-forced, so
        without sampling noise."""
        rows, found = self.task.held_out, []
        known = np.array([i for i, row in enumerate(rows) if row.target is not None])
        for part in _parts(len(known), self.at_once):
            logprobs = self.score_right(params, self.right([rows[i] for i in known[part]]).groups).logprobs
            found.append(np.exp(np.sum(logprobs, axis=1)))
        of_known = np.concatenate(found)[: len(known)]
        of_all = np.full(len(rows), np.nan, of_known.dtype)
        of_all[known] = of_known
        return of_all

    def answers(self, policy: Policy) -> tuple[Answers, Rollouts]:
        """Sample and grade k responses to each held-out row."""
        rows = self.task.held_out
        prompts = make_prompts(self.task, rows, np.arange(len(rows)), np.arange(len(rows)))
        groups = self.collect(policy, prompts, rows, self.key).groups
        of_group = (len(rows), -1)
        right = groups.replace(threshold=self.threshold).measure("success").reshape(of_group)
        return Answers(right, groups.vote.reshape(of_group)), groups.rollouts

    def _mismatch(self, params: PyTree, rollouts: Rollouts) -> float:
        """KL(sampler || trainer) of the same parameters, nats per token: the k3 estimate, mean over the tokens of at most
        `at_once` prompts."""
        num = len(rollouts.prompts.length)
        part = _parts(num, self.at_once)[0]
        groups = select_groups(ungraded(rollouts), part)
        # With fewer prompts the batch is filled up with repetitions; each prompt counts once.
        once = groups.rollouts.prompt < num
        d = (self.score(params, groups).logprobs - groups.rollouts.behavior_logprobs).astype(np.float64)
        return float(np.mean(KL["k3"](-d[groups.rollouts.sampled & once[:, None]])))


def _scores(
    prefix: str, exact: Float[np.ndarray, " n"] | None, right: Float[np.ndarray, "n k"], vote: Int[np.ndarray, "n k"]
) -> dict[str, float]:
    """Metrics of some prompts, without what is not known. `exact`: probability of each one's right response."""
    found, left_out, k = {}, np.isnan(right).any(axis=1), right.shape[1]
    if exact is not None and not np.isnan(exact).any():
        found[f"{prefix}/exact"] = float(np.mean(exact))
    if left_out.any():
        found[f"{prefix}/left_out"] = float(left_out.sum())
    if not left_out.all():
        found |= {
            f"{prefix}/pass@1": avg_at_k(right).value,
            f"{prefix}/pass@{k}": pass_at_k(right, k).value,
            f"{prefix}/maj@{k}": maj_at_k(right, vote).value,
        }
    return found


def _parts(n: int, size: int) -> list[np.ndarray]:
    """Indices 0..n-1 in parts of exactly `size`, so that all parts share one program; the last is filled up from the front."""
    return [np.arange(start, start + size) % n for start in range(0, n, size)]

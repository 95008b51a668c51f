"""How good a policy is on the held-out part: exactly, and by sampling."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxrl_llm.metrics.estimates import avg_at_k, correct, maj_at_k, pass_at_k
from jaxrl_llm.objective.reward_kl import KL
from jaxrl_llm.roles.collector import Collected
from jaxrl_llm.roles.scorer import Scorer
from jaxrl_llm.tasks.rows import Row
from jaxrl_llm.tasks.stream import make_prompts
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import Experience, Policy, PyTree, Rollouts
from jaxrl_llm.update.batch import of_groups, ungraded, unscored


class Answers(NamedTuple):
    """k graded responses to each of n rows, equal on every host."""

    right: Float[np.ndarray, "n k"]
    """1 where the first grader gave the threshold or more, else 0; NaN where the group could not be graded."""
    vote: Int[np.ndarray, "n k"]
    """A number for each final answer, 0 where there is none."""


@dataclass(frozen=True)
class Evaluator:
    task: Task
    collect: Callable[..., Collected]
    """As `Collector`."""
    key: Key[Array, ""]
    """Its own: training is not disturbed."""
    at_once: int
    """Prompts that are scored together."""
    threshold: float
    """What the first grader must give a response that is right."""
    right: Callable[[list[Row]], Experience]
    """As `right_responses`."""
    score_right: Scorer
    """Of right responses, one per prompt."""
    score: Scorer | None
    """Of groups, where training may reuse old rollouts: these cannot tell how far the sampler is from the trainer; the
    evaluation's can."""

    @property
    def headline(self) -> str:
        """The metric that a run is known by: exact where the right responses are known, else sampled."""
        return "eval/exact" if self.task.has_targets else "eval/pass@1"

    def __call__(self, params: PyTree, policy: Policy) -> dict[str, float]:
        """`eval/exact`, the mean probability of the right response, where that is known; from k samples per prompt `eval/pass@1`,
        the share of right ones (which is avg@k), `eval/pass@k` and `eval/maj@k`, absent where no prompt could be graded;
        `eval/left_out`, how many could not, where there are any; `eval/mismatch_kl` where there is `score`.

        Args:
            params: the trainer's.
            policy: published from them.
        """
        found = {"eval/exact": float(np.mean(self.probabilities(params)))} if self.task.has_targets else {}
        (right, vote), rollouts = self.answers(policy)
        left_out, k = np.isnan(right).any(axis=1), right.shape[1]
        if left_out.any():
            found["eval/left_out"] = float(left_out.sum())
        if not left_out.all():
            found |= {
                "eval/pass@1": avg_at_k(right).value,
                f"eval/pass@{k}": pass_at_k(right, k).value,
                f"eval/maj@{k}": maj_at_k(right, vote).value,
            }
        return found | ({"eval/mismatch_kl": self._mismatch(params, rollouts)} if self.score else {})

    def probabilities(self, params: PyTree) -> Float[np.ndarray, " n"]:
        """Of each held-out row's right response, at the run's temperature. Teacher-forced, so there is no sampling noise."""
        rows, found = self.task.held_out, []
        for part in _parts(len(rows), self.at_once):
            logprobs = self.score_right(params, self.right([rows[i] for i in part]).groups).logprobs
            found.append(np.exp(np.sum(logprobs, axis=1)))
        return np.concatenate(found)[: len(rows)]

    def answers(self, policy: Policy) -> tuple[Answers, Rollouts]:
        """k graded responses to each held-out row."""
        rows = self.task.held_out
        prompts = make_prompts(self.task, rows, np.arange(len(rows)), np.arange(len(rows)))
        groups = self.collect(policy, prompts, rows, self.key).groups
        of_group = (len(rows), -1)
        right = correct(groups.components[:, 0].reshape(of_group), self.threshold)
        return Answers(right, groups.vote.reshape(of_group)), groups.rollouts

    def _mismatch(self, params: PyTree, rollouts: Rollouts) -> float:
        """KL(sampler || trainer) of the same parameters, nats per token: the k3 estimate, mean over the tokens of the rollouts of
        `at_once` prompts, or of all where they are fewer."""
        num = len(rollouts.prompts.length)
        part = _parts(num, self.at_once)[0]
        groups = of_groups(unscored(ungraded(rollouts)), part).groups
        # Where they are fewer the part is filled up with repetitions, which count once.
        once = np.repeat(np.arange(len(part)) < num, len(groups.keep) // len(part))
        d = (self.score(params, groups).logprobs - groups.rollouts.behavior_logprobs).astype(np.float64)
        return float(np.mean(KL["k3"](-d[groups.rollouts.sampled & once[:, None]])))


def _parts(n: int, size: int) -> list[np.ndarray]:
    """Indices 0..n-1 in parts of exactly `size`, so that no part compiles anew; the last is filled up from the front."""
    return [np.arange(start, start + size) % n for start in range(0, n, size)]

"""`jaxrl eval`: the score of a policy on a task, with confidence intervals."""

from typing import Any

import numpy as np

from jaxrl_llm.commands.loaded_policy import load_policy, prepare_sampling, with_batch
from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.environments.grader_pool import GraderPool
from jaxrl_llm.errors import CheckpointError
from jaxrl_llm.metrics.console import shown_on_stderr
from jaxrl_llm.metrics.estimates import Estimate, avg_at_k, maj_at_k, pass_at_k
from jaxrl_llm.model.config import PretrainedModel
from jaxrl_llm.roles import memory_check
from jaxrl_llm.roles.build import make_evaluator, make_keys, make_scorer
from jaxrl_llm.roles.collector import Collector

MAX_PROMPTS = 64
"""Prompts per batch."""


def evaluate_target(cfg: RunConfig, k: int) -> dict[str, Any]:
    """Return avg@k, pass@1 ... pass@k and maj@k over the held-out prompts, each an `Estimate` as a mapping; with a mixture the same
    for each task, under `tasks`.

    `exact` is the mean probability of the right response, if the task has one and the target is a run.

    Args:
        k: samples per prompt.

    Raises:
        CheckpointError: there is neither a checkpoint nor a pretrained model.
    """
    prompts = min(getattr(cfg.task, "held_out", 0) or MAX_PROMPTS, MAX_PROMPTS)
    setup = prepare_sampling(with_batch(cfg, prompts, k))
    blueprint, task = setup.blueprint, setup.task
    memory_check.check(blueprint, len(task.held_out), trains=False)
    with shown_on_stderr("reading the model"):
        loaded = load_policy(setup)
    if not loaded.step and not isinstance(cfg.model, PretrainedModel):
        raise CheckpointError(f"{cfg.run_dir}: got no checkpoint, want a run directory that holds one")
    found = {"model": loaded.name, "step": loaded.step, "k": k, "temperature": cfg.rollout.temperature}
    with GraderPool(cfg.reward) as pool:
        score = make_scorer(blueprint, blueprint.shapes.experience)
        collect = Collector(setup.engine, pool, task)
        evaluator = make_evaluator(blueprint, task, collect, score, make_keys(cfg.seed).evaluation)
        with shown_on_stderr(f"evaluating {len(task.held_out)} held-out prompts"):
            exact = np.full(len(task.held_out), np.nan)
            if loaded.params is not None and any(task.targets_known.values()):
                exact = evaluator.probabilities(loaded.params)
            (right, vote), _ = evaluator.answers(loaded.policy)
    found |= _estimates(exact, right, vote)
    if tasks := evaluator.rows_of_tasks():
        found["tasks"] = {name: _estimates(exact[rows], right[rows], vote[rows]) for name, rows in tasks.items()}
    return found


def _estimates(exact: np.ndarray, right: np.ndarray, vote: np.ndarray) -> dict[str, Any]:
    """The mean of the right responses' probabilities, if all are known, and estimates from k samples of each prompt, as mappings.

    Args:
        exact: probability of each prompt's right response; NaN: not known.
        right, vote: as in `Answers`.
    """
    k = right.shape[1]
    found: dict[str, Any] = {} if np.isnan(exact).any() else {"exact": float(np.mean(exact))}
    found[f"avg@{k}"] = _as_json(avg_at_k(right))
    for n in sorted({*(2**i for i in range(k.bit_length())), k}):
        found[f"pass@{n}"] = _as_json(pass_at_k(right, n))
    return found | {f"maj@{k}": _as_json(maj_at_k(right, vote))}


def _as_json(estimate: Estimate) -> dict[str, float | None]:
    """The estimate as a mapping, with None for NaN, which JSON does not have."""
    return {name: None if np.isnan(x) else x for name, x in estimate._asdict().items()}

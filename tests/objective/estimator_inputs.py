"""Estimator inputs and graded groups, set by hand."""

import jax
import numpy as np

from jaxrl_llm.objective.estimator import EstimatorInputs
from jaxrl_llm.objective.statistics import Grouping
from jaxrl_llm.types import Groups, Prompts, Rollouts, number_rows
from jaxrl_llm.update.batch import ungraded


def grouping(*size: int) -> Grouping:
    """Groups of these sizes."""
    return Grouping.of(np.repeat(np.arange(len(size)), size))


def single_tokens(reward, **more) -> EstimatorInputs:
    """Groups, each a list of rewards, of sequences of one token each."""
    flat = np.concatenate([np.float32(group) for group in reward])
    shape = (len(flat), 1)
    fields = {
        "reward": flat,
        "reward_components": flat[:, None],
        "component_weights": np.ones(1),
        "groups": grouping(*map(len, reward)),
        "mask": np.ones(shape, bool),
        "values": np.zeros(shape, np.float32),
    }
    return EstimatorInputs(**fields | more)


def to_groups(reward, components=None, fillers=0) -> Groups:
    """Groups, each a list of rewards, all kept: prompts of one token, completions of three, tokens 0, 1, 2, ... throughout. Filler
    rows follow."""
    size = [len(group) for group in reward]
    prompts, rows = len(size), sum(size) + fillers
    prompt, sample = number_rows(size, rows)
    real, each = prompt >= 0, np.zeros((rows, 3), np.float32)
    number = np.arange(prompts, dtype=np.int32)
    rollouts = Rollouts(
        prompts=Prompts(np.ones((prompts, 1), np.int32), np.ones(prompts, np.int32), number, number),
        prompt=prompt, sample=sample,
        tokens=np.arange(rows * 3, dtype=np.int32).reshape(rows, 3), length=np.where(real, 3, 0).astype(np.int32),
        sampled=np.repeat(real[:, None], 3, axis=1), behavior_logprobs=each, entropy=each, temperature=np.ones(rows, np.float32),
        version=np.zeros((rows, 3), np.int32), finish=np.zeros(rows, np.int32),
    )  # fmt: skip
    flat = np.full(rows, np.nan, np.float32)
    flat[real] = np.concatenate([np.float32(group) for group in reward])
    graded = flat[:, None] if components is None else np.float32(components)
    return ungraded(rollouts).replace(reward=flat, components=graded, keep=real)


def some_rows(groups: Groups, rows: np.ndarray) -> Groups:
    """The groups with these rows alone."""
    rollouts = jax.tree.map(lambda x: x[rows], groups.rollouts.replace(prompts=None))
    per_row = ["reward", "components", "vote", "keep"] + ([] if groups.step_reward is None else ["step_reward"])
    return groups.replace(
        rollouts=rollouts.replace(prompts=groups.rollouts.prompts),
        **{name: getattr(groups, name)[rows] for name in per_row},
    )

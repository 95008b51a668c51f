"""Estimator inputs and graded groups, set by hand."""

import numpy as np

from jaxrl_llm.objective.estimator import EstimatorInputs
from jaxrl_llm.types import Groups, Prompts, Rollouts
from jaxrl_llm.update.batch import ungraded


def single_tokens(reward, **more) -> EstimatorInputs:
    """Groups [P G] of sequences of one token each."""
    reward = np.float32(reward)
    shape = (reward.size, 1)
    fields = {
        "reward": reward,
        "reward_components": reward[..., None],
        "component_weights": np.ones(1),
        "used": np.ones(len(reward), bool),
        "mask": np.ones(shape, bool),
        "token_reward": np.zeros(shape),
        "values": np.zeros(shape, np.float32),
    }
    return EstimatorInputs(**fields | more)


def to_groups(reward, components=None) -> Groups:
    """Groups [P G], all kept: prompts of one token, completions of three, tokens 0, 1, 2, ... throughout."""
    reward = np.float32(reward)
    prompts, rows = len(reward), reward.size
    number, each = np.arange(prompts, dtype=np.int32), np.zeros((rows, 3), np.float32)
    rollouts = Rollouts(
        prompts=Prompts(np.ones((prompts, 1), np.int32), np.ones(prompts, np.int32), number, number),
        prompt=np.repeat(number, rows // prompts), sample=np.tile(np.arange(rows // prompts, dtype=np.int32), prompts),
        tokens=np.arange(rows * 3, dtype=np.int32).reshape(rows, 3), length=np.full(rows, 3, np.int32),
        sampled=np.ones((rows, 3), bool), behavior_logprobs=each, entropy=each, temperature=np.ones(rows, np.float32),
        version=np.zeros((rows, 3), np.int32), finish=np.zeros(rows, np.int32),
    )  # fmt: skip
    graded = reward.reshape(-1, 1) if components is None else np.float32(components)
    return ungraded(rollouts).replace(reward=reward.reshape(-1), components=graded)

"""Outcomes by hand."""

import numpy as np

from jaxrl_llm.objective.outcome import Outcome


def single_tokens(reward, **more) -> Outcome:
    """Groups [P G] of sequences of one token each."""
    reward = np.float32(reward)
    shape = (reward.size, 1)
    fields = {
        "reward": reward,
        "parts": reward[..., None],
        "part_weights": np.ones(1),
        "counts": np.ones(len(reward), bool),
        "mask": np.ones(shape, bool),
        "token_reward": np.zeros(shape),
        "values": np.zeros(shape, np.float32),
    }
    return Outcome(**fields | more)

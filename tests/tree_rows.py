"""Rows of one prompt that leave others, for tests by hand."""

import jax
import numpy as np
from setups import make_prompts

from jaxrl_llm.types import Rollouts


def rollouts_of(entropy, fork=None, trunk=None) -> Rollouts:
    """Rows of one prompt, all slots sampled but those of the trunk."""
    entropy = np.array(entropy, np.float32)
    rows, slots = entropy.shape
    fork = np.zeros(rows, np.int32) if fork is None else np.array(fork, np.int32)
    sampled = np.arange(slots) >= fork[:, None]
    sample = np.arange(rows, dtype=np.int32)
    return Rollouts(
        prompts=jax.tree.map(lambda x: x[:1], make_prompts(2)),
        prompt=np.zeros(rows, np.int32),
        sample=sample,
        tokens=np.ones((rows, slots), np.int32),
        length=np.full(rows, slots, np.int32),
        sampled=sampled,
        behavior_logprobs=np.where(sampled, -2 * entropy[:, ::-1], 0).astype(np.float32),
        entropy=entropy,
        temperature=np.ones(rows, np.float32),
        version=np.zeros((rows, slots), np.int32),
        finish=np.ones(rows, np.int32),
        trunk=sample if trunk is None else np.array(trunk, np.int32),
        fork=fork,
    )

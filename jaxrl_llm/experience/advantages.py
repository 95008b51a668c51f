"""Advantages of whole groups: rewards f32[P, G] to f32[P, G]. One reward a response; all its tokens share the advantage.

A group of equal rewards gets exactly 0: subtracting its first reward before the mean makes the differences exact.
NaN rewards (a group that was not graded) stay NaN; the filter drops them.
"""

import numpy as np
from jaxtyping import Float

Group = Float[np.ndarray, "P G"]


def mean_only(reward: Group) -> Group:
    """r - mean of the group. E[gradient] is (1 - 1/G) of the true one, since the mean holds the sample itself.

    Source: Liu et al. 2025 (Dr. GRPO), section 3.2.
    """
    shifted = (reward - reward[:, :1]).astype(np.float32)
    return shifted - shifted.mean(axis=1, keepdims=True)


def grpo(reward: Group, eps: float = 1e-4) -> Group:
    """(r - mean) / (std + eps); std is the sample's, with G - 1 (torch's default, and so TRL's and verl's).

    Source: Shao et al. 2024 (DeepSeekMath), section 4.1.2; eps as TRL.
    """
    centred = mean_only(reward)
    return centred / (centred.std(axis=1, ddof=1, keepdims=True) + np.float32(eps))


def rloo(reward: Group) -> Group:
    """r - mean of the G - 1 others: G/(G-1) times the centred reward; unbiased.

    Source: Ahmadian et al. 2024 (Back to Basics), eq. 9; Kool et al. 2019.
    """
    samples = reward.shape[1]
    return mean_only(reward) * np.float32(samples / (samples - 1))


ADVANTAGES = {"grpo": grpo, "rloo": rloo, "mean_only": mean_only}

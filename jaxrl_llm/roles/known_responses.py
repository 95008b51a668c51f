"""Known responses as the run's control sees them: right answers to score, and those of a file."""

import numpy as np
from jaxtyping import Bool, Int

from jaxrl_llm.control.config import budget_of
from jaxrl_llm.rollout.config import RolloutConfig
from jaxrl_llm.rollout.control_set import ControlSet
from jaxrl_llm.types import Rollouts


def under_control(
    rollouts: Rollouts, controls: ControlSet, cfg: RolloutConfig, limit: Int[np.ndarray, " P"]
) -> Rollouts:
    """Return the rollouts with the `control_state` that their tokens would have had; forced tokens are not sampled.

    Args:
        rollouts: known responses, NumPy.
        controls: of the run.
        cfg: the rollouts.
        limit: maximum completion tokens of each prompt.
    """
    if not cfg.controlled:
        return rollouts
    start, budget = controls.start(cfg.control), budget_of(cfg.control)
    codes, sampled = np.zeros(rollouts.tokens.shape, np.int32), rollouts.sampled.copy()
    for b, (n, prompt) in enumerate(zip(rollouts.length.tolist(), rollouts.prompt.tolist(), strict=True)):
        tokens = rollouts.tokens[b, :n].tolist()
        codes[b, :n], forced = controls.codes(tokens, int(limit[prompt]), start, budget, cfg.min_new_tokens)
        sampled[b, :n] &= ~forced
    return rollouts.replace(control_state=codes, sampled=sampled)


def allowed_rows(rollouts: Rollouts, controls: ControlSet, cfg: RolloutConfig) -> Bool[np.ndarray, " B"]:
    """Return which responses the control allows; arguments as in `under_control`."""
    start, budget = controls.start(cfg.control), budget_of(cfg.control)
    rows = zip(rollouts.tokens, rollouts.length.tolist(), strict=True)
    return np.array([controls.allows(tokens[:n].tolist(), start, budget) for tokens, n in rows])

"""Known responses as the run's control sees them: right answers to score, and those of a file."""

import numpy as np
from jaxtyping import Bool, Int

from jaxrl_llm.control.config import budget_of
from jaxrl_llm.distribution.control_tables import allowed_classes, state_of
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
        of = sampled[b, :n].tolist()
        codes[b, :n], forced = controls.codes(tokens, of, int(limit[prompt]), start, budget, cfg.min_new_tokens)
        sampled[b, :n] &= ~forced
    return rollouts.replace(control_state=codes, sampled=sampled)


def allowed_rows(rollouts: Rollouts, controls: ControlSet) -> Bool[np.ndarray, " B"]:
    """Return which responses could have been sampled.

    Args:
        rollouts: known responses as `under_control` returns them.
        controls: of the run.
    """
    codes, tables = rollouts.control_state, controls.tables
    if codes is None or tables is None:
        return np.ones(len(rollouts.length), bool)
    states = state_of(codes)
    of_class = np.take_along_axis(
        allowed_classes(tables, codes, np),
        tables.classes[tables.automaton[states], rollouts.tokens][..., None],
        axis=-1,
    )[..., 0]
    allowed = np.where(tables.forced[states] >= 0, tables.forced[states] == rollouts.tokens, of_class)
    return (allowed | (np.arange(codes.shape[1]) >= rollouts.length[:, None])).all(axis=1)

"""The policy that KL terms hold on to, as the trained one moves on."""

import jax

from jaxrl_llm.objective.config import ReferenceConfig
from jaxrl_llm.types import PyTree


def refresh(cfg: ReferenceConfig, reference: PyTree | None, params: PyTree, step: int) -> PyTree | None:
    """The reference after step 1, 2, ... of RL: keep * reference + (1 - keep) * params.

    `params` are those of the policy, in the structure of `reference`. Where it can change, `reference` is donated, and the new one
    lies where it lay. None stays None: nothing reads a reference.
    """
    if reference is None or cfg.kind not in ("ema", "periodic"):
        return reference
    # A copy every so often is the mean with weight 0: one program, compiled at the first step.
    return _mean(reference, params, cfg.decay if cfg.kind == "ema" else float(step % cfg.every != 0))


@jax.jit(donate_argnums=0)
def _mean(reference: PyTree, params: PyTree, keep: float) -> PyTree:
    return jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, reference, params)

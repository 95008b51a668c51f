"""Update of the reference policy, to which KL terms compare the trained one."""

import jax

from jaxrl_llm.objective.config import ReferenceConfig
from jaxrl_llm.types import PyTree


def refresh(cfg: ReferenceConfig, reference: PyTree | None, params: PyTree, step: int) -> PyTree | None:
    """Reference after an RL step: keep * reference + (1 - keep) * params.

    Args:
        cfg: kind of reference; only `ema` and `periodic` ones change.
        reference: donated if it can change, and keeps its sharding; None if no term reads one.
        params: the policy's, in the structure of `reference`.
        step: RL steps done, from 1.
    """
    if reference is None or cfg.kind not in ("ema", "periodic"):
        return reference
    # A periodic copy is the mean with weight 0: one program, compiled at the first step.
    return _mean(reference, params, cfg.decay if cfg.kind == "ema" else float(step % cfg.every != 0))


@jax.jit(donate_argnums=0)
def _mean(reference: PyTree, params: PyTree, keep: float) -> PyTree:
    return jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, reference, params)

"""The policy that KL terms hold on to, as the trained one moves on."""

import jax

from jaxrl_llm.objective import ReferenceConfig
from jaxrl_llm.types import PyTree


def refresh(cfg: ReferenceConfig, reference: PyTree | None, params: PyTree, step: int) -> PyTree | None:
    """The reference, if there is one, after step 1, 2, ...; where it changes `reference` is donated, and its place taken."""
    if reference is None:
        return None
    if cfg.kind == "ema":
        return _mean(reference, params, cfg.decay)
    if cfg.kind == "periodic" and step % cfg.every == 0:
        return _copy(reference, params)
    return reference


@jax.jit(donate_argnums=0)
def _mean(reference: PyTree, params: PyTree, decay: float) -> PyTree:
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, reference, params)


# Unread, the donated buffers would be lost and not lent.
@jax.jit(donate_argnums=0, keep_unused=True)
def _copy(reference: PyTree, params: PyTree) -> PyTree:
    return params

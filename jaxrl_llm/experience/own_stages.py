"""Gates and budgets of the user's own, their results checked."""

from types import SimpleNamespace
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from jaxrl_llm.errors import UserError
from jaxrl_llm.experience.budgets import Budget
from jaxrl_llm.experience.config import OwnBudget, OwnGate
from jaxrl_llm.experience.gates import Gate
from jaxrl_llm.experience.stage_checks import as_array, checked_init, checked_state, checked_tuple, copied
from jaxrl_llm.types import Groups


def own_gate(cfg: OwnGate) -> Gate:
    """Return a custom gate. Its methods raise UserError if what it returns is no state as before, or no bool per prompt."""
    own, name = cfg.made(), f"experience.gate {cfg.function}"

    def admit(state: Any, rng: np.random.Generator, row: Int[np.ndarray, " n"]) -> tuple[Any, Bool[np.ndarray, " n"]]:
        after, given = checked_tuple(name, own.admit(copied(state), rng, row.copy()), ("state", "admitted"))
        admitted = as_array(given)
        if admitted.shape != row.shape or admitted.dtype != bool:
            raise UserError(
                f"{name}: got {admitted.dtype}{list(admitted.shape)}, want bool[{len(row)}], one truth per prompt"
            )
        return checked_state(name, state, after), admitted

    return SimpleNamespace(init=checked_init(name, own.init), admit=admit, observe=_observe(own, name))


def own_budget(cfg: OwnBudget) -> Budget:
    """Return a custom budget; it is asked again within a step, until it allocates nothing or nothing is left.

    Its methods raise UserError if what it returns is no state as before, or no whole number per prompt that sum to what is left or
    less.
    """
    own, name = cfg.made(), f"experience.budget {cfg.function}"

    def allocate(
        state: Any, row: Int[np.ndarray, " n"], seen: Groups | None, left: int
    ) -> tuple[Any, Int[np.ndarray, " n"]]:
        after, given = checked_tuple(name, own.allocate(copied(state), row.copy(), seen, left), ("state", "samples"))
        samples = as_array(given)
        if samples.shape != row.shape or samples.dtype.kind not in "iu" or (samples < 0).any() or samples.sum() > left:
            raise UserError(
                f"{name}: got samples {samples.tolist()}, want {len(row)} whole numbers, 0 or more, of {left} in all at most"
            )
        return checked_state(name, state, after), samples.astype(int)

    return SimpleNamespace(
        in_rounds=True, init=checked_init(name, own.init), allocate=allocate, observe=_observe(own, name)
    )


def _observe(own: Any, name: str) -> Any:
    return lambda state, groups: checked_state(name, state, own.observe(copied(state), groups))

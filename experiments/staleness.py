"""Staleness: policies that sample 0, 1, 4 and 16 steps (of 4 updates) behind the trained one, under four corrections.

python -m experiments.staleness              # the runs that the results file lacks, then the plot and the tables
python -m experiments.staleness --report     # the plot and the tables alone
"""

from collections import deque
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from experiments import report
from experiments.arithmetic import SETUP, Arm, command
from experiments.results_file import DIRECTORY
from jaxrl_llm.experience.config import ExperienceConfig, Signal
from jaxrl_llm.objective.loss_config import (
    Clip,
    NoCorrection,
    PolicyGradient,
    Reinforce,
    SecondMoment,
    TruncatedImportance,
)
from jaxrl_llm.train import Run
from jaxrl_llm.types import Policy

RESULTS = DIRECTORY / "staleness.json"
STEPS, SAMPLES, UPDATES = 100, 25_600, 4
LAGS = (0, 4, 16, 64)
"""In updates."""
CORRECTIONS = {
    "none": PolicyGradient(surrogate=Reinforce(), correction=NoCorrection()),
    "clip": PolicyGradient(surrogate=Clip(), correction=NoCorrection()),
    "decoupled, truncated": PolicyGradient(surrogate=Clip(), correction=TruncatedImportance()),
    "M2": PolicyGradient(surrogate=Clip(), correction=SecondMoment()),
}


class Delayed:
    """A source that samples from the policy of `lag` steps before."""

    def __init__(self, source: Any, lag: int):
        self.__dict__.update(inner=source, policies=deque(maxlen=lag + 1))

    def use(self, policy: Policy) -> None:
        # A copy: the update's next publish takes the policy's buffers.
        self.policies.append(jax.tree.map(jnp.copy, policy))
        self.inner.use(self.policies[0])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.inner, name, value)


def delayed(run: Run, lag: int) -> Run:
    return run._replace(source=Delayed(run.source, lag))


ARMS = {
    f"{name}, lag {lag}": Arm(
        replace(
            SETUP,
            steps=STEPS,
            objective=replace(SETUP.objective, loss=loss),
            experience=ExperienceConfig(filter=Signal()),
        ),
        partial(delayed, lag=lag // UPDATES),
    )
    for lag in LAGS
    for name, loss in CORRECTIONS.items()
}
PANELS = {f"lag {lag}": [f"{name}, lag {lag}" for name in CORRECTIONS] for lag in LAGS}


def tables(runs: list[dict]) -> str:
    return report.table(runs, list(ARMS), STEPS, SAMPLES)


if __name__ == "__main__":
    command(__doc__, RESULTS, ARMS, tables, PANELS)

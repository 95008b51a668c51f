"""Scores of groups on the host, by the program that scores batches."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
from jax.sharding import Sharding

from jaxrl_llm.distribution.control_tables import ControlTables
from jaxrl_llm.distribution.score import TokenScores
from jaxrl_llm.parallel import hosts
from jaxrl_llm.types import Groups, PyTree
from jaxrl_llm.update.batch import fill_batch, to_completions, unscored
from jaxrl_llm.update.packing import BatchShape


@dataclass(frozen=True)
class Scorer:
    program: Callable[..., TokenScores]
    shape: BatchShape
    pad: int
    rows: Sharding
    """Sharding of a batch."""
    tables: ControlTables | None = None
    """On the devices; None: nothing is controlled."""

    def __call__(self, params: PyTree, groups: Groups) -> TokenScores:
        """Scores `[B C]` of the completion tokens under `params`, 0 in rows that are not kept; NumPy, equal on every host."""
        batch, where = fill_batch(unscored(groups), self.shape, self.pad)
        scores = hosts.gather(self.program(params, hosts.put(batch, self.rows), self.tables))
        return jax.tree.map(lambda x: to_completions(x, where, groups.rollouts), scores)

"""Config of the metrics: what is written and shown, and how often."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, MinLen
from pydantic import ConfigDict


@dataclass(frozen=True)
class WandbConfig:
    """A run of Weights & Biases. A resumed run continues it."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    project: Annotated[str, MinLen(1)]
    name: str = ""
    """Name of the run. Default: that of the run directory."""
    entity: str = ""
    """User or team. Default: that of the login."""
    group: str = ""
    tags: tuple[str, ...] = ()
    mode: Literal["online", "offline"] = "online"
    """online: sent while the run trains, unless the environment variable WANDB_MODE says otherwise. offline: written under
    <run>/wandb alone, for `wandb sync`."""
    table_every: Annotated[int, Ge(0)] = 10
    """Steps between tables of sampled responses, among the steps whose rollouts are recorded; 0 = never."""


@dataclass(frozen=True)
class MetricsConfig:
    """Metrics written and shown, and their intervals."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    console_every: Annotated[int, Ge(1)] = 1
    """Steps between console lines. Steps with an evaluation and the last step are always shown."""
    samples_every: Annotated[int, Ge(0)] = 10
    """Steps between printed tables of sampled responses; 0 = never."""
    rollouts_every: Annotated[int, Ge(0)] = 1
    """Steps between records of whole rollouts in rollouts.jsonl; 0 = never."""
    rollout_groups: Annotated[int, Ge(-1)] = 4
    """Groups (prompts with all their samples) recorded each time; -1 = all."""
    tensorboard: bool = True
    """Write TensorBoard scalars under <run>/tensorboard. Needs tensorboardX; a run without it logs a warning when it starts."""
    wandb: WandbConfig | None = None
    """Send metrics and sampled responses to Weights & Biases. Needs wandb; a run without it logs a warning when it starts."""

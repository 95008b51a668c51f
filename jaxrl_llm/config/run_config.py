"""RunConfig, the config of a whole run: the configs of the packages, composed. `loading.py` makes one from YAML and flags."""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Lt
from pydantic import ConfigDict, Discriminator, Tag

from jaxrl_llm.checkpoint.config import CheckpointConfig
from jaxrl_llm.environments.config import RewardConfig
from jaxrl_llm.experience.config import ExperienceConfig
from jaxrl_llm.metrics.config import MetricsConfig
from jaxrl_llm.model.config import LoraConfig, ModelConfig, PretrainedModel
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.parallel.config import MeshConfig
from jaxrl_llm.rollout.config import RolloutConfig
from jaxrl_llm.tasks.config import (
    ArithmeticTask,
    CharacterTokenizer,
    MixtureTask,
    PretrainedTokenizer,
    SingleTask,
    TaskConfig,
    TokenizerConfig,
)
from jaxrl_llm.update.config import UpdateConfig, WarmStartConfig

Steps = Annotated[int, Ge(0)]
Seed = Annotated[int, Ge(0), Lt(2**32)]


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation on the held-out prompts: before RL, every `every` steps, and at the end."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    every: Annotated[int, Ge(1)] = 25
    """Steps of RL between evaluations."""
    threshold: float = 1.0
    """Minimum score by the first grader for a response to count as right."""


def _kind_of_model(value: Any) -> str:
    has_path = "path" in value if isinstance(value, dict) else isinstance(value, PretrainedModel)
    return "pretrained" if has_path else "own"


@dataclass(frozen=True)
class RunConfig:
    """The config of one run."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    run_dir: str = "runs/run"
    """Directory for all files of the run. If it contains checkpoints, the run resumes from the newest."""
    seed: Seed = 0
    """Seed of all random numbers, below 2^32: JAX keys are made from 32 bits."""
    steps: Steps = 100
    """Steps of RL, after the steps of the warm start."""
    task: TaskConfig = field(default_factory=ArithmeticTask)
    """One task, or a list of tasks with weights: a mixture."""
    tokenizer: TokenizerConfig = field(default_factory=CharacterTokenizer)
    """Default: a pretrained model's own tokenizer, with its chat template; otherwise the characters of the arithmetic task."""
    model: Annotated[
        Annotated[ModelConfig, Tag("own")] | Annotated[PretrainedModel, Tag("pretrained")],
        Discriminator(_kind_of_model),
    ] = field(default_factory=ModelConfig)
    """Sizes of a randomly initialized model, or the `path` of a pretrained one."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    experience: ExperienceConfig = field(default_factory=ExperienceConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters, trained by RL in place of the model's own parameters."""
    update: UpdateConfig = field(default_factory=UpdateConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)

    @property
    def total_steps(self) -> int:
        """Steps of the warm start and of RL together."""
        return self.warm_start.steps + self.steps

    def evaluations_after(self, step: int) -> int:
        """Number of evaluations still to come: one before RL, one every `evaluation.every` steps, one after the last step."""
        done = step - self.warm_start.steps
        if done >= self.steps:
            return int(done < 0)
        return int(done < 0) + -(-self.steps // self.evaluation.every) - max(done, 0) // self.evaluation.every


# Keys that may differ between a run and its resumption: where and how it runs and reports, not what it computes.
MAY_CHANGE = (
    "run_dir", "steps", "mesh", "evaluation.every", "checkpoint", "metrics", "reward.workers", "reward.deadline_s",
    "reward.memory_gib", "update.guards",
)  # fmt: skip


def to_dict(cfg: RunConfig) -> dict[str, Any]:
    """Return the config as nested mappings, as `loading.validate` reads them."""
    return dataclasses.asdict(cfg)


def tokenizer_for(cfg: RunConfig, model_path: str) -> TokenizerConfig:
    """Return the config's tokenizer for the model at `model_path`: that model's own, unless the config names a third one."""
    model_own = ("", cfg.model.path if isinstance(cfg.model, PretrainedModel) else "")
    if isinstance(cfg.tokenizer, PretrainedTokenizer) and cfg.tokenizer.path in model_own:
        return dataclasses.replace(cfg.tokenizer, path=model_path)
    return cfg.tokenizer


def _each_task(task: SingleTask | MixtureTask, changed: Callable[[SingleTask], SingleTask]) -> SingleTask | MixtureTask:
    """Return the task, or each task of a mixture, after a change."""
    if not isinstance(task, MixtureTask):
        return changed(task)
    parts = (dataclasses.replace(part, task=changed(part.task)) for part in task.tasks)
    return dataclasses.replace(task, tasks=tuple(parts))


def with_absolute_paths(cfg: RunConfig, absolute: Callable[[str], str] = os.path.abspath) -> RunConfig:
    """Return the config with `absolute` applied to every path of a file or directory, so that it holds from any directory."""

    def changed(part: Any, *names: str, must_exist: bool = False) -> Any:
        paths = {name: os.path.expanduser(getattr(part, name, None) or "") for name in names}
        # A path that is no directory is a name on the hub.
        local = {name: path for name, path in paths.items() if path and (not must_exist or Path(path).is_dir())}
        return dataclasses.replace(part, **{name: absolute(path) for name, path in local.items()})

    def changed_control(control: Any) -> Any:
        then = {"then": changed_control(control.then)} if hasattr(control, "then") else {}
        return dataclasses.replace(changed(control, "path"), **then)

    return dataclasses.replace(
        cfg,
        run_dir=absolute(cfg.run_dir),
        task=_each_task(cfg.task, lambda task: changed(task, "path", "held_out_path")),
        tokenizer=changed(cfg.tokenizer, "path", must_exist=True),
        model=changed(cfg.model, "path", must_exist=True),
        rollout=dataclasses.replace(cfg.rollout, control=changed_control(cfg.rollout.control)),
        experience=dataclasses.replace(cfg.experience, replay=changed(cfg.experience.replay, "start")),
        objective=dataclasses.replace(
            cfg.objective, reference=changed(cfg.objective.reference, "path", must_exist=True)
        ),
    )

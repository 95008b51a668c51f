"""A run's whole config: the rooms' own configs, composed. YAML in, every error at once; imports no jax.

Precedence: defaults < the YAML file < `--section.field value` on the command line.
"""

import dataclasses
import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from annotated_types import Ge
from pydantic import ConfigDict, Discriminator, Tag, TypeAdapter, ValidationError

from jaxrl_llm.errors import UserError
from jaxrl_llm.experience.config import ExperienceConfig
from jaxrl_llm.metrics import MetricsConfig
from jaxrl_llm.model.config import LoraConfig, ModelConfig, PretrainedModel
from jaxrl_llm.objective import ObjectiveConfig, refusals
from jaxrl_llm.parallel.config import MeshConfig, divisors, resolve
from jaxrl_llm.presets import PRESETS, filled
from jaxrl_llm.prompts.config import (
    ArithmeticTask,
    CharacterTokenizer,
    PretrainedTokenizer,
    TaskConfig,
    TokenizerConfig,
)
from jaxrl_llm.rewards.config import RewardConfig
from jaxrl_llm.rollout.config import RolloutConfig
from jaxrl_llm.update.config import UpdateConfig, WarmStartConfig

Steps = Annotated[int, Ge(0)]


@dataclass(frozen=True)
class CheckpointConfig:
    """When the whole state is saved. The last step and SIGTERM always save."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    every: Annotated[int, Ge(1)] = 50
    """Steps between saves."""
    keep: Annotated[int, Ge(2)] = 3
    """Newest checkpoints kept. Two at least: one to fall back on."""


@dataclass(frozen=True)
class EvaluationConfig:
    """The held-out part, before RL, every so often, and at the end."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    every: Annotated[int, Ge(1)] = 25
    """Steps of RL between evaluations."""
    threshold: float = 1.0
    """What the first grader must give a response for it to count as right."""


def _kind_of_model(value: Any) -> str:
    has_path = "path" in value if isinstance(value, dict) else isinstance(value, PretrainedModel)
    return "pretrained" if has_path else "own"


@dataclass(frozen=True)
class RunConfig:
    """One run."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    run_dir: str = "runs/run"
    """Where everything of the run lies. A run directory with checkpoints is gone on with."""
    seed: Steps = 0
    steps: Steps = 100
    """Steps of RL, after those of the warm start."""
    task: TaskConfig = field(default_factory=ArithmeticTask)
    tokenizer: TokenizerConfig = field(default_factory=CharacterTokenizer)
    """Left out: a pretrained model's own, with its chat template; else the characters of the arithmetic task."""
    model: Annotated[
        Annotated[ModelConfig, Tag("own")] | Annotated[PretrainedModel, Tag("pretrained")],
        Discriminator(_kind_of_model),
    ] = field(default_factory=ModelConfig)
    """Numbers for a model that starts at random, or `path` for one that exists."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    experience: ExperienceConfig = field(default_factory=ExperienceConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters, trained by RL in the place of the model's own parameters."""
    update: UpdateConfig = field(default_factory=UpdateConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)

    @property
    def total_steps(self) -> int:
        return self.warm_start.steps + self.steps


# What may differ between a run and its resumption: where and how it runs and reports, not what it computes.
MAY_CHANGE = ("run_dir", "steps", "mesh", "evaluation", "checkpoint", "metrics", "reward.workers", "reward.deadline_s")


class _Loader(yaml.SafeLoader):
    """YAML as people write it: a key twice is an error, and 1e-5 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = []
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark)
            seen.append(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load(path: Path) -> RunConfig:
    """Read a YAML file. Raises UserError with everything that is wrong with it."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: got {'an empty file' if values is None else type(values).__name__}, want section: values"
        )
    return validate(values, str(path))


def validate(values: dict[str, Any], source: str) -> RunConfig:
    values = _with_preset(values, source)
    try:
        cfg = TypeAdapter(RunConfig).validate_python(values)
    except ValidationError as error:
        raise UserError("\n".join(f"{source}: {_describe(e, values)}" for e in _causes(error.errors()))) from None
    if isinstance(cfg.model, PretrainedModel):
        given = cfg if "tokenizer" in values else dataclasses.replace(cfg, tokenizer=PretrainedTokenizer())
        return dataclasses.replace(cfg, tokenizer=tokenizer_of(given, cfg.model.path))
    if isinstance(cfg.tokenizer, PretrainedTokenizer) and not cfg.tokenizer.path:
        raise UserError(f"{source}: tokenizer.path: got nothing, want a directory, since model has no path either")
    return cfg


def _with_preset(values: dict[str, Any], source: str) -> dict[str, Any]:
    given = values.get("objective")
    name = given.get("preset") if isinstance(given, dict) else given
    if isinstance(name, str) and name and name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)
        hint = f"; perhaps you meant {near[0]}" if near else ""
        raise UserError(f"{source}: objective.preset: got {name!r}, want one of {', '.join(PRESETS)}{hint}")
    if given is None:
        return values
    return values | {"objective": filled(given, dataclasses.asdict(ObjectiveConfig()))}


def tokenizer_of(cfg: RunConfig, model_path: str) -> TokenizerConfig:
    """The config's tokenizer for the model at `model_path`: that model's own, unless the config names a third."""
    own = ("", cfg.model.path if isinstance(cfg.model, PretrainedModel) else "")
    if isinstance(cfg.tokenizer, PretrainedTokenizer):
        return dataclasses.replace(cfg.tokenizer, path=model_path) if cfg.tokenizer.path in own else cfg.tokenizer
    return cfg.tokenizer


def _causes(errors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without those that only follow from others: a list whose entries are wrong counts as too short as well."""
    deeper = {e["loc"][:n] for e in errors for n in range(len(e["loc"]))}
    return [e for e in errors if e["type"] != "too_short" or e["loc"] not in deeper]


def _describe(error: dict[str, Any], values: dict[str, Any]) -> str:
    path = _written(error["loc"], values)
    name = ".".join(path)
    if error["type"] != "unexpected_keyword_argument":
        got = "nothing" if error["type"].startswith("missing") else repr(error["input"])
        return f"{name}: got {got}, want: {error['msg'][0].lower()}{error['msg'][1:]}"
    others = [name for name in _fields(path[:-1], values) if name != path[-1]]
    near = difflib.get_close_matches(path[-1], others, n=1)
    return f"{name}: no such key" + (f", perhaps you meant {'.'.join([*path[:-1], *near])}" if near else "")


def _written(loc: tuple[str | int, ...], values: Any) -> list[str]:
    """The path without what nobody wrote: a tagged union adds its tag."""
    path = []
    for n, name in enumerate(loc):
        known = isinstance(values, dict) and name in values
        if isinstance(name, int):
            path.append(str(name))
            values = values[name] if isinstance(values, list | tuple) else None
        elif known or (n == len(loc) - 1 and isinstance(values, dict)):
            path.append(name)
            values = values.get(name)
    return path


def _fields(path: list[str], values: dict[str, Any]) -> list[str]:
    """Names of the fields of the section at `path`, all variants of a union together."""
    types: list[type] = [RunConfig]
    for name in path:
        if name.isdigit():  # of a list: its entries are of the type found already
            continue
        found = [f for t in types for f in dataclasses.fields(t) if f.name == name]
        types = [t for f in found for t in _dataclasses_in(f.type)]
    return [f.name for t in types for f in dataclasses.fields(t)]


def _dataclasses_in(annotation: Any) -> list[type]:
    if dataclasses.is_dataclass(annotation):
        return [annotation]
    return [t for part in getattr(annotation, "__args__", ()) for t in _dataclasses_in(part)]


def to_dict(cfg: RunConfig) -> dict[str, Any]:
    return dataclasses.asdict(cfg)


def dump(cfg: RunConfig) -> str:
    return yaml.safe_dump(to_dict(cfg), sort_keys=False)


def problems(cfg: RunConfig, num_devices: int) -> list[str]:
    """Everything that cannot work on so many devices, in words: what was asked, what was found, what would work."""
    sizes, found = resolve(cfg.mesh, num_devices)
    data, fsdp, tensor, expert = sizes or (max(n, 1) for n in cfg.mesh.sizes())
    if isinstance(cfg.model, ModelConfig):
        found += cfg.model.problems(tensor, expert)
    rows, split = cfg.rollout.prompts * cfg.rollout.samples, data * fsdp * expert
    for name, size in (("rollout.prompts", cfg.rollout.prompts), ("warm_start.rows", cfg.warm_start.rows)):
        if size % split:
            works = ", ".join(map(str, divisors(size)))
            found.append(
                f"{name}: got {size}, want a multiple of mesh.data * mesh.fsdp * mesh.expert ({split}); {size} allows {works}"
            )
    found += engine_problems(cfg, num_devices, (tensor, fsdp, expert))
    if cfg.rollout.prompts % cfg.update.minibatches:
        found.append(
            f"update.minibatches: got {cfg.update.minibatches}, want a divisor of rollout.prompts "
            f"({cfg.rollout.prompts}): {', '.join(map(str, divisors(cfg.rollout.prompts)))}"
        )
    elif cfg.update.packing.kind == "none" and cfg.update.micro_batches * split > rows // cfg.update.minibatches:
        most = rows // cfg.update.minibatches // split
        found.append(
            f"update.micro_batches: got {cfg.update.micro_batches}, want {most} at most: a minibatch has "
            f"{rows // cfg.update.minibatches} rows, and each part takes one at least on each of {split} shards of "
            "mesh.data * mesh.fsdp * mesh.expert"
        )
    return found


def engine_problems(cfg: RunConfig, num_devices: int, axes: tuple[int, int, int]) -> list[str]:
    """What is wrong with how the engine is to work; `axes` are the sizes of `tensor`, `fsdp` and `expert`."""
    found, engine, (tensor, fsdp, expert) = [], cfg.rollout.engine, axes
    if engine.shared_by and cfg.rollout.samples % engine.shared_by:
        works = ", ".join(map(str, divisors(cfg.rollout.samples)))
        found.append(
            f"rollout.engine.shared_by: got {engine.shared_by}, want a divisor of rollout.samples ({cfg.rollout.samples}): {works}"
        )
    if cfg.rollout.top_k > cfg.rollout.support:
        found.append(
            f"rollout.top_k: got {cfg.rollout.top_k}, want at most the tokens kept, rollout.support ({cfg.rollout.support})"
        )
    if cfg.rollout.min_new_tokens > cfg.rollout.max_new_tokens:
        found.append(
            f"rollout.min_new_tokens: got {cfg.rollout.min_new_tokens}, want at most rollout.max_new_tokens "
            f"({cfg.rollout.max_new_tokens})"
        )
    own = (tensor, expert)
    if engine.layout == "wide":
        own = (tensor * fsdp, expert)
    elif isinstance(engine.layout, MeshConfig):
        sizes, wrong = resolve(engine.layout, num_devices)
        found += [f"rollout.engine.layout: {text}" for text in wrong]
        own = (sizes[2], sizes[3]) if sizes else own
    if isinstance(cfg.model, ModelConfig) and own != (tensor, expert):
        found += [f"rollout.engine.layout: {text}" for text in cfg.model.problems(*own) if text.startswith("mesh.")]
    return found


def training_problems(cfg: RunConfig) -> list[str]:
    """What sampling and evaluation can do and training cannot, in words."""
    found = []
    if cfg.rollout.temperature == 0:
        found.append("rollout.temperature: got 0, want more: a policy that never explores learns nothing")
    graders = len(cfg.reward.graders)
    return found + refusals(cfg.objective, cfg.rollout.samples, cfg.update.packing.kind, cfg.experience.filter, graders)


def changes(saved: dict[str, Any], now: dict[str, Any], path: str = "") -> list[str]:
    """`name: saved -> now` for each value that differs and may not."""
    found = []
    for name in sorted(saved.keys() | now.keys()):
        full = f"{path}{name}"
        before, after = saved.get(name), now.get(name)
        if full in MAY_CHANGE or before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            found += changes(before, after, f"{full}.")
        else:
            found.append(f"{full}: {before!r} -> {after!r}")
    return found

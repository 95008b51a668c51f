"""A run's whole config: the rooms' own configs, composed. YAML in, every error at once; imports no jax.

Precedence: defaults < the YAML file < `--section.field value` on the command line.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from annotated_types import Ge, Lt
from pydantic import ConfigDict, Discriminator, Tag, TypeAdapter, ValidationError

from jaxrl_llm.config.messages import errors_in_words, named
from jaxrl_llm.config.values import Flag, numbers, put, read_flags, read_yaml, truths, unreadable
from jaxrl_llm.environments.config import RewardConfig
from jaxrl_llm.errors import UserError
from jaxrl_llm.experience.config import FILTERS, ExperienceConfig
from jaxrl_llm.metrics.config import MetricsConfig
from jaxrl_llm.model.config import LoraConfig, ModelConfig, PretrainedModel
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.presets import PRESETS, nearest_preset, with_preset
from jaxrl_llm.objective.rules import refusals
from jaxrl_llm.parallel.config import MeshConfig, divisors, resolve
from jaxrl_llm.rollout.config import RolloutConfig
from jaxrl_llm.tasks.config import ArithmeticTask, CharacterTokenizer, PretrainedTokenizer, TaskConfig, TokenizerConfig
from jaxrl_llm.update.config import UpdateConfig, WarmStartConfig

Steps = Annotated[int, Ge(0)]
Seed = Annotated[int, Ge(0), Lt(2**32)]
# What 32 bits hold: integers, and floats from the smallest normal one on.
MOST, LARGEST, SMALLEST = 2**31 - 1, 3.4e38, 1.2e-38
MAX_BYTES = 2_000_000


@dataclass(frozen=True)
class CheckpointConfig:
    """When the whole state is saved. The last step, SIGTERM and Ctrl-C always save."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    every: Annotated[int, Ge(1)] = 50
    """Steps between saves."""
    keep: Annotated[int, Ge(2)] = 3
    """Newest checkpoints kept; one whose updates are not finite counts for none. Two at least: one to fall back on."""


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
    seed: Seed = 0
    """Keys of JAX are made from 32 bits: a larger one would be another seed's run."""
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

    def evaluations_after(self, step: int) -> int:
        """How many are still to come: before the first step of RL, each `evaluation.every`, and after the last."""
        done = step - self.warm_start.steps
        if done >= self.steps:
            return int(done < 0)
        return int(done < 0) + -(-self.steps // self.evaluation.every) - max(done, 0) // self.evaluation.every


# What may differ between a run and its resumption: where and how it runs and reports, not what it computes.
MAY_CHANGE = (
    "run_dir", "steps", "mesh", "evaluation.every", "checkpoint", "metrics", "reward.workers", "reward.deadline_s",
    "reward.memory_gib", "update.guards",
)  # fmt: skip


def load(path: Path, args: Sequence[str] = (), own: Sequence[str] = ()) -> RunConfig:
    """A YAML file with flags over it. Raises UserError with everything that is wrong with both; see `read_flags`."""
    flags, wrong = read_flags(args, RunConfig, own)
    try:
        values, repeated = _read(path)
    except UserError as error:
        raise UserError("\n".join([str(error), *wrong])) from None
    return _checked(values, str(path), flags, [*repeated, *wrong])


def validate(values: dict[str, Any], source: str, args: Sequence[str] = (), own: Sequence[str] = ()) -> RunConfig:
    """The config of such values with flags over them. Raises UserError with everything that is wrong with both."""
    return _checked(values, source, *read_flags(args, RunConfig, own))


def _read(path: Path) -> tuple[dict[str, Any], list[str]]:
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise UserError(f"{path}: got {size:,} bytes, want a config of {MAX_BYTES:,} at most")
        text = path.read_text(encoding="utf-8")
        values, repeated = read_yaml(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not YAML: {error}") from None
    wrong = [f"{path}: {line}" for line in repeated]
    if not isinstance(values, dict):
        got = "an empty file" if values is None else type(values).__name__
        # Where `train` keeps a run's own.
        is_emptied = path.name == "config.yaml" and not text.strip()
        remedy = "; jaxrl train with the run's own CONFIG writes it anew" if is_emptied else ""
        raise UserError(f"{path}: got {got}, want section: values{remedy}")
    return values, wrong


def _checked(values: dict[str, Any], source: str, flags: Sequence[Flag], wrong: Sequence[str]) -> RunConfig:
    # A preset on the command line brings its parts before other flags change them.
    preset = [flag for flag in flags if flag.path == ("objective", "preset")]
    values, _ = put(_with_preset(values), preset, RunConfig)
    values, misplaced = put(_with_preset(values), [flag for flag in flags if flag not in preset], RunConfig)
    values, found = _with_preset(values), [*wrong, *misplaced]
    try:
        cfg = _reader().validate_python(values)
    except ValidationError as error:
        found += errors_in_words(error.errors(), values, RunConfig, source, flags)
    else:
        found += [f"{named(path, source, flags)}: {text}" for path, text in _out_of_range(cfg)]
    for path, text in (*unreadable(values), *truths(values, RunConfig), *_misfits(values)):
        # Nothing was written where a value is missing: a flag of its section is what asks for it.
        beside = [Flag(path, None) for flag in flags if flag.path[:-1] == path[:-1] and text.startswith("got nothing")]
        found.append(f"{named(path, source, [*flags, *beside])}: {text}")
    if found:
        raise UserError("\n".join(found))
    if isinstance(cfg.model, PretrainedModel):
        given = cfg if "tokenizer" in values else dataclasses.replace(cfg, tokenizer=PretrainedTokenizer())
        return dataclasses.replace(cfg, tokenizer=tokenizer_of(given, cfg.model.path))
    return cfg


def _out_of_range(cfg: RunConfig) -> list[tuple[tuple[str, ...], str]]:
    """Numbers that no array here could hold, as path and words."""
    found = []
    for path, x in numbers(cfg):
        if isinstance(x, int) and abs(x) > MOST and path != ("seed",):
            found.append((path, f"got {x}, want at most {MOST:,}: integers have 32 bits"))
        if isinstance(x, float) and abs(x) > LARGEST:
            found.append((path, f"got {x}, want at most {LARGEST}: numbers are float32"))
        if isinstance(x, float) and 0 < abs(x) < SMALLEST:
            found.append((path, f"got {x}, want 0, or {SMALLEST} at least: it is 0 in float32"))
    return found


@functools.cache
def _reader() -> TypeAdapter[RunConfig]:
    return TypeAdapter(RunConfig)


def _with_preset(values: dict[str, Any]) -> dict[str, Any]:
    if values.get("objective") is None:
        return values
    return values | {"objective": with_preset(values["objective"], dataclasses.asdict(ObjectiveConfig()))}


def _misfits(values: dict[str, Any]) -> list[tuple[tuple[str, ...], str]]:
    """What the types do not say, as path and words. The values may be wrong otherwise."""
    found = []
    name = values["objective"].get("preset") if isinstance(values.get("objective"), dict) else None
    if isinstance(name, str) and name and name not in PRESETS:
        hint = f"; perhaps you meant {nearest_preset(name)}" if nearest_preset(name) else ""
        found.append((("objective", "preset"), f"got {name!r}, want one of {', '.join(PRESETS)}{hint}"))
    if values.get("run_dir") == "":
        found.append((("run_dir",), "got nothing, want a directory"))
    model, tokenizer = values.get("model", {}), values.get("tokenizer", CharacterTokenizer())
    pretrained = isinstance(tokenizer, dict) and "alphabet" not in tokenizer and not tokenizer.get("path")
    if pretrained and isinstance(model, dict) and "path" not in model:
        found.append((("tokenizer", "path"), "got nothing, want a directory, since model has no path either"))
    return found


def tokenizer_of(cfg: RunConfig, model_path: str) -> TokenizerConfig:
    """The config's tokenizer for the model at `model_path`: that model's own, unless the config names a third."""
    own = ("", cfg.model.path if isinstance(cfg.model, PretrainedModel) else "")
    if isinstance(cfg.tokenizer, PretrainedTokenizer):
        return dataclasses.replace(cfg.tokenizer, path=model_path) if cfg.tokenizer.path in own else cfg.tokenizer
    return cfg.tokenizer


def to_dict(cfg: RunConfig) -> dict[str, Any]:
    return dataclasses.asdict(cfg)


def with_places(cfg: RunConfig, place: Callable[[str], str] = os.path.abspath) -> RunConfig:
    """With every path of a file or directory as `place` gives it: absolute, so that it means the same wherever it is read."""

    def of(part: Any, *names: str, exists: bool = False) -> Any:
        paths = {name: getattr(part, name, "") for name in names}
        # What is no directory here is a name on the hub.
        meant = {
            name: path for name, path in paths.items() if path and (not exists or Path(path).expanduser().is_dir())
        }
        return dataclasses.replace(part, **{name: place(os.path.expanduser(path)) for name, path in meant.items()})

    return dataclasses.replace(
        cfg,
        run_dir=place(cfg.run_dir),
        task=of(cfg.task, "path", "held_out_path"),
        tokenizer=of(cfg.tokenizer, "path", exists=True),
        model=of(cfg.model, "path", exists=True),
        objective=dataclasses.replace(cfg.objective, reference=of(cfg.objective.reference, "path", exists=True)),
    )


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
    elif cfg.update.micro_batches * split > rows // cfg.update.minibatches:
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
    if engine.rows_per_prompt_cache and cfg.rollout.samples % engine.rows_per_prompt_cache:
        works = ", ".join(map(str, divisors(cfg.rollout.samples)))
        found.append(
            f"rollout.engine.rows_per_prompt_cache: got {engine.rows_per_prompt_cache}, want a divisor of rollout.samples "
            f"({cfg.rollout.samples}): {works}"
        )
    if cfg.rollout.top_k > cfg.rollout.max_kept_tokens:
        found.append(
            f"rollout.top_k: got {cfg.rollout.top_k}, want at most rollout.max_kept_tokens ({cfg.rollout.max_kept_tokens})"
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
    graders = [grader.label for grader in cfg.reward.graders]
    chosen = cfg.experience.filter
    if isinstance(chosen, str) and chosen not in (*FILTERS, *graders):
        named = f"{', '.join(FILTERS)}; or a grader's name: {', '.join(graders)}"
        found.append(f"experience.filter: got {chosen!r}, want one of: {named}")
    # What one of your own drops is your own affair.
    keep = chosen if isinstance(chosen, str) else "none"
    return found + refusals(cfg.objective, cfg.rollout.samples, cfg.update.packing.kind, keep, len(graders))


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

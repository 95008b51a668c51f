"""Blueprint of a run: what its roles are built from, and what `plan` compiles, before any array exists."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax
import optax

from jaxrl_llm.config import consistency
from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.distribution.control_tables import ControlTables
from jaxrl_llm.distribution.loss_terms import Loss
from jaxrl_llm.distribution.score import Scoring
from jaxrl_llm.errors import UserError
from jaxrl_llm.experience.budgets import gives_equally
from jaxrl_llm.experience.config import OwnBudget, OwnReplay
from jaxrl_llm.experience.replay import blank_groups, rows_of_step
from jaxrl_llm.model import lora, quantized_weights
from jaxrl_llm.model import params as model_params
from jaxrl_llm.model.attention import selection
from jaxrl_llm.model.config import ForwardOptions, ModelConfig
from jaxrl_llm.model.critic import NAMES as CRITIC
from jaxrl_llm.model.critic import critic_specs
from jaxrl_llm.objective.loss_config import Correction, resolve_correction
from jaxrl_llm.objective.losses import make_loss
from jaxrl_llm.parallel import hosts
from jaxrl_llm.parallel.layout import TRAIN, Layout
from jaxrl_llm.parallel.mesh import make_mesh
from jaxrl_llm.roles.inputs import Inputs, packing_problems
from jaxrl_llm.rollout.config import NoTree
from jaxrl_llm.rollout.control_set import ControlSet
from jaxrl_llm.rollout.engine import Engine, EngineModel, PromptTokenizer, configured_controls
from jaxrl_llm.rollout.sample import Vocabulary
from jaxrl_llm.types import Groups, PyTree
from jaxrl_llm.update.config import OptimizerConfig
from jaxrl_llm.update.optimizer.config import GroupConfig
from jaxrl_llm.update.optimizer.transform import make_optimizer
from jaxrl_llm.update.packing import BatchShape, GroupSizes, batch_shape, equal_groups, share


class Shapes(NamedTuple):
    """Shapes of a run's batches."""

    update: BatchShape
    """A minibatch."""
    experience: BatchShape
    """All groups of a step, scored before the first update."""
    supervised: BatchShape
    held_out: BatchShape
    """`rollout.prompts` rows with their target responses, for evaluation."""


@dataclass(frozen=True)
class Blueprint:
    cfg: RunConfig
    model: ModelConfig
    """The config's `model`, or what a pretrained model's config.json says."""
    vocab: Vocabulary
    prompt_slots: int
    train: Layout
    decode: Layout
    tokenizer: PromptTokenizer | None = None
    """For stop strings and controls; None: the run is only planned."""

    @cached_property
    def specs(self) -> PyTree:
        """Parameter specs of the policy; supervised training trains all of them."""
        return model_params.specs(self.model)

    @cached_property
    def learner_specs(self) -> PyTree:
        """Parameter specs of the RL state: the policy with its adapters, and the critic if there is one."""
        critic = critic_specs(self.model, self.cfg.objective.critic.kind) if self.cfg.objective.has_critic else {}
        return lora.adapted_specs(self.specs, self.model, self.cfg.lora) | critic

    @property
    def reference_specs(self) -> PyTree | None:
        """Parameter specs of the reference: the part of the policy that RL trains, or a whole model; None if no term reads one."""
        if not self.cfg.objective.has_reference:
            return None
        return self.specs if self.cfg.objective.reference.kind == "pretrained" else self.changed(self.learner_specs)

    def changed(self, params: PyTree) -> PyTree:
        """The part of the policy that RL trains, for arrays and specs alike: all of it, or its adapters."""
        return lora.split(model_params.policy_params(params, self.model))[0]

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """RL optimizer."""
        return make_optimizer(optimizer_of(self.cfg))

    @cached_property
    def loss(self) -> Loss:
        return loss_of(self.cfg)

    @property
    def scoring(self) -> Scoring:
        forward = ForwardOptions(self.cfg.update.attention, self.cfg.update.remat)
        return Scoring(self.model, self.train, self.vocab.size, forward)

    @cached_property
    def shapes(self) -> Shapes:
        return shapes_of(self.cfg, self.prompt_slots, self.train.size("rows"))

    @property
    def engine_model(self) -> EngineModel:
        return EngineModel(self.model, self.decode, self.vocab, self.tokenizer)

    def make_engine(self) -> Engine:
        """The rollout engine."""
        return Engine(self.engine_model, self.cfg.rollout, self.prompt_slots)

    @cached_property
    def controls(self) -> ControlSet:
        """The controls of all rollouts, by which they are scored too."""
        return configured_controls(self.engine_model, self.cfg.rollout)

    @cached_property
    def tables(self) -> ControlTables | None:
        """Control tables for scoring, on the devices; None: nothing is controlled."""
        return hosts.put(self.controls.tables, self.train.replicated)


def make_blueprint(
    cfg: RunConfig,
    model: ModelConfig,
    vocab: Vocabulary,
    prompt_slots: int,
    devices: Sequence[jax.Device] | None = None,
) -> Blueprint:
    """Blueprint of a config.

    Args:
        cfg: of the run.
        model: `cfg.model`, or a pretrained model's own config.
        vocab: the tokenizer's.
        prompt_slots: S, slots of the longest prompt.
        devices: of the mesh; None: all that JAX sees.
    """
    devices = jax.devices() if devices is None else list(devices)
    train = Layout(make_mesh(*cfg.mesh.sizes(), devices=devices), TRAIN)
    return Blueprint(cfg, model, vocab, prompt_slots, train, train.for_decode(cfg.rollout.engine.layout))


def blueprint_of(cfg: RunConfig, given: Inputs) -> Blueprint:
    """Blueprint of a config and its inputs. Raises UserError with everything that does not fit, before anything compiles."""
    if found := problems(given):
        raise UserError("\n".join(found))
    task = given.task
    vocab = Vocabulary(task.num_tokens, task.pad, task.eos)
    found = make_blueprint(cfg, given.cfg.model, vocab, task.prompt_slots)
    return dataclasses.replace(found, tokenizer=task.tokenizer)


def correction_for(cfg: RunConfig) -> Correction:
    """Correction for the difference between the sampler's arithmetic and the trainer's; `auto` resolved."""
    return resolve_correction(cfg.objective.loss, cfg.rollout.engine.weights, cfg.rollout.engine.cache)


def loss_of(cfg: RunConfig) -> Loss:
    """RL loss."""
    return make_loss(cfg.objective, correction_for(cfg), cfg.rollout.max_new_tokens, cfg.update.updates)


def uses_of(cfg: RunConfig) -> tuple[str, ...]:
    """Names of the optional features that a run uses: those of `COLUMNS` (`Column.when`), steps and trees."""
    rollout, objective = cfg.rollout, cfg.objective
    uses = {
        "truncation": rollout.truncates,
        "raw_logprobs": rollout.raw_logprobs,
        "control": rollout.controlled,
        "reference": objective.reads_reference_logprobs,
        "proximal": "proximal_logprobs" in loss_of(cfg).columns,
        "critic": objective.has_critic,
        "trees": not isinstance(rollout.tree, NoTree),
        "steps": any(grader.step_end for grader in cfg.reward.graders),
    }
    return tuple(name for name, used in uses.items() if used)


def optimizer_of(cfg: RunConfig) -> OptimizerConfig:
    """The config's optimizer, with a parameter group for the critic, so that its gradient is clipped by its own norm."""
    optimizer = cfg.update.optimizer
    if not cfg.objective.has_critic:
        return optimizer
    critic = GroupConfig(match=f"({'|'.join(CRITIC)})/", lr_scale=cfg.objective.critic.lr_scale)
    return dataclasses.replace(optimizer, groups=(critic, *optimizer.groups))


def shapes_of(cfg: RunConfig, prompt_slots: int, shards: int) -> Shapes:
    packing, update, whole = cfg.update.packing, cfg.update, group_sizes(cfg)
    sizes = prompt_slots, cfg.rollout.max_new_tokens

    def of_rollouts(groups: GroupSizes, parts: int) -> BatchShape:
        return batch_shape(packing.kind, groups, sizes, packing.slots, parts, shards)

    def supervised(rows: int) -> BatchShape:
        return batch_shape("none", equal_groups(rows, 1), sizes, 0, 1, shards)

    return Shapes(
        of_rollouts(share(whole, update.minibatches), update.micro_batches),
        of_rollouts(whole, update.micro_batches * update.minibatches),
        supervised(cfg.warm_start.rows),
        supervised(cfg.rollout.prompts),
    )


def group_sizes(cfg: RunConfig) -> GroupSizes:
    """Sizes of the groups that a step trains on: the fresh ones, and what the replay adds."""
    fresh, replay = fresh_sizes(cfg), cfg.experience.replay
    if isinstance(replay, OwnReplay) or not replay.capacity:
        return fresh
    rows = rows_of_step(replay, fresh.prompts, fresh.rows)
    more = replay.join.most if replay.join and not replay.join.swap else 0
    # Groups of a file may be smaller.
    of_file = bool(replay.start) and (replay.groups > 0 or replay.replace_dropped)
    equal = fresh.equal and not more and not of_file
    return GroupSizes(fresh.prompts + cfg.experience.replayed_groups, rows, fresh.most + more, equal)


def fresh_sizes(cfg: RunConfig) -> GroupSizes:
    """Sizes of the groups that a step samples, as far as the budget fixes them."""
    prompts, rows = cfg.rollout.prompts, cfg.rollout.prompts * cfg.rollout.samples
    budget = cfg.experience.budget
    if isinstance(budget, OwnBudget):
        return GroupSizes(prompts, rows, rows - prompts + 1)
    return GroupSizes(prompts, rows, budget.most(prompts, rows), equal=gives_equally(budget, prompts, rows))


def blank_fresh(cfg: RunConfig, prompt_slots: int, num_tokens: int) -> Groups:
    """Groups of zeros in the shapes of what a step samples. `num_tokens`: of the tokenizer."""
    rollout, slots = cfg.rollout, (prompt_slots, cfg.rollout.max_new_tokens)
    names, kept = tuple(grader.label for grader in cfg.reward.graders), rollout.max_kept_of(num_tokens)
    found = blank_groups(rollout.prompts, rollout.samples, slots, len(names), uses_of(cfg), kept, fresh_sizes(cfg).most)
    return found.replace(graders=names, threshold=cfg.evaluation.threshold)


def problems(given: Inputs) -> list[str]:
    """Messages on what does not fit between inputs, config and the devices that JAX sees."""
    cfg, found = given.cfg, [*given.problems, *consistency.problems(given.cfg, jax.device_count())]
    if isinstance(cfg.model, ModelConfig):
        found += lora.problems(cfg.model, cfg.lora)
        found += device_problems(cfg, cfg.model, given.task and given.task.prompt_slots, jax.devices())
    return found


def device_problems(
    cfg: RunConfig, model: ModelConfig, prompt_slots: int | None, devices: Sequence[jax.Device]
) -> list[str]:
    """Messages on what the devices cannot do.

    Args:
        cfg, model: the run and its model.
        prompt_slots: S; None if it is not known.
        devices: of the mesh.
    """
    found = quantized_weights.problems(model, cfg.rollout.engine.weights, devices[0])
    slots: set[int] = set()
    if prompt_slots is not None and not packing_problems(cfg, prompt_slots):
        slots = {shape.slots for shape in shapes_of(cfg, prompt_slots, 1)}
    return found + selection.problems(cfg.update.attention, slots or {selection.LANES}, devices[0].platform, model)

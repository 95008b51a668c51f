"""What a run is made of, built once from its config: task, mesh, layouts, and the compiled programs.

`train`, `evaluate` and the command line all start here. Nothing in here loops.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
from jaxtyping import Array, Key

from jaxrl_llm import config as run_config
from jaxrl_llm import sources
from jaxrl_llm.config import RunConfig
from jaxrl_llm.errors import UserError
from jaxrl_llm.experience.filters import Filter, make_filter
from jaxrl_llm.experience.replay import Replay, make_replay
from jaxrl_llm.model import forms, lora, quantised
from jaxrl_llm.model import params as model_params
from jaxrl_llm.model.config import ModelConfig, Whole
from jaxrl_llm.model.critic import NAMES as CRITIC
from jaxrl_llm.model.critic import critic_specs
from jaxrl_llm.model.distribution import TokenScores
from jaxrl_llm.model.loss import Loss
from jaxrl_llm.objective.credit import Advantage, make_advantage
from jaxrl_llm.objective.loss_config import (
    Correction,
    anchored_on_proximal,
    correction_of,
)
from jaxrl_llm.objective.losses import CROSS_ENTROPY, make_loss
from jaxrl_llm.objective.rules import filter_of
from jaxrl_llm.parallel import hosts
from jaxrl_llm.parallel.config import resolve
from jaxrl_llm.parallel.layout import TRAIN, Layout
from jaxrl_llm.parallel.mesh import make_mesh
from jaxrl_llm.prompts.stream import Order, make_order
from jaxrl_llm.prompts.task import Task
from jaxrl_llm.publish import Publish, make_blank, make_publish
from jaxrl_llm.rollout.engine import Engine
from jaxrl_llm.rollout.sample import Vocabulary
from jaxrl_llm.sources import Sources, packing_problems
from jaxrl_llm.types import Batch, Groups, Policy, PyTree, TrainState
from jaxrl_llm.update.batch import make_batch, to_rows, unscored
from jaxrl_llm.update.optimizer.config import GroupConfig, OptimizerConfig
from jaxrl_llm.update.optimizer.transform import make_optimizer
from jaxrl_llm.update.packing import Shape, shape_of
from jaxrl_llm.update.step import Update, make_score, make_update


class Shapes(NamedTuple):
    """Of the batches of a run."""

    update: Shape
    """A minibatch."""
    experience: Shape
    """All groups of a step, for scores before the first update."""
    warm_start: Shape
    held_out: Shape
    """`rollout.prompts` rows with the right responses."""


@dataclass(frozen=True)
class Run:
    """Built once, never changed."""

    cfg: RunConfig
    model: ModelConfig
    task: Task
    order: Order
    """Of the prompts of RL."""
    warm_order: Order
    """Of the rows of the warm start."""
    train: Layout
    decode: Layout
    specs: PyTree
    """Of the policy; what the warm start trains."""
    learner_specs: PyTree
    """Of the state of RL: with the adapters and the critic, where there are any."""
    optimizer: OptimizerConfig
    """Of RL: a critic is a group of its own."""
    engine: Engine
    advantage: Advantage
    loss: Loss
    """Of RL."""
    publish: Publish
    filter: Filter
    """Which groups may teach: `experience.filter`, `auto` resolved."""
    replay: Replay
    blank: Callable[[], Policy]
    """Buffers for a policy where none is there to lend its own."""
    shapes: Shapes
    score: jax.stages.Wrapped
    """Of batches of the shape `held_out`."""
    score_experience: jax.stages.Wrapped
    warm_update: Update
    update: Update
    key: Key[Array, ""]
    """Sampling in training."""
    eval_key: Key[Array, ""]

    @property
    def anchored_on_proximal(self) -> bool:
        return anchored_on_proximal(self.cfg.objective.loss, correction_for(self.cfg))

    @property
    def scores_proximal(self) -> bool:
        return "proximal_logprobs" in self.loss.columns

    def put_batch(self, batch: Batch) -> Batch:
        return hosts.put(batch, self.train.sharding(("rows", None)))


def build(cfg: RunConfig, given: Sources | None = None) -> Run:
    """Raises UserError with everything that does not fit, before anything compiles. `given`: what was read of `cfg` already."""
    given = sources.read(cfg) if given is None else given
    if found := problems(given):
        raise UserError("\n".join(found))
    model, task = given.cfg.model, given.task
    mesh = make_mesh(resolve(cfg.mesh, jax.device_count())[0])
    train = Layout(mesh, TRAIN)
    decode = train.for_decode(cfg.rollout.engine.layout)
    weights = cfg.rollout.engine.weights
    loss = loss_of(cfg)
    vocab = Vocabulary(size=task.num_tokens, pad=task.pad, eos=task.eos)
    specs = model_params.specs(model)
    learner_specs = learner_specs_of(cfg, model)
    optimizer = optimizer_of(cfg)
    shapes = shapes_of(cfg, task.prompt_slots, train.size("rows"))
    how = Whole(cfg.update.attention, cfg.update.remat)
    scoring = {"num_tokens": task.num_tokens, "cfg": model, "layout": train, "ends": task.eos, "how": how}

    key, eval_key = jax.random.split(jax.random.key(cfg.seed))
    return Run(
        cfg=cfg,
        model=model,
        task=task,
        order=make_order(len(task.train), cfg.seed),
        warm_order=make_order(len(task.train), cfg.seed + 1),
        train=train,
        decode=decode,
        specs=specs,
        learner_specs=learner_specs,
        optimizer=optimizer,
        engine=Engine(cfg.rollout, task.prompt_slots, vocab, model, decode, task.tokenizer.spellings),
        advantage=make_advantage(cfg.objective, [grader.weight for grader in cfg.reward.graders]),
        loss=loss,
        publish=make_publish(model, train, decode, weights),
        filter=filter_for(cfg),
        replay=make_replay(cfg.experience.replay),
        blank=make_blank(model, decode, weights),
        shapes=shapes,
        score=make_score(**scoring),
        score_experience=make_score(**scoring, parts=shapes.experience.parts),
        warm_update=make_update(
            specs, CROSS_ENTROPY, make_optimizer(cfg.warm_start.optimizer), micro_batches=1, **scoring
        ),
        update=make_update(
            learner_specs, loss, make_optimizer(optimizer), micro_batches=cfg.update.micro_batches, **scoring
        ),
        key=key,
        eval_key=eval_key,
    )


def filter_for(cfg: RunConfig) -> Filter:
    """`experience.filter`, `auto` resolved."""
    graders = [grader.label for grader in cfg.reward.graders]
    name = filter_of(cfg.experience.filter, cfg.objective, len(graders))
    return make_filter(name, graders, cfg.evaluation.threshold)


def learner_specs_of(cfg: RunConfig, model: ModelConfig) -> PyTree:
    """What RL trains and what it reads beside: the policy with its adapters, and a critic where there is one."""
    critic = critic_specs(model, cfg.objective.critic.kind) if cfg.objective.has_critic else {}
    return lora.adapted_specs(model_params.specs(model), model, cfg.lora) | critic


def correction_for(cfg: RunConfig) -> Correction:
    """Of the sampler's arithmetic, `auto` resolved."""
    return correction_of(cfg.objective.loss, cfg.rollout.engine.weights, cfg.rollout.engine.cache)


def loss_of(cfg: RunConfig) -> Loss:
    """Of RL."""
    return make_loss(cfg.objective, correction_for(cfg), cfg.rollout.max_new_tokens, cfg.update.updates)


def uses_of(cfg: RunConfig) -> tuple[str, ...]:
    """What of the optional columns of `COLUMNS` a run uses."""
    rollout, objective = cfg.rollout, cfg.objective
    uses = {
        "truncation": rollout.truncates,
        "raw_logprobs": rollout.raw_logprobs,
        "min_new_tokens": rollout.min_new_tokens > 0,
        "reference": objective.reads_reference_logprobs,
        "proximal": "proximal_logprobs" in loss_of(cfg).columns,
        "critic": objective.has_critic,
    }
    return tuple(name for name, used in uses.items() if used)


def optimizer_of(cfg: RunConfig) -> OptimizerConfig:
    """With a group for the critic, whose gradient then has a norm of its own as well."""
    optimizer = cfg.update.optimizer
    if not cfg.objective.has_critic:
        return optimizer
    critic = GroupConfig(match=f"({'|'.join(CRITIC)})/", lr_scale=cfg.objective.critic.lr_scale)
    return dataclasses.replace(optimizer, groups=(critic, *optimizer.groups))


def shapes_of(cfg: RunConfig, prompt_slots: int, shards: int) -> Shapes:
    prompts, samples, packing, update = cfg.rollout.prompts, cfg.rollout.samples, cfg.update.packing, cfg.update
    sizes = prompt_slots, cfg.rollout.max_new_tokens

    def of_rollouts(prompts: int, parts: int) -> Shape:
        return shape_of(packing.kind, prompts, samples, sizes, packing.slots, parts, shards)

    def supervised(rows: int) -> Shape:
        return shape_of("none", rows, 1, sizes, 0, 1, shards)

    return Shapes(
        of_rollouts(prompts // update.minibatches, update.micro_batches),
        of_rollouts(prompts, update.micro_batches * update.minibatches),
        supervised(cfg.warm_start.rows),
        supervised(prompts),
    )


def problems(given: Sources) -> list[str]:
    """What does not fit between sources, config and the devices that JAX sees, in words."""
    cfg, found = given.cfg, [*given.problems, *run_config.problems(given.cfg, jax.device_count())]
    if isinstance(cfg.model, ModelConfig):
        found += lora.problems(cfg.model, cfg.lora)
        found += device_problems(cfg, cfg.model, given.task and given.task.prompt_slots, jax.devices())
    return found


def device_problems(
    cfg: RunConfig, model: ModelConfig, prompt_slots: int | None, devices: Sequence[jax.Device]
) -> list[str]:
    """What such devices cannot do, in words; `prompt_slots` None: not known."""
    found = quantised.problems(model, cfg.rollout.engine.weights, devices[0])
    slots: set[int] = set()
    if prompt_slots is not None and not packing_problems(cfg, prompt_slots):
        slots = {shape.slots for shape in shapes_of(cfg, prompt_slots, 1)}
    return found + forms.problems(cfg.update.attention, slots or {forms.LANES}, devices[0].platform, model)


def score(run: Run, params: PyTree, groups: Groups) -> TokenScores:
    """Of the completions' tokens [B C] under `params`, on the host."""
    batch, where = make_batch(unscored(groups), run.shapes.experience, run.task.pad)
    scores = hosts.gather(run.score_experience(params, run.put_batch(batch)))
    return jax.tree.map(lambda x: to_rows(x, where, groups.rollouts), scores)


def publish(run: Run, state: TrainState, old: Policy | None) -> Policy:
    """The policy that the state's parameters make; `old` lends its buffers."""
    return run.publish(state.params, state.step, old or run.blank())

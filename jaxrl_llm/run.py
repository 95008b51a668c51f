"""What a run is made of, built once from its config: task, mesh, layouts, and the compiled programs.

`train`, `evaluate` and the command line all start here. Nothing in here loops.
"""

import dataclasses
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from jaxrl_llm import config as run_config
from jaxrl_llm.ceilings import copy_bandwidth, matmul_rate
from jaxrl_llm.checkpoint import Checkpoints
from jaxrl_llm.config import RunConfig
from jaxrl_llm.errors import UserError
from jaxrl_llm.experience.packing import Shape, shape_of
from jaxrl_llm.experience.replay import Replay, empty
from jaxrl_llm.model import params as model_params
from jaxrl_llm.model import quantised
from jaxrl_llm.model.config import ModelConfig, Whole
from jaxrl_llm.model.critic import critic_specs, critic_start
from jaxrl_llm.model.hf.config import read_config
from jaxrl_llm.model.hf.load import load
from jaxrl_llm.model.hf.source import resolve as resolve_model
from jaxrl_llm.model.work import matmul_params, weight_products
from jaxrl_llm.parallel import hosts
from jaxrl_llm.parallel.config import resolve
from jaxrl_llm.parallel.layout import TRAIN, Layout
from jaxrl_llm.parallel.mesh import make_mesh
from jaxrl_llm.prompts.stream import Order, make_order
from jaxrl_llm.prompts.task import Task, load_task
from jaxrl_llm.prompts.tokenizer import load_tokenizer
from jaxrl_llm.publish import Publish, make_blank, make_publish
from jaxrl_llm.rewards.graders import problems as grader_problems
from jaxrl_llm.rollout.engine import Engine
from jaxrl_llm.rollout.sample import Vocabulary
from jaxrl_llm.types import Batch, Experience, Policy, Prompts, PyTree, Rollouts, TrainState
from jaxrl_llm.update.config import (
    Correction,
    CrossEntropy,
    LossConfig,
    NoCorrection,
    OptimizerConfig,
    PolicyGradient,
    SecondMoment,
)
from jaxrl_llm.update.config import resolve as resolve_correction
from jaxrl_llm.update.losses import anchored_on_proximal
from jaxrl_llm.update.step import Update, make_optimizer, make_score, make_start, make_update, state_shardings


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
    """Of what RL trains: with the critic, if there is one."""
    engine: Engine
    correction: Correction
    """Of the sampler's arithmetic, `auto` resolved."""
    publish: Publish
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
        """The ratio is to the trainer's parameters before the first update on a batch, not to what was captured while sampling."""
        loss = self.cfg.objective.loss
        return isinstance(loss, PolicyGradient) and anchored_on_proximal(loss, self.correction)

    @property
    def scores_proximal(self) -> bool:
        """A batch is scored once before its first update; where that is the only one, the update does it itself."""
        return isinstance(self.correction, SecondMoment) or (self.anchored_on_proximal and self.cfg.update.updates > 1)

    def put_batch(self, batch: Batch) -> Batch:
        return hosts.put(batch, self.train.sharding(("rows", None)))


COUNTERS = ("step", "cursor", "num_tokens", "alarm", "nonfinite", "eval_before")


@dataclass(frozen=True)
class Life:
    """Everything a resume needs; `tree` and `revive` are the way into a checkpoint and back."""

    step: int
    """Steps done, warm start included."""
    cursor: int
    """Prompts taken from the stream."""
    num_tokens: int
    """Completion tokens sampled so far."""
    alarm: int
    """Stale updates in a row whose ratios were all exactly 1."""
    nonfinite: int
    """Steps of RL in a row of which no update was finite."""
    eval_before: float
    """Held-out accuracy before RL (`evaluate.headline`); NaN until measured."""
    began: bool
    """RL has: the state holds what it trains, and its optimizer's."""
    state: TrainState
    reference: PyTree | None
    """Parameters at the start of RL, where the loss has a KL term."""
    replay: Replay | None

    def tree(self, key: Key[Array, ""]) -> PyTree:
        counters = {name: np.asarray(getattr(self, name)) for name in COUNTERS}
        device = {"state": self.state, "reference": self.reference, "replay": self.replay}
        return (
            counters
            | {"key": np.asarray(jax.random.key_data(key))}
            | {n: v for n, v in device.items() if v is not None}
        )

    @staticmethod
    def revive(tree: PyTree, meta: dict[str, Any]) -> "Life":
        return Life(
            step=int(tree["step"]),
            cursor=int(tree["cursor"]),
            num_tokens=int(tree["num_tokens"]),
            alarm=int(tree["alarm"]),
            nonfinite=int(tree["nonfinite"]),
            eval_before=float(tree["eval_before"]),
            began=meta["began"],
            state=tree["state"],
            reference=tree.get("reference"),
            replay=tree.get("replay"),
        )


def build(cfg: RunConfig) -> Run:
    """Raises UserError with everything that does not fit, before anything compiles."""
    model = read_model(cfg)
    task = load_task(cfg.task, load_tokenizer(cfg.tokenizer), cfg.seed)
    if found := problems(dataclasses.replace(cfg, model=model), task):
        raise UserError("\n".join(found))
    mesh = make_mesh(resolve(cfg.mesh, jax.device_count())[0])
    train = Layout(mesh, TRAIN)
    decode = train.for_decode(cfg.rollout.engine.layout)
    weights = cfg.rollout.engine.weights
    correction = correction_of(cfg)
    vocab = Vocabulary(size=task.num_tokens, pad=task.pad, eos=task.eos)
    specs = model_params.specs(model)
    learner_specs = specs | (critic_specs(model, cfg.objective.critic.kind) if cfg.objective.has_critic else {})
    shapes = shapes_of(cfg, task, train.size("rows"))
    how = Whole(cfg.update.attention, cfg.update.remat)
    scoring = {"num_tokens": task.num_tokens, "cfg": model, "layout": train, "ends": task.eos, "how": how}

    def update(specs: PyTree, loss: LossConfig, optimizer: OptimizerConfig, micro_batches: int) -> Update:
        return make_update(specs, loss, optimizer, correction=correction, micro_batches=micro_batches, **scoring)

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
        engine=Engine(cfg.rollout, task.prompt_slots, vocab, model, decode, task.tokenizer.decode),
        correction=correction,
        publish=make_publish(model, train, decode, weights),
        shapes=shapes,
        score=make_score(**scoring),
        score_experience=make_score(**scoring, parts=shapes.experience.parts),
        warm_update=update(specs, CrossEntropy(), cfg.warm_start.optimizer, 1),
        update=update(learner_specs, cfg.objective.loss, cfg.update.optimizer, cfg.update.micro_batches),
        key=key,
        eval_key=eval_key,
    )


def correction_of(cfg: RunConfig) -> Correction:
    """`auto` resolved; none where the loss knows no correction."""
    loss, engine = cfg.objective.loss, cfg.rollout.engine
    return (
        resolve_correction(loss.correction, engine.weights, engine.cache)
        if isinstance(loss, PolicyGradient)
        else NoCorrection()
    )


def shapes_of(cfg: RunConfig, task: Task, shards: int) -> Shapes:
    prompts, samples, packing, update = cfg.rollout.prompts, cfg.rollout.samples, cfg.update.packing, cfg.update
    sizes = task.prompt_slots, cfg.rollout.max_new_tokens

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


def read_model(cfg: RunConfig) -> ModelConfig:
    """The model's numbers; those of a pretrained one stand in its own config.json."""
    if isinstance(cfg.model, ModelConfig):
        return cfg.model
    return read_config(resolve_model(cfg.model.path), cfg.model.compute)


def problems(cfg: RunConfig, task: Task) -> list[str]:
    """What does not fit between config, devices and task, in words."""
    found = run_config.problems(cfg, jax.device_count()) + grader_problems(cfg.reward)
    found += quantised.problems(cfg.model, cfg.rollout.engine.weights)
    if cfg.model.vocab_size < task.num_tokens:
        found.append(f"model.vocab_size: got {cfg.model.vocab_size}, want at least the tokenizer's {task.num_tokens}")
    if cfg.rollout.max_new_tokens < task.target_slots:
        found.append(
            f"rollout.max_new_tokens: got {cfg.rollout.max_new_tokens}, want at least the {task.target_slots} tokens of the "
            "longest right response"
        )
    return found


def fresh_state(run: Run, params: PyTree, updates: int, began: bool) -> TrainState:
    """A TrainState around the policy's `params`, which are donated, with empty moments and a critic that knows nothing where RL
    trains one."""
    cfg, critic = run.cfg, run.cfg.objective.critic.kind

    def grown(params: PyTree) -> PyTree:
        return params | (critic_start(params, run.model, critic) if began and cfg.objective.has_critic else {})

    optimizer = make_optimizer(cfg.update.optimizer if began else cfg.warm_start.optimizer)
    start = make_start(run.learner_specs if began else run.specs, optimizer, run.train, grown)
    return start(params, hosts.put(np.int32(updates), run.train.replicated))


def begin(run: Run) -> Life:
    """A life from the seed."""
    state = fresh_state(run, start_params(run), 0, began=False)
    return Life(0, 0, 0, 0, 0, float("nan"), False, state, None, _empty_replay(run))


def start_params(run: Run) -> PyTree:
    """f32 masters in the TRAIN layout: read from the pretrained model's files, or drawn from the seed."""
    if isinstance(run.cfg.model, ModelConfig):
        return model_params.init(run.specs, jax.random.fold_in(run.key, 2**31 - 1), run.train)
    return load(resolve_model(run.cfg.model.path), run.specs, run.train, jnp.float32)


def start_reference(run: Run, params: PyTree) -> PyTree:
    """The reference at the start of RL: a copy of the policy's parameters, or another model's."""
    cfg = run.cfg.objective.reference
    if cfg.kind != "pretrained":
        return jax.tree.map(jnp.copy, params)
    directory = resolve_model(cfg.path)
    if read_config(directory, run.model.compute) != run.model:
        raise UserError(
            f"objective.reference.path: got {cfg.path}, whose config.json describes another shape of model; want the policy's own"
        )
    return load(directory, run.specs, run.train, jnp.float32)


def _empty_replay(run: Run) -> Replay | None:
    capacity = run.cfg.experience.replay.capacity
    return empty(_experience_shape(run), capacity) if capacity else None


def _experience_shape(run: Run) -> Experience:
    rollout = run.cfg.rollout
    p, b, c = rollout.prompts, rollout.prompts * rollout.samples, rollout.max_new_tokens
    i32, f32 = np.int32, np.float32
    prompts = Prompts(np.zeros((p, run.task.prompt_slots), i32), *(np.zeros(p, i32) for _ in range(3)))
    per_token = {"tokens": i32, "sampled": bool, "behavior_logprobs": f32, "entropy": f32, "version": i32}
    support = run.engine.shape.support
    rollouts = Rollouts(
        prompts=prompts,
        length=np.zeros(b, i32),
        temperature=np.zeros(b, f32),
        finish=np.zeros(b, i32),
        support=np.zeros((b, c, support), i32) if support else None,
        raw_logprobs=np.zeros((b, c), f32) if rollout.raw_logprobs else None,
        barred=np.zeros((b, c), bool) if rollout.min_new_tokens else None,
        **{name: np.zeros((b, c), dtype) for name, dtype in per_token.items()},
    )
    return Experience(rollouts, np.zeros(b, f32), np.zeros((b, len(run.cfg.reward.graders)), f32))


def target(run: Run, meta: dict[str, Any]) -> PyTree:
    """What a checkpoint of this run holds: shapes and where they go."""
    began = meta["began"]
    optimizer = make_optimizer(run.cfg.update.optimizer if began else run.cfg.warm_start.optimizer)
    specs = run.learner_specs if began else run.specs
    params = model_params.abstract(specs, run.train)
    shapes = jax.eval_shape(lambda p: TrainState(p, optimizer.init(p), np.zeros((), np.int32)), params)
    state = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        shapes,
        state_shardings(specs, optimizer, run.train),
    )
    reference = model_params.abstract(run.specs, run.train) if began and run.cfg.objective.has_reference else None
    return Life(0, 0, 0, 0, 0, 0.0, began, state, reference, _empty_replay(run)).tree(run.key)


def publish(run: Run, state: TrainState, old: Policy | None) -> Policy:
    """The policy that the state's parameters make; `old` lends its buffers."""
    return run.publish(
        state.params, state.step, old or make_blank(run.model, run.decode, run.cfg.rollout.engine.weights)()
    )


def open_checkpoints(cfg: RunConfig) -> Checkpoints:
    return Checkpoints(Path(cfg.run_dir).resolve() / "checkpoints", keep=cfg.checkpoint.keep)


class Rates(NamedTuple):
    """What one device was measured to do at most, at the shapes of a decode step."""

    bytes_per_s: float
    flops_per_s: float


def decode_rates(run: Run) -> Rates:
    """Of a step with all rows in flight; measured once a process, in about a second."""
    sizes = run.engine.sizes
    return _rates(run.model, sizes.units(sizes.prompts[0]) * sizes.each // sizes.shards, run.decode.size("mlp"))


@cache
def _rates(model: ModelConfig, rows: int, shards: int) -> Rates:
    # The head is left out: with a large vocabulary it would not fit beside the policy.
    (d, packed, _), (heads, _, _), (_, up, _), (down, _, _), _ = weight_products(model)
    shapes = [(d, packed // shards), (heads // shards, d), (d, up // shards), (down // shards, d)]
    nbytes = matmul_params(model) * jnp.dtype(model.compute).itemsize // shards
    return Rates(
        copy_bandwidth(min(nbytes, 2**28), 0.1),
        matmul_rate([("forward", rows, max(k, 1), max(n, 1)) for k, n in shapes], model.compute, 0.1),
    )

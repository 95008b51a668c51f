"""What a run is made of, built once from its config: task, mesh, layouts, and the compiled programs.

`train`, `evaluate` and the command line all start here. Nothing in here loops.
"""

import dataclasses
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxrl_llm import config as run_config
from jaxrl_llm.checkpoint import Checkpoints
from jaxrl_llm.config import RunConfig
from jaxrl_llm.errors import UserError
from jaxrl_llm.experience.replay import Replay, empty
from jaxrl_llm.model import params as model_params
from jaxrl_llm.model import quantised
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.hf.config import read_config
from jaxrl_llm.model.hf.load import load
from jaxrl_llm.model.hf.source import resolve as resolve_model
from jaxrl_llm.parallel import hosts
from jaxrl_llm.parallel.config import resolve
from jaxrl_llm.parallel.layout import DECODE, TRAIN, Layout
from jaxrl_llm.parallel.mesh import make_mesh
from jaxrl_llm.prompts.rows import Row
from jaxrl_llm.prompts.stream import Order, make_order
from jaxrl_llm.prompts.task import Task, load_task
from jaxrl_llm.prompts.tokenizer import load_tokenizer
from jaxrl_llm.publish import Publish, make_blank, make_publish
from jaxrl_llm.rewards.graders import Sample
from jaxrl_llm.rewards.graders import problems as grader_problems
from jaxrl_llm.rewards.pool import GraderPool
from jaxrl_llm.rollout.decode import Generate, Vocabulary, make_generate
from jaxrl_llm.types import Batch, Experience, Finish, Policy, Prompts, PyTree, Rollouts, TrainState
from jaxrl_llm.update.config import Correction, CrossEntropyLoss, LossConfig, NoCorrection, OptimizerConfig
from jaxrl_llm.update.config import resolve as resolve_correction
from jaxrl_llm.update.step import Update, make_optimizer, make_score, make_start, make_update, state_shardings


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
    generate: Generate
    correction: Correction
    """Of the sampler's arithmetic, `auto` resolved."""
    publish: Publish
    score: jax.stages.Wrapped
    warm_update: Update
    update: Update
    key: Key[Array, ""]
    """Sampling in training."""
    eval_key: Key[Array, ""]

    @property
    def scores_proximal(self) -> bool:
        """A batch is scored once before its first update; where that is the only one, the update does it itself."""
        return not isinstance(self.correction, NoCorrection) and self.cfg.update.updates > 1

    @property
    def keeps_reference(self) -> bool:
        return self.cfg.update.loss.kl > 0

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
    def revive(tree: PyTree) -> "Life":
        return Life(
            step=int(tree["step"]),
            cursor=int(tree["cursor"]),
            num_tokens=int(tree["num_tokens"]),
            alarm=int(tree["alarm"]),
            nonfinite=int(tree["nonfinite"]),
            eval_before=float(tree["eval_before"]),
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
    train, decode = Layout(mesh, TRAIN), Layout(mesh, DECODE)
    engine = cfg.rollout.engine
    correction = resolve_correction(cfg.update.correction, engine.weights, engine.cache)
    vocab = Vocabulary(size=task.num_tokens, pad=task.pad, eos=task.eos)
    specs = model_params.specs(model)

    def update(loss: LossConfig, optimizer: OptimizerConfig, micro_batches: int) -> Update:
        return make_update(
            specs, loss, optimizer, correction=correction, normalize=cfg.update.normalize,
            length=cfg.rollout.max_new_tokens, micro_batches=micro_batches, num_tokens=task.num_tokens, cfg=model, layout=train,
        )  # fmt: skip

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
        generate=make_generate(cfg.rollout.samples, cfg.rollout.max_new_tokens, vocab, model, decode),
        correction=correction,
        publish=make_publish(model, train, decode, engine.weights),
        score=make_score(task.num_tokens, model, train),
        warm_update=update(CrossEntropyLoss(), cfg.warm_start.optimizer, 1),
        update=update(cfg.update.loss, cfg.update.optimizer, cfg.update.micro_batches),
        key=key,
        eval_key=eval_key,
    )


def read_model(cfg: RunConfig) -> ModelConfig:
    """The model's numbers; those of a pretrained one stand in its own config.json."""
    if isinstance(cfg.model, ModelConfig):
        return cfg.model
    return read_config(resolve_model(cfg.model.path), cfg.model.compute)


def problems(cfg: RunConfig, task: Task) -> list[str]:
    """What does not fit between config, devices and task, in words."""
    found = run_config.problems(cfg, jax.device_count(), jax.process_count()) + grader_problems(cfg.reward)
    found += quantised.problems(cfg.model, cfg.rollout.engine.weights)
    if cfg.model.vocab_size < task.num_tokens:
        found.append(f"model.vocab_size: got {cfg.model.vocab_size}, want at least the tokenizer's {task.num_tokens}")
    if cfg.rollout.max_new_tokens < task.target_slots:
        found.append(
            f"rollout.max_new_tokens: got {cfg.rollout.max_new_tokens}, want at least the {task.target_slots} tokens of the "
            "longest right response"
        )
    return found


def fresh_optimizer(run: Run, params: PyTree, updates: int) -> TrainState:
    """A TrainState around `params`, which are donated, with empty moments."""
    start = make_start(run.specs, make_optimizer(run.cfg.update.optimizer), run.train)
    return start(params, hosts.put(np.int32(updates), run.train.replicated))


def begin(run: Run) -> Life:
    """A life from the seed."""
    params = start_params(run)
    reference = jax.tree.map(jnp.copy, params) if run.keeps_reference else None
    return Life(0, 0, 0, 0, 0, float("nan"), fresh_optimizer(run, params, 0), reference, _empty_replay(run))


def start_params(run: Run) -> PyTree:
    """f32 masters in the TRAIN layout: read from the pretrained model's files, or drawn from the seed."""
    if isinstance(run.cfg.model, ModelConfig):
        return model_params.init(run.specs, jax.random.fold_in(run.key, 2**31 - 1), run.train)
    return load(resolve_model(run.cfg.model.path), run.specs, run.train, jnp.float32)


def _empty_replay(run: Run) -> Replay | None:
    capacity = run.cfg.experience.replay.capacity
    return empty(_experience_shape(run), capacity) if capacity else None


def _experience_shape(run: Run) -> Experience:
    rollout = run.cfg.rollout
    p, b, c = rollout.prompts, rollout.prompts * rollout.samples, rollout.max_new_tokens
    i32, f32 = np.int32, np.float32
    prompts = Prompts(np.zeros((p, run.task.prompt_slots), i32), *(np.zeros(p, i32) for _ in range(3)))
    per_token = {"tokens": i32, "sampled": bool, "behavior_logprobs": f32, "entropy": f32, "version": i32}
    rollouts = Rollouts(
        prompts=prompts,
        length=np.zeros(b, i32),
        temperature=np.zeros(b, f32),
        finish=np.zeros(b, i32),
        **{name: np.zeros((b, c), dtype) for name, dtype in per_token.items()},
    )
    return Experience(rollouts, np.zeros(b, f32), np.zeros(b, f32))


def target(run: Run) -> PyTree:
    """What a checkpoint of this run holds: shapes and where they go."""
    optimizer = make_optimizer(run.cfg.update.optimizer)
    params = model_params.abstract(run.specs, run.train)
    shapes = jax.eval_shape(lambda p: TrainState(p, optimizer.init(p), np.zeros((), np.int32)), params)
    state = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        shapes,
        state_shardings(run.specs, optimizer, run.train),
    )
    return Life(0, 0, 0, 0, 0, 0.0, state, params if run.keeps_reference else None, _empty_replay(run)).tree(run.key)


def publish(run: Run, state: TrainState, old: Policy | None) -> Policy:
    """The policy that the state's parameters make; `old` lends its buffers."""
    return run.publish(
        state.params, state.step, old or make_blank(run.model, run.decode, run.cfg.rollout.engine.weights)()
    )


def open_checkpoints(cfg: RunConfig) -> Checkpoints:
    return Checkpoints(Path(cfg.run_dir).resolve() / "checkpoints", keep=cfg.checkpoint.keep)


def sample(
    run: Run, policy: Policy, prompts: Prompts, key: Key[Array, ""], temperature: float | None = None
) -> Rollouts:
    """G samples for each prompt at a temperature, the configured one by default, as NumPy, equal on every host."""
    rows = run.decode.sharding(("rows",))
    chosen = run.cfg.rollout.temperature if temperature is None else temperature
    per_prompt = np.full(prompts.length.shape, chosen, np.float32)
    return hosts.gather(run.generate(policy, hosts.put(prompts, rows), key, hosts.put(per_prompt, rows)))


class Grades(NamedTuple):
    """What the graders said of P groups of G responses, as NumPy, equal on every host. NaN where a group failed."""

    reward: Float[np.ndarray, "P G"]
    parts: Float[np.ndarray, "n P G"]
    """What each of the n graders gave, before weights."""
    failure: Int[np.ndarray, " P"]
    """A `Failure` each."""
    failed_by: Int[np.ndarray, " P"]
    """Which grader failed, -1 where none did."""
    vote: Int[np.ndarray, "P G"]
    """A number for each final answer, equal for equal ones; 0 where there is none."""


def grade(run: Run, pool: GraderPool, rows: tuple[Row, ...], rollouts: Rollouts) -> Grades:
    """Grades of rollouts whose prompts are among `rows`; each host grades its share of the groups."""
    group_size = run.cfg.rollout.samples
    texts = run.task.decode(rollouts.tokens, rollouts.length)

    def sample_of(row: Row, b: int) -> Sample:
        finish = Finish(rollouts.finish[b]).name.lower()
        return Sample(row.prompt, texts[b], row.answer, finish, row.columns, int(rollouts.length[b]))

    def work(part: slice) -> tuple[np.ndarray, ...]:
        groups = []
        for p, index in list(enumerate(rollouts.prompts.row))[part]:
            groups.append([sample_of(rows[index], b) for b in range(p * group_size, (p + 1) * group_size)])
        graded = pool.grade(groups)
        vote = [
            [(zlib.crc32(answer.encode()) >> 1 or 1) if answer else 0 for answer in group] for group in graded.votes
        ]
        return (
            graded.reward, graded.parts.swapaxes(0, 1), graded.failure, graded.failed_by,
            np.array(vote, np.int32).reshape(graded.reward.shape),
        )  # fmt: skip

    reward, parts, failure, failed_by, vote = hosts.share_out(len(rollouts.prompts.row), work)
    return Grades(reward, parts.swapaxes(0, 1), failure, failed_by, vote)

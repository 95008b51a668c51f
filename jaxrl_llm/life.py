"""What a run is at a moment: all that a resume needs, how it starts, and what of it a checkpoint holds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from jaxrl_llm.checkpoint import Checkpoints
from jaxrl_llm.config import RunConfig
from jaxrl_llm.errors import UserError
from jaxrl_llm.experience.replay import blank_groups
from jaxrl_llm.guards import Guards
from jaxrl_llm.model import lora
from jaxrl_llm.model import params as model_params
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.critic import critic_start
from jaxrl_llm.model.hf.config import read_config
from jaxrl_llm.model.hf.load import load
from jaxrl_llm.model.hf.source import resolve as resolve_model
from jaxrl_llm.parallel import hosts
from jaxrl_llm.run import Run, uses_of
from jaxrl_llm.types import PyTree, TrainState
from jaxrl_llm.update.optimizer.state import abstract_state, make_start
from jaxrl_llm.update.optimizer.transform import make_optimizer

COUNTERS = ("step", "cursor", "num_tokens", "alarm", "eval_before")


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
    eval_before: float
    """Held-out accuracy before RL (`evaluate.headline`); NaN until measured."""
    began: bool
    """RL has: the state holds what it trains, and its optimizer's."""
    guards: Guards
    state: TrainState
    reference: PyTree | None
    """Parameters at the start of RL, where the objective reads them; of a policy with adapters these alone."""
    replay: PyTree

    def tree(self, key: Key[Array, ""]) -> PyTree:
        counters = {name: np.asarray(getattr(self, name)) for name in COUNTERS}
        device = {"state": self.state, "reference": self.reference, "replay": self.replay}
        return (
            counters
            | {"guards": {name: np.asarray(x, np.int32) for name, x in vars(self.guards).items()}}
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
            eval_before=float(tree["eval_before"]),
            began=meta["began"],
            guards=Guards(
                **{
                    name: tuple(map(int, x)) if name == "zero_gradient" else int(x)
                    for name, x in tree["guards"].items()
                }
            ),
            state=tree["state"],
            reference=tree.get("reference"),
            replay=tree["replay"],
        )


def fresh_state(run: Run, params: PyTree, updates: int, began: bool) -> TrainState:
    """A TrainState around the policy's `params`, which are donated, with empty moments; where RL trains them, with adapters that
    change nothing and a critic that knows nothing."""
    cfg, critic = run.cfg, run.cfg.objective.critic.kind
    specs = run.learner_specs if began else run.specs

    def grown(params: PyTree) -> PyTree:
        key = jax.random.fold_in(run.key, 2**31 - 2)
        policy = lora.adapt(params, model_params.policy_part(specs, run.model), key, run.train)
        return policy | (critic_start(params, run.model, critic) if began and cfg.objective.has_critic else {})

    optimizer = make_optimizer(run.optimizer if began else cfg.warm_start.optimizer)
    start = make_start(specs, optimizer, run.train, grown)
    return start(params, hosts.put(np.int32(updates), run.train.replicated))


def begin(run: Run) -> Life:
    """A life from the seed."""
    state = TrainState(start_params(run), (), hosts.put(np.int32(0), run.train.replicated))
    if run.cfg.warm_start.steps:
        # Else RL comes first, with an optimizer of its own: moments of all parameters may not fit where those of adapters do.
        state = fresh_state(run, state.params, 0, began=False)
    return Life(0, 0, 0, 0, float("nan"), False, no_streaks(run), state, None, _empty_replay(run))


def no_streaks(run: Run) -> Guards:
    return Guards(
        zero_gradient=(0,) * len(jax.tree.leaves(lora.split(run.learner_specs)[0], is_leaf=model_params.is_spec))
    )


def start_params(run: Run) -> PyTree:
    """Masters in the TRAIN layout, read from the pretrained model or drawn from the seed; f32, but for what stays frozen."""
    if isinstance(run.cfg.model, ModelConfig):
        return model_params.init(run.specs, jax.random.fold_in(run.key, 2**31 - 1), run.train)
    frozen = run.cfg.lora.rank and not run.cfg.warm_start.steps
    return load(
        resolve_model(run.cfg.model.path), run.specs, run.train, jnp.dtype(run.model.compute if frozen else "float32")
    )


def start_reference(run: Run, params: PyTree) -> PyTree:
    """The reference at the start of RL: a copy of what is trained of the policy's parameters, or another model's."""
    cfg = run.cfg.objective.reference
    if cfg.kind != "pretrained":
        return jax.tree.map(jnp.copy, trained_policy(run, params))
    directory = resolve_model(cfg.path)
    if read_config(directory, run.model.compute) != run.model:
        raise UserError(
            f"objective.reference.path: got {cfg.path}, whose config.json describes another shape of model; want the policy's own"
        )
    return load(directory, run.specs, run.train, jnp.float32)


def trained_policy(run: Run, params: PyTree) -> PyTree:
    """What RL changes of the policy, for arrays and specs alike: all of it, or its adapters."""
    return lora.split(model_params.policy_part(params, run.model))[0]


def _empty_replay(run: Run) -> PyTree:
    rollout, slots = run.cfg.rollout, (run.task.prompt_slots, run.cfg.rollout.max_new_tokens)
    graders, support = len(run.cfg.reward.graders), run.engine.shape.support
    blank = blank_groups(rollout.prompts, rollout.samples, slots, graders, uses_of(run.cfg), support)
    return run.replay.init(blank)


def target(run: Run, meta: dict[str, Any]) -> PyTree:
    """What a checkpoint of this run holds: shapes and where they go."""
    began = meta["began"]
    optimizer = make_optimizer(run.optimizer if began else run.cfg.warm_start.optimizer)
    specs = run.learner_specs if began else run.specs
    state = abstract_state(specs, optimizer, run.train)
    whole = run.cfg.objective.reference.kind == "pretrained"
    reference = model_params.abstract(run.specs if whole else trained_policy(run, specs), run.train)
    reference = reference if began and run.cfg.objective.has_reference else None
    return Life(0, 0, 0, 0, 0.0, began, no_streaks(run), state, reference, _empty_replay(run)).tree(run.key)


def open_checkpoints(cfg: RunConfig) -> Checkpoints:
    return Checkpoints(Path(cfg.run_dir).resolve() / "checkpoints", keep=cfg.checkpoint.keep)

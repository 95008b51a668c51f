"""Groups, prompts and tasks of a few numbers, for roles that are tested without a model."""

from types import SimpleNamespace

import jax
import numpy as np

from jaxrl_llm.config.loading import validate
from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.environments.grader_pool import Failure
from jaxrl_llm.experience.replay import blank_groups
from jaxrl_llm.metrics.guards import Guards
from jaxrl_llm.roles.blueprint import Blueprint, make_blueprint
from jaxrl_llm.roles.state import RunState
from jaxrl_llm.rollout.sample import Vocabulary
from jaxrl_llm.tasks.config import ArithmeticTask, CharacterTokenizer
from jaxrl_llm.tasks.task import Task, load_task
from jaxrl_llm.tasks.tokenizer import load_tokenizer
from jaxrl_llm.types import Groups, TrainState

PROMPT_SLOTS, SLOTS = 3, 2

MODEL = {"vocab_size": 16, "layers": 2, "d_model": 16, "heads": 4, "kv_heads": 2, "head_dim": 8, "d_mlp": 16}
VALUES = {
    "task": {"kind": "arithmetic", "terms": 2, "held_out": 8},
    "model": MODEL,
    "rollout": {"prompts": 8, "samples": 4, "max_new_tokens": 6},
    "reward": "exact_match",
}


def config(**changes: object) -> RunConfig:
    return validate(VALUES | changes, "test")


def blueprint(**changes: object) -> Blueprint:
    """Blueprint on one device, with prompts of 5 slots."""
    cfg = config(**changes)
    return make_blueprint(cfg, cfg.model, Vocabulary(16, 0, (15,)), 5, jax.devices()[:1])


def sums(held_out: int = 3) -> Task:
    """Sums of two digits: 100 rows, of which `held_out` are held out."""
    return load_task(ArithmeticTask(terms=2, held_out=held_out), load_tokenizer(CharacterTokenizer()), 0)


def groups_of(reward: np.ndarray, length: np.ndarray | None = None, version: int = 0) -> Groups:
    """Graded groups [P G]: prompts of one token, row b holds the token b + 1 in each slot; NaN: not graded, and not kept."""
    blank = blank_groups(*reward.shape, (PROMPT_SLOTS, SLOTS), 1, (), 0)
    prompts, rows = len(reward), reward.size
    length = np.full(rows, SLOTS, np.int32) if length is None else np.asarray(length, np.int32)
    sampled = np.arange(SLOTS) < length[:, None]
    index = np.arange(prompts, dtype=np.int32)
    asked = blank.rollouts.prompts.replace(
        tokens=np.tile(np.int32([9, 0, 0]), (prompts, 1)), length=np.ones(prompts, np.int32), uid=index, row=index
    )
    rollouts = blank.rollouts.replace(
        prompts=asked,
        tokens=np.where(sampled, np.arange(1, rows + 1, dtype=np.int32)[:, None], 0).astype(np.int32),
        length=length,
        sampled=sampled,
        temperature=np.ones(rows, np.float32),
        version=np.where(sampled, version, 0).astype(np.int32),
    )
    lost = np.isnan(reward).any(axis=1)
    return blank.replace(
        rollouts=rollouts,
        reward=reward.reshape(-1).astype(np.float32),
        components=reward.reshape(-1, 1).astype(np.float32),
        failure=np.where(lost, Failure.RAISED, Failure.NONE).astype(np.int32),
        failed_by=np.where(lost, 0, -1).astype(np.int32),
        keep=np.repeat(~lost, reward.shape[1]),
    )


def state_of(**changes: object) -> RunState:
    """State of a run after five steps with seven updates."""
    train = TrainState({"w": np.float32(1)}, (), np.int32(7))
    base = RunState(
        step=np.array(5), eval_before=np.array(0.25), train=train, reference=None,
        source=(), filters=(), replay=(), guards=Guards(),
    )  # fmt: skip
    return base._replace(**changes)


class Calls(list):
    """Functions that record their arguments, by name, and return given values."""

    def of(self, name: str, gives: object):
        def function(*args: object) -> object:
            self.append(SimpleNamespace(name=name, args=args))
            return gives

        return function

    @property
    def names(self) -> list[str]:
        return [call.name for call in self]

    def args(self, name: str) -> tuple:
        """Arguments of the only call of that name."""
        [call] = [call for call in self if call.name == name]
        return call.args

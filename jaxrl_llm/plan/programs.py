"""The programs of a step, traced from shapes and compiled without a device: no array is made, nothing runs."""

import dataclasses
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax

from jaxrl_llm.config import run_config
from jaxrl_llm.config.own_part import own_problems
from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.distribution.head import ACCELERATOR
from jaxrl_llm.errors import UserError
from jaxrl_llm.metrics.console import shown_on_stderr
from jaxrl_llm.model import lora
from jaxrl_llm.model import params as model_params
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.publish import abstract_policy, make_publish
from jaxrl_llm.perf.hlo import Module
from jaxrl_llm.plan.traffic import Reading, read
from jaxrl_llm.roles.blueprint import Blueprint, device_problems, make_blueprint, uses_of
from jaxrl_llm.roles.sources import packing_problems, vocabulary_problems
from jaxrl_llm.rollout.engine import Engine
from jaxrl_llm.rollout.sample import Vocabulary
from jaxrl_llm.tasks.config import CharacterTokenizer
from jaxrl_llm.tasks.tokenizer import load_tokenizer
from jaxrl_llm.types import Batch, Policy, PyTree, TrainState
from jaxrl_llm.update.batch import abstract_batch
from jaxrl_llm.update.optimizer.state import abstract_state
from jaxrl_llm.update.step import make_update

Lower = Callable[[], jax.stages.Lowered]
# How libtpu says that a program does not fit.
_USED = re.compile(r"Used ([\d.]+)([KMG])|required for HLO temporaries \(([\d.]+)([KMG])\)")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True)
class Job(Blueprint):
    """A run as shapes on devices that need not exist."""

    engine: Engine
    state: TrainState
    reference: PyTree | None
    policy: Policy
    batch: Batch
    """Of one update."""

    @property
    def waits(self) -> bool:
        """Some prompts of a step are read while others are in flight."""
        return self.cfg.rollout.prompts > self.engine.sizes.prompts[0]

    @property
    def flight(self) -> tuple[int, int, int]:
        """Prompts and units at most in flight, and their widest window."""
        sizes = self.engine.sizes
        return sizes.prompts[0], sizes.units(sizes.prompts[0]), sizes.windows[-1]


class Program(NamedTuple):
    """What the compiler made of one: bytes of one chip, collectives, its estimate."""

    arguments: int
    outputs: int
    temporaries: int
    aliased: int
    reading: Reading
    compile_seconds: float
    refused: str = ""
    """`temporaries` or `all`: the compiler would not, for these need more than the chip has. `temporaries` holds what it named."""

    @property
    def passed(self) -> int:
        """Bytes of arguments and outputs, donated ones once."""
        return self.arguments + self.outputs - self.aliased


def problems(cfg: RunConfig, model: ModelConfig, prompt_slots: int, devices: Sequence[jax.Device]) -> list[str]:
    """What cannot work on these devices, in words."""
    whole = dataclasses.replace(cfg, model=model)
    return (
        run_config.problems(whole, len(devices))
        + device_problems(cfg, model, prompt_slots, devices)
        + lora.problems(model, cfg.lora)
        + vocabulary_problems(model, vocabulary(cfg, model).size)
        + packing_problems(cfg, prompt_slots)
        + own_problems(cfg)
    )


def vocabulary(cfg: RunConfig, model: ModelConfig) -> Vocabulary:
    """What may be drawn: the tokens of an alphabet, which stands in the config; of a tokenizer that is not read, the model's."""
    if isinstance(cfg.tokenizer, CharacterTokenizer):
        tokenizer = load_tokenizer(cfg.tokenizer)
        return Vocabulary(tokenizer.size, tokenizer.pad, tokenizer.eos)
    return Vocabulary(model.vocab_size, pad=0, eos=(1,))


def make_job(cfg: RunConfig, model: ModelConfig, prompt_slots: int, devices: Sequence[jax.Device]) -> Job:
    """Raises UserError with everything that does not fit together."""
    if found := problems(cfg, model, prompt_slots, devices):
        raise UserError("\n".join(found))
    return describe(make_blueprint(cfg, model, vocabulary(cfg, model), prompt_slots, devices))


def describe(blueprint: Blueprint) -> Job:
    """Of a config that `problems` has nothing against."""
    engine, train, specs = blueprint.make_engine(), blueprint.train, blueprint.reference_specs
    return Job(
        **{field.name: getattr(blueprint, field.name) for field in dataclasses.fields(Blueprint)},
        engine=engine,
        state=abstract_state(blueprint.learner_specs, blueprint.optimizer, train),
        reference=None if specs is None else model_params.abstract(specs, train),
        policy=abstract_policy(blueprint.model, blueprint.decode, blueprint.cfg.rollout.engine.weights),
        batch=_batch(blueprint, engine),
    )


def with_micro_batches(job: Job, parts: int) -> Job:
    """The same with another number of micro-batches: all else stays."""
    cfg = dataclasses.replace(job.cfg, update=dataclasses.replace(job.cfg.update, micro_batches=parts))
    fewer = dataclasses.replace(job, cfg=cfg)
    return dataclasses.replace(fewer, batch=_batch(fewer, job.engine))


def _batch(blueprint: Blueprint, engine: Engine) -> Batch:
    """Of one update: the rows of a minibatch at their longest."""
    max_kept_tokens, own = engine.decoding.max_kept_tokens, blueprint.loss.own
    return abstract_batch(blueprint.shapes.update, uses_of(blueprint.cfg), max_kept_tokens, own, blueprint.train)


def lowerings(job: Job) -> dict[str, Lower]:
    """The programs that a step holds most memory in, each a function that traces it."""
    cfg, model = job.cfg, job.model
    prompts, units, window = job.flight
    policy, masters = job.policy, model_params.policy_part(job.state.params, model)
    of_rollouts = {"prefill": (prompts, job.prompt_slots), "segment": (units, window)}
    if len(job.engine.sizes.windows) > 1:
        of_rollouts["grow"] = (units, *job.engine.sizes.windows[-2:])
    lower = {
        name: partial(job.engine.programs.lower, policy.params, name, *sizes) for name, sizes in of_rollouts.items()
    }
    publish = make_publish(model, job.train, job.decode, cfg.rollout.engine.weights)
    update = make_update(
        job.learner_specs, job.loss, job.optimizer, job.scoring, micro_batches=cfg.update.micro_batches
    )
    whole = job.reference if cfg.objective.reads_reference_distribution else None
    return lower | {
        "publish": lambda: publish.lower(masters, policy.version, policy),
        "update": lambda: update.lower(job.state, job.batch, whole),
    }


def compile_all(job: Job) -> dict[str, Program]:
    """All of them, several at a time: the compiler runs beside Python."""
    lowered = {name: lower() for name, lower in lowerings(job).items()}
    # Those that take longest first.
    order = sorted(lowered, key=("segment", "update", "prefill", "publish", "grow").index)
    with shown_on_stderr(f"compiling {', '.join(order)}"), ThreadPoolExecutor(os.cpu_count()) as threads:
        found = threads.map(lambda name: compile_one(lowered[name], turns_of(job, name)), order)
        return dict(zip(order, found, strict=True))


def turns_of(job: Job, name: str) -> tuple[int, int]:
    """Turns of a program's outermost loop, at most: looks at whether rows live, or micro-batches. And of inner ones whose turns
    depend on the batch: chunks of tokens in the head, all of them learned from."""
    if name == "segment":
        return job.engine.decoding.steps // job.engine.decoding.interval, 1
    if name != "update":
        return 1, 1
    parts, (rows, slots) = job.cfg.update.micro_batches, job.batch.tokens.shape
    return parts, -(-(rows // parts // job.train.size("rows") * slots) // ACCELERATOR.tokens)


def compile_one(lowered: jax.stages.Lowered, turns: tuple[int, int]) -> Program:
    start = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _refused(str(error), time.monotonic() - start)
    memory = compiled.memory_analysis()
    seconds = time.monotonic() - start
    return Program(
        memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes, memory.alias_size_in_bytes,
        read(Module(compiled.as_text()), *turns), round(seconds, 1),
    )  # fmt: skip


def _refused(message: str, seconds: float) -> Program:
    """With the bytes that the message names, of temporaries or of everything."""
    used, used_unit, temporaries, unit = (
        _USED.search(message).groups() if _USED.search(message) else (None, "", "0", "K")
    )
    bytes_ = int(float(used or temporaries) * _UNITS[used_unit or unit])
    return Program(0, 0, bytes_, 0, Reading((), 0, 0), round(seconds, 1), "all" if used else "temporaries")

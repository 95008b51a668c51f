"""The programs of a step, lowered from abstract arrays and compiled without a device."""

import dataclasses
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax

from jaxrl_llm.config import consistency
from jaxrl_llm.config.own_part import own_problems
from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.distribution.head import ACCELERATOR
from jaxrl_llm.errors import UserError
from jaxrl_llm.metrics.console import shown_on_stderr
from jaxrl_llm.model import lora
from jaxrl_llm.model import params as model_params
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.publish import jit_publish
from jaxrl_llm.perf.hlo import HloModule
from jaxrl_llm.plan.traffic import ProgramCost, read_cost
from jaxrl_llm.roles.abstract_run import AbstractRun, make_abstract_run
from jaxrl_llm.roles.blueprint import device_problems, make_blueprint
from jaxrl_llm.roles.inputs import packing_problems, vocabulary_problems
from jaxrl_llm.rollout.sample import Vocabulary
from jaxrl_llm.tasks.config import CharacterTokenizer
from jaxrl_llm.tasks.tokenizer import load_tokenizer
from jaxrl_llm.update.step import jit_update

Lower = Callable[[], jax.stages.Lowered]
# Messages of libtpu for programs that do not fit.
_USED = re.compile(r"Used ([\d.]+)([KMG])|required for HLO temporaries \(([\d.]+)([KMG])\)")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


class CompiledProgram(NamedTuple):
    """Memory in bytes per chip, collectives and estimated cycles of a compiled program."""

    arguments: int
    outputs: int
    temporaries: int
    aliased: int
    cost: ProgramCost
    compile_seconds: float
    refused: str = ""
    """`temporaries` or `all`: what exceeds the chip's memory according to the compiler's error; the field `temporaries` has the
    bytes that it names. "": compiled."""

    @property
    def passed(self) -> int:
        """Bytes of arguments and outputs, donated buffers counted once."""
        return self.arguments + self.outputs - self.aliased


def problems(cfg: RunConfig, model: ModelConfig, prompt_slots: int, devices: Sequence[jax.Device]) -> list[str]:
    """Errors in a config for these devices, as messages.

    Args:
        cfg: The config.
        model: The config of its model, also if it is pretrained.
        prompt_slots: Tokens of the longest prompt.
        devices: Devices of the plan, real or of a topology.
    """
    whole = dataclasses.replace(cfg, model=model)
    return (
        consistency.problems(whole, len(devices))
        + device_problems(cfg, model, prompt_slots, devices)
        + lora.problems(model, cfg.lora)
        + vocabulary_problems(model, vocabulary(cfg, model).size)
        + packing_problems(cfg, prompt_slots)
        + own_problems(cfg)
    )


def vocabulary(cfg: RunConfig, model: ModelConfig) -> Vocabulary:
    """Vocabulary to sample from: the alphabet in the config, else the model's, since plan reads no other tokenizer."""
    if isinstance(cfg.tokenizer, CharacterTokenizer):
        tokenizer = load_tokenizer(cfg.tokenizer)
        return Vocabulary(tokenizer.size, tokenizer.pad, tokenizer.eos)
    return Vocabulary(model.vocab_size, pad=0, eos=(1,))


def make_checked_run(
    cfg: RunConfig, model: ModelConfig, prompt_slots: int, devices: Sequence[jax.Device]
) -> AbstractRun:
    """Return the abstract arrays of a config. Raises UserError with all `problems`.

    Args:
        cfg: The config.
        model: The config of its model, also if it is pretrained.
        prompt_slots: Tokens of the longest prompt.
        devices: Devices of the plan, real or of a topology.
    """
    if found := problems(cfg, model, prompt_slots, devices):
        raise UserError("\n".join(found))
    return make_abstract_run(make_blueprint(cfg, model, vocabulary(cfg, model), prompt_slots, devices))


def lowerings(run: AbstractRun) -> dict[str, Lower]:
    """Functions that lower the programs with the largest memory, by name."""
    cfg, model = run.cfg, run.model
    prompts, groups, window = run.capacity
    policy, masters = run.policy, model_params.policy_params(run.state.params, model)
    sizes_of = {"prefill": (prompts, run.prompt_slots), "decode_chunk": (groups, window)}
    if len(run.engine.sizes.windows) > 1:
        sizes_of["extend_suffix"] = (groups, *run.engine.sizes.windows[-2:])
    lower = {name: partial(run.engine.programs.lower, policy.params, name, *sizes) for name, sizes in sizes_of.items()}
    publish = jit_publish(model, run.train, run.decode, cfg.rollout.engine.weights)
    update = jit_update(
        run.learner_specs, run.loss, run.optimizer, run.scoring,
        micro_batches=cfg.update.micro_batches, ess_scaling=cfg.update.ess_scaling,
    )  # fmt: skip
    reference = run.reference if cfg.objective.reads_reference_distribution else None
    return lower | {
        "publish": lambda: publish.lower(masters, policy.version, policy),
        "update": lambda: update.lower(run.state, run.batch, reference, run.abstract_tables),
    }


def compile_all(run: AbstractRun) -> dict[str, CompiledProgram]:
    """Compile all programs of a step, in parallel threads."""
    try:
        lowered = {name: lower() for name, lower in lowerings(run).items()}
    except RuntimeError as error:
        if "cuDNN not found" not in str(error):
            raise
        raise UserError(
            "update.attention: got cudnn, whose library is not installed: pip install nvidia-cudnn-cu12, or another attention"
        ) from None
    # Longest compilations first.
    order = sorted(lowered, key=("decode_chunk", "update", "prefill", "publish", "extend_suffix").index)
    with shown_on_stderr(f"compiling {', '.join(order)}"), ThreadPoolExecutor(os.cpu_count()) as threads:
        hosts = hosts_of(run)
        found = threads.map(lambda name: compile_program(lowered[name], trip_counts(run, name), hosts), order)
        return dict(zip(order, found, strict=True))


def trip_counts(run: AbstractRun, name: str) -> tuple[int, int]:
    """Trip counts to assume for loops without a static one.

    Returns:
        Maximum of the outermost loop (checks for unfinished rows, or micro-batches), and of inner loops that depend on the batch
        (chunks of tokens in the head, if the loss uses all tokens).
    """
    if name == "decode_chunk":
        return run.engine.decoding.steps // run.engine.decoding.interval, 1
    if name != "update":
        return 1, 1
    parts, (rows, slots) = run.cfg.update.micro_batches, run.batch.tokens.shape
    return parts, -(-(rows // parts // run.train.size("rows") * slots) // ACCELERATOR.tokens)


def hosts_of(run: AbstractRun) -> list[int]:
    """Return the number of the host of each GPU, in the order of the mesh; [] for other devices."""
    devices = list(run.train.mesh.devices.flat)
    return [d.process_index for d in devices] if run.train.on_gpu else []


def compile_program(lowered: jax.stages.Lowered, trips: tuple[int, int], hosts: Sequence[int]) -> CompiledProgram:
    """Compile a program; `trips` are those of `trip_counts`, `hosts` those of `hosts_of`."""
    start = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _refused(str(error), time.monotonic() - start)
    memory = compiled.memory_analysis()
    seconds = time.monotonic() - start
    return CompiledProgram(
        memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes, memory.alias_size_in_bytes,
        read_cost(HloModule(compiled.as_text()), *trips, hosts), round(seconds, 1),
    )  # fmt: skip


def _refused(message: str, seconds: float) -> CompiledProgram:
    """The result for a program that does not fit, with the bytes that the message names."""
    used, used_unit, temporaries, unit = (
        _USED.search(message).groups() if _USED.search(message) else (None, "", "0", "K")
    )
    bytes_ = int(float(used or temporaries) * _UNITS[used_unit or unit])
    return CompiledProgram(0, 0, bytes_, 0, ProgramCost((), 0, 0), round(seconds, 1), "all" if used else "temporaries")

"""Looking at a policy from outside: responses to one prompt, its score on a task, and its files for other libraries."""

import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.environments.grader_pool import GraderPool
from jaxrl_llm.errors import CheckpointError, UserError
from jaxrl_llm.metrics.console import shown_on_stderr
from jaxrl_llm.metrics.estimates import Estimate, avg_at_k, maj_at_k, pass_at_k
from jaxrl_llm.metrics.terminal import printable
from jaxrl_llm.model import lora
from jaxrl_llm.model.config import PretrainedModel
from jaxrl_llm.model.hf.config import read_json
from jaxrl_llm.model.hf.export import ConfigFiles, export
from jaxrl_llm.model.hf.load import load
from jaxrl_llm.model.hf.peft import export_adapter
from jaxrl_llm.model.hf.source import resolve as resolve_model
from jaxrl_llm.model.params import abstract, count, policy_part, shardings, unstack
from jaxrl_llm.parallel import hosts
from jaxrl_llm.parallel.config import resolve
from jaxrl_llm.roles import memory, sources
from jaxrl_llm.roles.blueprint import Blueprint, blueprint_of
from jaxrl_llm.roles.build import make_evaluator, make_keys, make_publisher, make_scorer
from jaxrl_llm.roles.collector import Collector
from jaxrl_llm.roles.initial_state import start_params
from jaxrl_llm.roles.rates import sampler_rates
from jaxrl_llm.roles.sources import Sources
from jaxrl_llm.roles.state import RunState, SupervisedState
from jaxrl_llm.rollout.engine import Engine
from jaxrl_llm.run_context import State, restore_read_only
from jaxrl_llm.tasks.stream import make_order, make_prompts
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.tasks.tokenizer import load_tokenizer
from jaxrl_llm.types import Finish, Policy, PyTree, Rollouts, TrainState

EVALUATED_AT_ONCE = 64


class Source(NamedTuple):
    """Where the policy that is looked at comes from."""

    policy: Policy
    params: PyTree | None
    """The trainer's own, where the run has them."""
    name: str
    step: int


class Run(NamedTuple):
    """A run that nobody trains."""

    blueprint: Blueprint
    task: Task
    engine: Engine


def open_run(cfg: RunConfig, given: Sources | None = None) -> Run:
    """Raises UserError with everything that does not fit. `given`: what was read of `cfg` already."""
    given = given or sources.read(cfg)
    blueprint = blueprint_of(cfg, given)
    return Run(blueprint, given.task, blueprint.make_engine(given.task.tokenizer.spellings))


class Trained(NamedTuple):
    """What a checkpoint tells who does not train."""

    params: PyTree
    version: jax.Array
    step: int
    in_rl: bool


def restore(blueprint: Blueprint) -> Trained | None:
    """Of the newest checkpoint in the run directory; None if it has none."""

    def target(in_rl: bool) -> State:
        specs, train = blueprint.learner_specs if in_rl else blueprint.specs, blueprint.train
        version = jax.ShapeDtypeStruct((), np.int32, sharding=train.replicated)
        state = TrainState(abstract(specs, train), None, version)
        rest = dict.fromkeys((RunState if in_rl else SupervisedState)._fields)
        return (RunState if in_rl else SupervisedState)(**rest | {"train": state})

    found = restore_read_only(Path(blueprint.cfg.run_dir), blueprint.cfg.checkpoint.keep, target)
    if found is None:
        return None
    train = found.tree.train
    return Trained(train.params, train.step, found.step, isinstance(found.tree, RunState))


def open_source(run: Run) -> Source:
    """The run's newest checkpoint; else the pretrained model it starts from; else a policy that knows nothing."""
    blueprint, cfg = run.blueprint, run.blueprint.cfg
    trained = restore(blueprint)
    if trained is None and isinstance(cfg.model, PretrainedModel):
        directory = resolve_model(cfg.model.path)
        specs = unstack(blueprint.specs, blueprint.model.layers)
        params = load(directory, specs, blueprint.decode, jnp.dtype(blueprint.model.compute))
        return Source(Policy(params, hosts.put(np.int32(0), blueprint.decode.replicated)), None, str(directory), 0)
    name = f"step {trained.step} of {cfg.run_dir}" if trained else "an untrained policy"
    if trained is None:
        params = start_params(blueprint, make_keys(cfg).train)
        trained = Trained(params, hosts.put(np.int32(0), blueprint.train.replicated), 0, False)
    policy = make_publisher(blueprint)(TrainState(trained.params, (), trained.version), None)
    return Source(policy, trained.params, name, trained.step)


def evaluate_target(cfg: RunConfig, k: int) -> dict[str, Any]:
    """avg@k, pass@1 ... pass@k, maj@k with 95 % intervals over the held-out prompts, and exact where it is known.

    Each is an `Estimate` as a dict. Raises CheckpointError if there is neither a checkpoint nor a pretrained model.
    """
    at_once = min(getattr(cfg.task, "held_out", 0) or EVALUATED_AT_ONCE, EVALUATED_AT_ONCE)
    run = open_run(_reshape(cfg, at_once, k))
    memory.check(run.blueprint, len(run.task.held_out), trains=False)
    with shown_on_stderr("reading the model"):
        source = open_source(run)
    if not source.step and not isinstance(cfg.model, PretrainedModel):
        raise CheckpointError(f"{cfg.run_dir}: got no checkpoint, want a run directory that holds one")
    found = {"model": source.name, "step": source.step, "k": k, "temperature": cfg.rollout.temperature}
    with GraderPool(cfg.reward) as pool:
        score = make_scorer(run.blueprint, run.blueprint.shapes.experience)
        collect = Collector(run.engine, pool, run.task)
        evaluator = make_evaluator(run.blueprint, run.task, collect, score, make_keys(cfg).evaluation)
        with shown_on_stderr(f"evaluating {len(run.task.held_out)} held-out prompts"):
            if source.params is not None and run.task.has_targets:
                found["exact"] = float(np.mean(evaluator.probabilities(source.params)))
            (right, vote), _ = evaluator.answers(source.policy)
    found[f"avg@{k}"] = _plain(avg_at_k(right))
    for n in sorted({*(2**i for i in range(k.bit_length())), k}):
        found[f"pass@{n}"] = _plain(pass_at_k(right, n))
    found[f"maj@{k}"] = _plain(maj_at_k(right, vote))
    return found


def _plain(estimate: Estimate) -> dict[str, float | None]:
    """JSON knows no NaN."""
    return {name: None if np.isnan(x) else x for name, x in estimate._asdict().items()}


def export_run(cfg: RunConfig, out: Path, dtype: str | None, adapter: bool = False) -> Path:
    """Write the newest checkpoint as a Hugging Face directory, adapters merged, or its adapters alone, for PEFT. Returns it."""
    run = open_run(_reshape(cfg, 1, 1))
    blueprint, trained = run.blueprint, restore(run.blueprint)
    if trained is None:
        raise CheckpointError(f"{cfg.run_dir}: got no checkpoint, want a run directory that holds one")
    source = resolve_model(cfg.model.path) if isinstance(cfg.model, PretrainedModel) else None
    files = ConfigFiles(source, eos=run.task.eos, pad=run.task.pad)
    params, dtype = policy_part(trained.params, blueprint.model), dtype or blueprint.model.compute

    def write(params: PyTree, directory: Path) -> None:
        export(params, blueprint.model, directory, dtype, files, save_tokenizer=run.task.tokenizer.save)

    if not adapter:
        merge = jax.jit(partial(lora.merge, dtype=dtype), out_shardings=shardings(blueprint.specs, blueprint.train))
        write(merge(params) if cfg.lora.rank else params, out)
        return out
    if not cfg.lora.rank or not trained.in_rl:
        raise UserError("--adapter: got a checkpoint without adapters, want one of RL with lora.rank above 0")
    changed = source is None or cfg.warm_start.steps > 0
    export_adapter(params, cfg.lora, (out / "base").resolve() if changed else cfg.model.path, out, source=source)
    if changed:
        # Nobody else has the model that they stand beside.
        write(lora.without_adapters(params), out / "base")
    return out


def sample_prompt(cfg: RunConfig, text: str | None, n: int, has_task: bool = True) -> None:
    """Print `n` responses to one prompt: tokens with log-prob and entropy, and the reward where the answer is known.

    Args:
        text: the prompt; None: the task's first held-out one.
        has_task: whether the config's own task counts. Else the prompt is all that there is.
    """
    asked = _reshape(cfg, 1, n)
    run = open_run(asked, sources.read(asked, asked=partial(_asking, text=text, has_task=has_task)))
    memory.check(run.blueprint, len(run.task.held_out), trains=False)
    source = open_source(run)
    row = run.task.held_out[0]
    num, key = run.blueprint.cfg.rollout.prompts, make_keys(cfg).evaluation
    prompts = make_prompts(run.task, (row,), np.zeros(num, int), np.arange(num))
    reward = np.full(n, np.nan)
    if row.answer:
        with GraderPool(cfg.reward) as pool:
            groups = Collector(run.engine, pool, run.task)(source.policy, prompts, (row,), key).groups
        rollouts, reward = groups.rollouts, groups.reward
    else:
        rollouts = run.engine.generate(source.policy, prompts, key)
    print(f"{printable(row.prompt)}   from {source.name}, temperature {cfg.rollout.temperature}")
    for b in range(n):
        print(_line(run.task, rollouts, b, float(reward[b])))


def _asking(cfg: RunConfig, text: str | None, has_task: bool) -> Task:
    """The task with this prompt as the only held-out one, however long the task's own are."""
    task = sources.read_task(cfg) if has_task else Task((), (), load_tokenizer(cfg.tokenizer))
    if text is None:
        return task
    if unknown := task.tokenizer.unknown_characters(text):
        raise UserError(
            f"--prompt: got characters {' '.join(map(repr, unknown))}, want only those of tokenizer.alphabet"
        )
    row = task.row(text)
    most = _positions(cfg) - cfg.rollout.max_new_tokens
    if len(row.tokens) > most:
        raise UserError(
            f"--prompt: got {len(row.tokens):,} tokens, want {max(most, 0):,} at most: the model was made for {_positions(cfg):,} "
            f"positions, and rollout.max_new_tokens takes {cfg.rollout.max_new_tokens:,} of them"
        )
    # Something must be trained on, though nothing is.
    return dataclasses.replace(task, train=task.train or (row,), held_out=(row,))


def _positions(cfg: RunConfig) -> float:
    """Of prompt and response together, as the model's config.json says; without one there is no such number."""
    if not isinstance(cfg.model, PretrainedModel):
        return float("inf")
    values = read_json(resolve_model(cfg.model.path, ("config.json",)) / "config.json")
    inner = values.get("text_config")
    found = (inner if isinstance(inner, dict) else values).get("max_position_embeddings")
    return found if isinstance(found, int) else float("inf")


def benchmark_rollouts(cfg: RunConfig, calls: int = 5) -> None:
    """Print what rollouts of the config's own shapes reach: tokens a second, of the machine's own ceiling, rows alive, waste."""
    run = open_run(cfg)
    memory.check(run.blueprint, len(run.task.held_out), trains=False)
    source, key = open_source(run), make_keys(cfg).train
    order, places = make_order(len(run.task.train), cfg.seed), np.arange(cfg.rollout.prompts)
    prompts = make_prompts(run.task, run.task.train, np.array([order(p) for p in places]), places)
    start = time.perf_counter()
    run.engine.warm(source.policy, cfg.rollout.prompts)
    run.engine.generate(source.policy, prompts, key)
    first, rates, seen = time.perf_counter() - start, sampler_rates(run.engine), []
    for _ in range(calls):
        generation = run.engine.start(source.policy, prompts, key)
        for _ in generation:
            pass
        seen.append(generation.stats)
    stats = sorted(seen, key=lambda stats: stats.seconds)[calls // 2]
    (_, work), least = stats.chunks[0], stats.least_seconds(*rates)
    rows = [
        ("policy", f"{source.name}, {count(run.blueprint.specs):,} parameters, {run.blueprint.model.compute}"),
        ("rollouts", f"{cfg.rollout.prompts} prompts x {cfg.rollout.samples} samples, up to {cfg.rollout.max_new_tokens} tokens"),
        ("first call", f"{first:.2f} s, compiling included"),
        ("call", f"{stats.seconds:.3f} s, the median of {calls}; {stats.steps} steps in {len(stats.chunks)} chunks"),
        ("tokens", f"{stats.tokens / stats.seconds:,.0f} a second, {stats.tokens:,} in all"),
        ("live rows", f"{stats.tokens / stats.steps:.1f} a step; waste {1 - stats.tokens / stats.row_steps:.1%} of rows' steps"),
        ("a step moves", f"{work.bytes / 1e6:,.1f} MB and computes {work.flops / 1e9:,.2f} GFLOP a device, in the first segment"),
        ("this machine", f"{rates.bytes_per_s / 1e9:,.1f} GB/s, {rates.flops_per_s / 1e9:,.1f} GFLOP/s a device, at these shapes"),
        ("of the ceiling", f"{least / stats.seconds:.0%}: {least:.3f} s at those rates, of {stats.seconds:.3f} s"),
    ]  # fmt: skip
    for name, text in rows:
        print(f"{name:15s}{text}")


def _line(task: Task, rollouts: Rollouts, b: int, reward: float) -> str:
    length = int(rollouts.length[b])
    tokens = [printable(task.tokenizer.token(int(i))) for i in rollouts.tokens[b, :length]]
    parts = [
        f"{token} {logprob:.3f} (H {entropy:.3f})"
        for token, logprob, entropy in zip(tokens, rollouts.behavior_logprobs[b], rollouts.entropy[b], strict=False)
    ]
    graded = "?" if np.isnan(reward) else f"{reward:g}"
    total = float(rollouts.behavior_logprobs[b].sum())
    return (
        f"{b:3d}  {''.join(tokens):12s} reward {graded}  log-prob {total:8.3f}  {Finish(rollouts.finish[b]).name.lower():6s}  "
        + "  ".join(parts)
    )


def _reshape(cfg: RunConfig, prompts: int, samples: int) -> RunConfig:
    """The config with `prompts` a call, rounded up to what the mesh can split, and groups of `samples`."""
    sizes, _ = resolve(cfg.mesh, jax.device_count())
    split = sizes[0] * sizes[1] * sizes[3] * jax.process_count() if sizes else prompts
    return dataclasses.replace(
        cfg,
        rollout=dataclasses.replace(cfg.rollout, prompts=-(-prompts // split) * split, samples=samples),
        update=dataclasses.replace(cfg.update, minibatches=1, micro_batches=1),
        warm_start=dataclasses.replace(cfg.warm_start, rows=split),
    )

"""Settings that are valid by themselves but do not fit together, or not on a number of devices. Imports no jax."""

from collections.abc import Sequence
from typing import Any

from jaxrl_llm.config import mixtures
from jaxrl_llm.config.reuse_settings import reuse_problems
from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.config.tree_settings import tree_problems
from jaxrl_llm.config.unused_settings import unused_settings
from jaxrl_llm.experience.config import (
    AnyOfConfig,
    AutoFilter,
    BestBy,
    ByPassRate,
    ExperienceConfig,
    FirstSamples,
    FromPassRates,
    KeepAll,
    MaxVariance,
    NoHints,
    NotStale,
    ReinforceAda,
    ReplayConfig,
    RewardBetween,
    Rounds,
    Screening,
    Signal,
    Staged,
    StagedHints,
    StratifiedByDifficulty,
    UniformBudget,
)
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.objective.rules import refusals, step_refusals, taught_refusals
from jaxrl_llm.parallel.config import MeshConfig, divisors, resolve


def problems(cfg: RunConfig, num_devices: int) -> list[str]:
    """Errors about everything that cannot work on `num_devices`: what was asked, what was found, what would work."""
    sizes, found = resolve(cfg.mesh, num_devices)
    data, fsdp, tensor, expert = sizes or (max(n, 1) for n in cfg.mesh.sizes())
    if isinstance(cfg.model, ModelConfig):
        found += cfg.model.problems(tensor, expert)
    row_shards = data * fsdp * expert
    for name, size in (("rollout.prompts", cfg.rollout.prompts), ("warm_start.rows", cfg.warm_start.rows)):
        if size % row_shards:
            works = ", ".join(map(str, divisors(size)))
            found.append(
                f"{name}: got {size}, want a multiple of mesh.data * mesh.fsdp * mesh.expert ({row_shards}); {size} allows {works}"
            )
    found += engine_problems(cfg, num_devices, (tensor, fsdp, expert))
    groups = cfg.rollout.prompts + cfg.experience.replayed_groups
    if groups % cfg.update.minibatches:
        more = " + experience.replay.groups" if cfg.experience.replayed_groups else ""
        found.append(
            f"update.minibatches: got {cfg.update.minibatches}, want a divisor of rollout.prompts{more} "
            f"({groups}): {', '.join(map(str, divisors(groups)))}"
        )
        return found
    minibatch_rows = groups * cfg.rollout.samples // cfg.update.minibatches
    if cfg.update.micro_batches * row_shards > minibatch_rows:
        found.append(
            f"update.micro_batches: got {cfg.update.micro_batches}, want {minibatch_rows // row_shards} at most: a minibatch has "
            f"{minibatch_rows} rows, and each micro-batch takes at least one on each of {row_shards} shards of "
            "mesh.data * mesh.fsdp * mesh.expert"
        )
    return found


def engine_problems(cfg: RunConfig, num_devices: int, axes: tuple[int, int, int]) -> list[str]:
    """Errors about the rollout engine's settings. `axes`: sizes of the mesh axes tensor, fsdp and expert."""
    found, engine, (tensor, fsdp, expert) = [], cfg.rollout.engine, axes
    if engine.rows_per_prompt_cache and cfg.rollout.samples % engine.rows_per_prompt_cache:
        works = ", ".join(map(str, divisors(cfg.rollout.samples)))
        found.append(
            f"rollout.engine.rows_per_prompt_cache: got {engine.rows_per_prompt_cache}, want a divisor of "
            f"rollout.samples ({cfg.rollout.samples}): {works}"
        )
    if cfg.rollout.top_k > cfg.rollout.max_kept_tokens:
        found.append(
            f"rollout.top_k: got {cfg.rollout.top_k}, want at most rollout.max_kept_tokens ({cfg.rollout.max_kept_tokens})"
        )
    for name, values in vars(cfg.rollout.per_sample).items():
        if len(values) > cfg.rollout.samples:
            found.append(
                f"rollout.per_sample.{name}: got {len(values)} values, want at most rollout.samples ({cfg.rollout.samples}), one "
                "for each"
            )
    if cfg.rollout.min_new_tokens > cfg.rollout.max_new_tokens:
        found.append(
            f"rollout.min_new_tokens: got {cfg.rollout.min_new_tokens}, want at most rollout.max_new_tokens "
            f"({cfg.rollout.max_new_tokens})"
        )
    decode_axes = (tensor, expert)
    if engine.layout == "wide":
        decode_axes = (tensor * fsdp, expert)
    elif isinstance(engine.layout, MeshConfig):
        sizes, wrong = resolve(engine.layout, num_devices)
        found += [f"rollout.engine.layout: {text}" for text in wrong]
        decode_axes = (sizes[2], sizes[3]) if sizes else decode_axes
    if isinstance(cfg.model, ModelConfig) and decode_axes != (tensor, expert):
        wrong = cfg.model.problems(*decode_axes)
        found += [f"rollout.engine.layout: {text}" for text in wrong if text.startswith("mesh.")]
    return found


def training_problems(cfg: RunConfig) -> list[str]:
    """Errors about settings that sampling and evaluation can use but training cannot."""
    found = mixtures.training_problems(cfg)
    if cfg.rollout.temperature == 0:
        found.append("rollout.temperature: got 0, want more: a policy that never explores learns nothing")
    graders = [grader.label for grader in cfg.reward.graders]
    found += experience_problems(cfg.experience, graders, cfg.rollout.prompts, cfg.rollout.samples)
    found += hint_problems(cfg) + tree_problems(cfg) + reuse_problems(cfg)
    found += step_refusals(cfg.objective, any(grader.step_end for grader in cfg.reward.graders))
    # Filters of the user's own are not checked against the objective.
    judged_by = cfg.experience.filter.by if isinstance(cfg.experience.filter, Signal) else ""
    graders_of_task = mixtures.most_graders(cfg)
    return found + refusals(cfg.objective, cfg.rollout.samples, cfg.update.packing.kind, judged_by, graders_of_task)


def experience_problems(cfg: ExperienceConfig, graders: Sequence[str], prompts: int, samples: int) -> list[str]:
    """Errors about the stages between sampling and learning.

    Args:
        cfg: the stages.
        graders: names of the graders.
        prompts, samples: P and G.
    """
    found, known = [], f"success, reward, or a grader's name: {', '.join(graders)}"
    for where, part in _measuring(cfg):
        if part.by not in ("success", "reward", *graders):
            found.append(f"experience.{where}.by: got {part.by!r}, want one of: {known}")
    for where, part in _parts(cfg):
        found += [f"experience.{where}.{text}" for text in _out_of_order(part)]
        if isinstance(part, RewardBetween) and part.by == "success" and (part.at_least or 0) > 1:
            found.append(f"experience.{where}.at_least: got {part.at_least}, want 1 at most: success is 0 or 1")
    if cfg.refill and not isinstance(cfg.budget, UniformBudget):
        found.append(
            f"experience.refill: got one beside the budget {cfg.budget.kind}, want one of the two: both say how many samples a "
            "step draws"
        )
    found += [
        f"experience.{where}: got not_stale, want a filter that judges each group on its own: it compares with the newest row of "
        "all groups, and a refill sees only those that have just finished; experience.filter takes it"
        for where, part in _parts(cfg)
        if where.startswith("refill.") and isinstance(part, NotStale)
    ]
    if cfg.refill and _keeps_all(cfg.refill.filter):
        found.append(f"experience.refill.filter: got {cfg.refill.filter.kind}, want one that may reject a group")
    if isinstance(cfg.replay, ReplayConfig):
        found += replay_problems(cfg.replay, samples)
    if isinstance(cfg.curriculum, StratifiedByDifficulty | Staged):
        found += cfg.curriculum.problems
    for where, part in (("curriculum", cfg.curriculum), ("budget", cfg.budget)):
        if isinstance(part, StratifiedByDifficulty | ByPassRate | FromPassRates) and part.by == "reward":
            found.append(
                f"experience.{where} {part.kind}.by: got reward, want success or a grader whose rewards are from 0 to 1: it "
                "estimates pass rates"
            )
    return found + budget_problems(cfg.budget, prompts, samples)


# Fields of gates, budgets and filters of which the first is at most the second, or less.
AT_MOST = (("low", "high"), ("at_least", "at_most"), ("initial", "high"))
LESS = (("hard", "easy"), ("hopeless", "solved"))


def _out_of_order(part: Any) -> list[str]:
    found = []
    for low, high in (*AT_MOST, *LESS):
        least, most = getattr(part, low, None), getattr(part, high, None)
        if None in (least, most) or least < most or (least == most and (low, high) in AT_MOST):
            continue
        want = (
            f"at most {high} ({most})"
            if (low, high) in AT_MOST
            else f"less than {high} ({most}): a mean cannot be both"
        )
        found.append(f"{low}: got {least}, want {want}")
    return found


def _keeps_all(chosen: Any) -> bool:
    """True if a filter can reject nothing."""
    parts = [_keeps_all(part) for part in getattr(chosen, "filters", ())]
    if parts:
        return any(parts) if isinstance(chosen, AnyOfConfig) else all(parts)
    return isinstance(chosen, KeepAll | AutoFilter)


def hint_problems(cfg: RunConfig) -> list[str]:
    """Errors about hints: their own settings, and what cannot be used beside them."""
    hints, budget = cfg.experience.hints, cfg.experience.budget
    if isinstance(hints, NoHints):
        return []
    found = hints.problems if isinstance(hints, StagedHints) else []
    if isinstance(budget, Rounds | Screening):
        found.append(
            f"experience.hints: got {hints.kind} beside the budget {budget.kind}, want one of the two: its rounds follow from "
            "right responses, and one that began with a hint is no success of the policy"
        )
    if cfg.objective.loss.kind == "dpo":
        found.append(
            f"experience.hints: got {hints.kind} with the loss dpo, want another loss: it compares whole responses, and of one "
            "with a hint the policy drew a part"
        )
    if not hints.train:
        return found
    if cfg.rollout.truncates:
        found.append(
            "experience.hints.train: got true with rollout.top_p, top_k or min_p, want false, or no truncation: a token of a hint "
            "may be one that it does not keep"
        )
    if cfg.update.ess_scaling:
        found.append(
            "experience.hints.train: got true with update.ess_scaling, want one of the two: tokens of hints have no sampling weight"
        )
    return found + taught_refusals(cfg.objective)


def hint_cautions(cfg: RunConfig) -> list[str]:
    """Warnings: stages that judge prompts by responses without a hint, while all have one."""
    hints = cfg.experience.hints
    if isinstance(hints, NoHints) or not hints.hints_all(cfg.rollout.samples):
        return []
    judging = [
        f"experience.{where}" for where, part in _measuring(cfg.experience) if where in ("curriculum", "gate", "budget")
    ]
    return [
        f"{where}: judges prompts by responses without a hint, and experience.hints {hints.kind} gives every response one: it "
        "learns nothing meanwhile; experience.hints.samples can leave some without"
        for where in judging
    ]


NEVER_FULL = "else a step is never full"


def replay_problems(cfg: ReplayConfig, samples: int) -> list[str]:
    """Errors about what can never come back. `samples`: G."""
    found, join = [], cfg.join
    if 0 < cfg.capacity < cfg.groups:
        found.append(
            f"experience.replay.groups: got {cfg.groups}, want {cfg.capacity} at most, all that the buffer holds "
            "(experience.replay.capacity)"
        )
    if cfg.capacity and not cfg.store_fresh and not cfg.start:
        found.append("experience.replay.store_fresh: got false, want true, or a file in start: nothing is stored")
    if cfg.capacity and cfg.max_uses == 1 and not cfg.start:
        found.append(
            "experience.replay.max_uses: got 1, want 2 or more, or 0 for any number: the step that sampled it counts, so that "
            "no group comes back"
        )
    if join and join.least > join.window:
        found.append(
            f"experience.replay.join.least: got {join.least}, want {join.window} at most, experience.replay.join.window"
        )
    if join and join.swap and samples < 2:
        found.append(
            f"experience.replay.join.swap: got true with rollout.samples {samples}, want 2 or more: a fresh response stays"
        )
    return found


def budget_problems(budget: Any, prompts: int, samples: int) -> list[str]:
    """Errors about samples that a budget cannot allocate to P prompts of G samples on average. Bounds in the wrong order are
    `_out_of_order`."""
    found, where = [], f"experience.budget {budget.kind}"
    if isinstance(budget, FromPassRates) and budget.low <= budget.high and not budget.low <= samples <= budget.high:
        found.append(
            f"{where}: got low {budget.low} and high {budget.high}, want rollout.samples ({samples}) between them"
        )
    first = getattr(budget, "per_round", getattr(budget, "initial", 1))
    if first > samples:
        found.append(
            f"{where}: got {first} samples of each prompt in the first round, want at most rollout.samples ({samples}): "
            f"a step has rollout.prompts ({prompts}) times as many"
        )
        return found
    if isinstance(budget, Screening) and budget.initial <= budget.high < samples:
        found.append(f"{where}.high: got {budget.high}, want rollout.samples ({samples}) or more: {NEVER_FULL}")
    if isinstance(budget, Rounds) and budget.per_round * budget.rounds < samples:
        found.append(
            f"{where}: got per_round {budget.per_round} times rounds {budget.rounds}, want rollout.samples ({samples}) or more: "
            f"{NEVER_FULL}"
        )
    elif isinstance(budget, ReinforceAda) and budget.until == "balanced":
        # Of a step's samples the other prompts get one round each, at least.
        most = min(budget.per_round * budget.rounds, prompts * samples - (prompts - 1) * budget.per_round)
        if budget.keep > most:
            found.append(
                f"{where}.keep: got {budget.keep}, want at most {most}, the most samples of a prompt: else none ever has enough of "
                "both kinds"
            )
    return found


def cautions(cfg: RunConfig) -> list[str]:
    """Warnings: settings that nothing reads, filters that keep everything, and filters by a sum."""
    found, graders = unused_settings(cfg), mixtures.most_graders(cfg)
    for where, part in _parts(cfg.experience):
        if why := _why_every_row_is_kept(part, cfg):
            found.append(f"experience.{where}: keeps every response, those of groups without signal too: {why}")
        if graders > 1 and isinstance(part, Signal) and part.by == "reward":
            found.append(
                f"experience.{where}: judges groups by the weighted sum of {graders} graders, so that groups stay in which every "
                "answer is wrong but the format or the length differs; by: success, or a grader's name, looks at the task alone"
            )
    found += hint_cautions(cfg)
    return found + (replay_cautions(cfg) if isinstance(cfg.experience.replay, ReplayConfig) else [])


def replay_cautions(cfg: RunConfig) -> list[str]:
    """Warnings: what is stored and hardly ever trained on."""
    replay, found = cfg.experience.replay, []
    if not replay.capacity:
        return []
    if replay.start and not replay.store_fresh and replay.max_age:
        found.append(
            f"experience.replay.max_age: the responses of {replay.start} leave after {replay.max_age} updates; 0 keeps them"
        )
    if replay.join and replay.join.right and cfg.objective.reused_rows == "split":
        found.append(
            "objective.reused_rows: split with experience.replay.join.right: stored responses that are all right have a baseline "
            "of 1, and no advantage; joint compares them with the fresh ones"
        )
    prompting = [task.prompting for task in mixtures.single_tasks(cfg).values() if hasattr(task, "prompting")]
    if replay.join and any(each.examples.number and each.examples.by == "visit" for each in prompting):
        found.append(
            "task.prompting.examples.by: visit with experience.replay.join: stored responses join fresh ones of the same prompt, "
            "which examples of another visit make another; row lets them join"
        )
    return found


def _why_every_row_is_kept(part: Any, cfg: RunConfig) -> str:
    """Reason why a filter drops nothing; "" if it may."""
    if isinstance(part, RewardBetween):
        return "it has no bound" if part.at_least is None and part.at_most is None else ""
    gives_equally = isinstance(cfg.experience.budget, UniformBudget)
    if isinstance(part, MaxVariance | FirstSamples | BestBy) and gives_equally and part.keep >= cfg.rollout.samples:
        return f"keep is {part.keep}, and a prompt has {cfg.rollout.samples} (rollout.samples)"
    return ""


def _measuring(cfg: ExperienceConfig) -> list[tuple[str, Any]]:
    """Stages that measure responses by something, each with its place in the section `experience`."""
    return [(where, part) for where, part in _parts(cfg) if hasattr(part, "by")]


def _parts(cfg: ExperienceConfig) -> list[tuple[str, Any]]:
    """Curriculum, gate, budget and single filters, each with its place in the section `experience`."""
    filters = [("filter", cfg.filter)] + ([("refill.filter", cfg.refill.filter)] if cfg.refill else [])
    for where, part in list(filters):
        filters += [(f"{where}.filters.{i}", single) for i, single in enumerate(getattr(part, "filters", ()))]
    return [("curriculum", cfg.curriculum), ("gate", cfg.gate), ("budget", cfg.budget), *filters]

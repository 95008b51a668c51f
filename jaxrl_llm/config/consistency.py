"""Settings that are valid by themselves but do not fit together, or not on a number of devices. Imports no jax."""

from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.experience.config import FILTERS
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.objective.rules import refusals
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
    if cfg.rollout.prompts % cfg.update.minibatches:
        found.append(
            f"update.minibatches: got {cfg.update.minibatches}, want a divisor of rollout.prompts "
            f"({cfg.rollout.prompts}): {', '.join(map(str, divisors(cfg.rollout.prompts)))}"
        )
        return found
    minibatch_rows = cfg.rollout.prompts * cfg.rollout.samples // cfg.update.minibatches
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
    found = []
    if cfg.rollout.temperature == 0:
        found.append("rollout.temperature: got 0, want more: a policy that never explores learns nothing")
    graders = [grader.label for grader in cfg.reward.graders]
    chosen = cfg.experience.filter
    if isinstance(chosen, str) and chosen not in (*FILTERS, *graders):
        known = f"{', '.join(FILTERS)}; or a grader's name: {', '.join(graders)}"
        found.append(f"experience.filter: got {chosen!r}, want one of: {known}")
    # Filters of the user's own are not checked against the objective.
    keep = chosen if isinstance(chosen, str) else "none"
    return found + refusals(cfg.objective, cfg.rollout.samples, cfg.update.packing.kind, keep, len(graders))

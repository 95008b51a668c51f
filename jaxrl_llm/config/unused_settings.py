"""Settings without effect, given the other settings. They are accepted, since they do no harm, and reported, since they suggest a
mistake."""

import dataclasses
from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.config.schema import defaults
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.presets import with_preset


class Condition(NamedTuple):
    """Settings that are read only under a condition."""

    paths: str
    """Separated by spaces; paths that a config does not have are skipped."""
    is_read: Callable[[RunConfig], bool]
    reason: str
    """Reported if the settings are not read."""


def _decays(part: str) -> Callable[[RunConfig], bool]:
    def decays(cfg: RunConfig) -> bool:
        optimizer = getattr(cfg, part).optimizer
        return optimizer.decay_steps > 0 or not isinstance(optimizer.schedule, str)

    return decays


def _is_truncated(cfg: RunConfig) -> bool:
    return cfg.rollout.truncates


CONDITIONS = (
    Condition("model.window model.sliding_rope_theta", lambda c: any(c.model.sliding), "no layer of model.sliding slides"),
    Condition("model.norm_top_k", lambda c: c.model.experts > 0, "model.experts is 0"),
    Condition(
        "task.prompting.examples.by task.prompting.examples.same task.prompting.examples.response "
        "task.prompting.examples.place task.prompting.examples.text",
        lambda c: c.task.prompting.examples.number > 0,
        "task.prompting.examples.number is 0",
    ),
    Condition("task.prompting.by", lambda c: len(c.task.prompting.forms) > 0, "task.prompting.forms is empty"),
    Condition("warm_start.rows warm_start.noise", lambda c: c.warm_start.steps > 0, "warm_start.steps is 0"),
    Condition("rollout.max_kept_tokens", _is_truncated, "rollout.top_p, top_k and min_p leave all tokens"),
    Condition("rollout.control.wait", lambda c: c.rollout.control.waits > 0, "rollout.control.waits is 0"),
    Condition("rollout.control.then.wait", lambda c: c.rollout.control.then.waits > 0, "rollout.control.then.waits is 0"),
    Condition(
        "experience.replay.memory_mib experience.replay.max_age experience.replay.max_uses "
        "experience.replay.groups experience.replay.join experience.replay.correction experience.replay.min_success "
        "experience.replay.retire_solved experience.replay.store_fresh experience.replay.start "
        "experience.replay.replace_dropped",
        lambda c: c.experience.replays,
        "experience.replay.capacity is 0",
    ),
    Condition(
        "objective.loss.shaping",
        lambda c: c.experience.replays or c.experience.trains_hints,
        "experience.replay.capacity is 0, and experience.hints trains on none of its tokens",
    ),
    Condition(
        "objective.reused_rows",
        lambda c: getattr(c.experience.replay, "join", None) is not None,
        "experience.replay.join is not set: no group has stored rows among its fresh ones",
    ),
    Condition("lora.alpha lora.targets", lambda c: c.lora.rank > 0, "lora.rank is 0: every parameter is trained"),
    Condition("update.packing.slots", lambda c: c.update.packing.kind != "none", "update.packing.kind is none"),
    *(
        Condition(
            " ".join(f"{part}.optimizer.{name}" for name in ("lr", "warmup_steps", "hold_steps", "decay_steps", "final_lr")),
            lambda c, part=part: isinstance(getattr(c, part).optimizer.schedule, str),
            f"{part}.optimizer.schedule is one of your own",
        )
        for part in ("warm_start", "update")
    ),
    *(
        Condition(
            f"{part}.optimizer.schedule {part}.optimizer.final_lr {part}.optimizer.hold_steps",
            _decays(part),
            f"{part}.optimizer.decay_steps is 0: the learning rate does not fall",
        )
        for part in ("warm_start", "update")
    ),
    Condition("objective.reference.decay", lambda c: c.objective.reference.kind == "ema", "reference.kind is not ema"),
    Condition("objective.reference.every", lambda c: c.objective.reference.kind == "periodic", "reference.kind is not periodic"),
    Condition("objective.reference.path", lambda c: c.objective.reference.kind == "pretrained", "reference.kind is not pretrained"),
    Condition("objective.reference.kind", lambda c: c.objective.has_reference, "no term of the objective reads a reference"),
    Condition(
        "objective.critic.kind objective.critic.lr_scale", lambda c: c.objective.has_critic, "the advantage is not gae"
    ),
    Condition(
        "objective.loss.critic.weight objective.loss.critic.clip",
        lambda c: c.objective.has_critic,
        "the advantage is not gae",
    ),
    Condition(
        "objective.loss.kl.kind objective.loss.kl.to objective.loss.kl.times objective.loss.kl.max_difference "
        "objective.loss.kl.max_value",
        lambda c: c.objective.loss.kl.weight > 0,
        "objective.loss.kl.weight is 0",
    ),
    Condition(
        "objective.reward_kl.kind objective.reward_kl.to",
        lambda c: c.objective.reward_kl.weight > 0,
        "objective.reward_kl.weight is 0",
    ),
    Condition(
        "objective.loss.surrogate.cap",
        lambda c: c.objective.loss.surrogate.form == "reinforce",
        "objective.loss.surrogate.form is not reinforce",
    ),
    Condition("metrics.rollout_groups", lambda c: c.metrics.rollouts_every > 0, "metrics.rollouts_every is 0"),
)  # fmt: skip


def unused_settings(cfg: RunConfig) -> list[str]:
    """One message per group of settings that nothing reads, if they differ from the default and from the preset."""
    preset = with_preset({"preset": cfg.objective.preset}, dataclasses.asdict(ObjectiveConfig()))
    found = []
    for paths, is_read, reason in CONDITIONS:
        settings = {path: _value_and_default(cfg, path) for path in paths.split()}
        changed = [path for path, x in settings.items() if x and x[0] not in (x[1], _preset_value(preset, path))]
        if changed and not is_read(cfg):
            found.append(
                f"{', '.join(changed)}: nothing reads {'this' if len(changed) == 1 else 'these'}, since {reason}"
            )
    return found


def _value_and_default(cfg: RunConfig, path: str) -> tuple[Any, Any] | None:
    """None if the config has no such path."""
    *parents, last = path.split(".")
    section = reduce(lambda part, key: getattr(part, key, None), parents, cfg)
    return (getattr(section, last), defaults(type(section)).get(last)) if hasattr(section, last) else None


def _preset_value(preset: dict[str, Any], path: str) -> Any:
    """Value that a preset of the objective sets at a path of the config; None if it sets none."""
    section, *rest = path.split(".")
    if section != "objective":
        return None
    return reduce(lambda part, key: part.get(key) if isinstance(part, dict) else None, rest, preset)

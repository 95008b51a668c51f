"""Settings that nothing reads, given the others: accepted, for they do no harm, and named, for somebody meant something by them."""

import dataclasses
from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

from jaxrl_llm.config.values import defaults
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.presets import with_preset

Config = Any
"""A RunConfig, which imports this room's neighbors and not the other way round."""


class Rule(NamedTuple):
    names: str
    """Paths, of which those that a config has are meant."""
    is_read: Callable[[Config], bool]
    why: str


def _decays(part: str) -> Callable[[Config], bool]:
    def decays(cfg: Config) -> bool:
        optimizer = getattr(cfg, part).optimizer
        return optimizer.decay_steps > 0 or not isinstance(optimizer.schedule, str)

    return decays


def _is_truncated(cfg: Config) -> bool:
    return cfg.rollout.top_p < 1 or cfg.rollout.top_k > 0 or cfg.rollout.min_p > 0


RULES = (
    Rule("model.window model.sliding_rope_theta", lambda c: any(c.model.sliding), "no layer of model.sliding slides"),
    Rule("model.norm_top_k", lambda c: c.model.experts > 0, "model.experts is 0"),
    Rule("warm_start.rows warm_start.noise", lambda c: c.warm_start.steps > 0, "warm_start.steps is 0"),
    Rule("rollout.max_kept_tokens", _is_truncated, "rollout.top_p, top_k and min_p leave all tokens"),
    Rule("experience.replay.max_age", lambda c: c.experience.replays, "experience.replay.capacity is 0"),
    Rule("lora.alpha lora.targets", lambda c: c.lora.rank > 0, "lora.rank is 0: every parameter is trained"),
    Rule("update.packing.slots", lambda c: c.update.packing.kind != "none", "update.packing.kind is none"),
    *(
        Rule(
            " ".join(f"{part}.optimizer.{name}" for name in ("lr", "warmup_steps", "hold_steps", "decay_steps", "final_lr")),
            lambda c, part=part: isinstance(getattr(c, part).optimizer.schedule, str),
            f"{part}.optimizer.schedule is one of your own",
        )
        for part in ("warm_start", "update")
    ),
    *(
        Rule(
            f"{part}.optimizer.schedule {part}.optimizer.final_lr {part}.optimizer.hold_steps",
            _decays(part),
            f"{part}.optimizer.decay_steps is 0: the learning rate does not fall",
        )
        for part in ("warm_start", "update")
    ),
    Rule("objective.reference.decay", lambda c: c.objective.reference.kind == "ema", "reference.kind is not ema"),
    Rule("objective.reference.every", lambda c: c.objective.reference.kind == "periodic", "reference.kind is not periodic"),
    Rule("objective.reference.path", lambda c: c.objective.reference.kind == "pretrained", "reference.kind is not pretrained"),
    Rule("objective.reference.kind", lambda c: c.objective.has_reference, "no term of the objective reads a reference"),
    Rule("objective.critic.kind objective.critic.lr_scale", lambda c: c.objective.has_critic, "the advantage is not gae"),
    Rule("objective.loss.critic.weight objective.loss.critic.clip", lambda c: c.objective.has_critic, "the advantage is not gae"),
    Rule(
        "objective.loss.kl.kind objective.loss.kl.to objective.loss.kl.times objective.loss.kl.max_difference "
        "objective.loss.kl.max_value",
        lambda c: c.objective.loss.kl.weight > 0,
        "objective.loss.kl.weight is 0",
    ),
    Rule(
        "objective.reward_kl.kind objective.reward_kl.to",
        lambda c: c.objective.reward_kl.weight > 0,
        "objective.reward_kl.weight is 0",
    ),
    Rule(
        "objective.loss.surrogate.cap",
        lambda c: c.objective.loss.surrogate.form == "reinforce",
        "objective.loss.surrogate.form is not reinforce",
    ),
    Rule("metrics.rollout_groups", lambda c: c.metrics.rollouts_every > 0, "metrics.rollouts_every is 0"),
)  # fmt: skip


def unread(cfg: Config) -> list[str]:
    """`names: nothing reads this, since ...`, for settings that are neither the default nor the preset's."""
    preset = with_preset({"preset": cfg.objective.preset}, dataclasses.asdict(ObjectiveConfig()))
    found = []
    for names, is_read, why in RULES:
        there = {name: _at(cfg, name) for name in names.split()}
        given = [name for name, values in there.items() if values and values[0] not in (values[1], _of(preset, name))]
        if given and not is_read(cfg):
            found.append(f"{', '.join(given)}: nothing reads {'this' if len(given) == 1 else 'these'}, since {why}")
    return found


def _at(cfg: Config, name: str) -> tuple[Any, Any] | None:
    """The value and the default at a path; None where such a config has no such path."""
    *path, last = name.split(".")
    section = reduce(lambda part, key: getattr(part, key, None), path, cfg)
    return (getattr(section, last), defaults(type(section)).get(last)) if hasattr(section, last) else None


def _of(preset: dict[str, Any], name: str) -> Any:
    """What the preset says at a path of the config; None where nothing."""
    room, *path = name.split(".")
    return (
        reduce(lambda part, key: part.get(key) if isinstance(part, dict) else None, path, preset)
        if room == "objective"
        else None
    )

"""Presets: whole objectives, named by their source, for `objective.preset`. If two sources use one name for different things, there
are two presets.

Each entry holds the differences from `ObjectiveConfig`'s defaults. `framework:name` is the computation of that framework's code
with its defaults for that algorithm, `paper:name` the published equation; `SOURCES` gives version and date.
"""

import dataclasses
import difflib
from typing import Any

from jaxrl_llm.config.flags import merged
from jaxrl_llm.config.options import with_options
from jaxrl_llm.errors import UserError
from jaxrl_llm.objective.config import ObjectiveConfig

DUAL = {"kind": "clip", "low": 0.2, "high": 0.2, "dual": 3.0}
CLIP = {"kind": "clip", "low": 0.2, "high": 0.2}
VERL_GRPO = {"kind": "grpo", "eps": 1e-6}
TRL_GRPO = {"kind": "grpo", "eps": 1e-4}
# The factor is TRL's default (use_bias_correction_kl); its beta defaults to 0.
TRL_KL = {"kind": "k3", "times": "ratio"}
SKYRL_KL = {"kind": "k3", "weight": 0.001, "max_difference": 20.0, "max_value": 10.0}


def _policy(surrogate: dict[str, Any], aggregation: str = "token", **more: Any) -> dict[str, Any]:
    return {"kind": "policy_gradient", "surrogate": surrogate, "aggregation": aggregation, **more}


def _preset(advantage: dict[str, Any], loss: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"advantage": advantage, "loss": loss, **more}


PRESETS: dict[str, dict[str, Any]] = {
    "paper:reinforce": _preset({"kind": "raw"}, _policy({"kind": "reinforce"}, "sequence_sum")),
    "paper:ppo": _preset(
        {"kind": "gae", "lam": 0.95, "whiten": False}, _policy(CLIP, critic={"weight": 2.0, "clip": None})
    ),
    "paper:rloo": _preset({"kind": "rloo"}, _policy({"kind": "reinforce"}, "sequence_sum")),
    "paper:grpo": _preset(
        {"kind": "grpo", "std": "population", "eps": 0.0},
        _policy(CLIP, "sequence", kl={"kind": "k3", "weight": 0.04}),
    ),
    "paper:dr_grpo": _preset({"kind": "mean_only"}, _policy(CLIP, "constant")),
    "paper:dapo": _preset({"kind": "grpo", "std": "population", "eps": 0.0}, _policy({**CLIP, "high": 0.28})),
    "paper:gspo": _preset(
        {"kind": "grpo", "std": "population", "eps": 0.0},
        _policy({"kind": "clip", "low": 3e-4, "high": 4e-4}, "sequence", ratio="sequence"),
    ),
    "paper:cispo": _preset(
        {"kind": "grpo", "std": "population", "eps": 0.0}, _policy({"kind": "cispo", "low": 0.0, "high": 5.0})
    ),
    "paper:gmpo": _preset({"kind": "grpo", "std": "population", "eps": 0.0}, _policy({"kind": "gmpo"}, "sequence")),
    "paper:sapo": _preset({"kind": "grpo", "std": "population", "eps": 0.0}, _policy({"kind": "sapo"}, "sequence")),
    "paper:max_rl": _preset({"kind": "max_rl"}, _policy({"kind": "reinforce"}, "sequence_sum")),
    "paper:decoupled_ppo": _preset(
        VERL_GRPO,
        _policy(CLIP, correction={"kind": "truncated_importance", "cap": 5.0}),
    ),
    "paper:icepop": _preset(
        VERL_GRPO, _policy(CLIP, "sequence", correction={"kind": "masked_importance", "low": 0.5, "high": 5.0})
    ),
    "paper:m2po": _preset(VERL_GRPO, _policy(CLIP, correction={"kind": "second_moment", "threshold": 0.04})),
    "paper:dpo": _preset({"kind": "best_worst"}, {"kind": "dpo", "beta": 0.1}),
    "verl:ppo": _preset({"kind": "gae", "lam": 1.0}, _policy(DUAL, critic={"weight": 1.0, "clip": 0.5})),
    "verl:grpo": _preset(VERL_GRPO, _policy(DUAL)),
    "verl:dr_grpo": _preset({"kind": "mean_only"}, _policy(DUAL, "constant")),
    "verl:dapo": _preset(VERL_GRPO, _policy({**DUAL, "high": 0.28, "dual": 10.0})),
    "verl:rloo": _preset({"kind": "rloo"}, _policy(DUAL)),
    "verl:reinforce_pp": _preset({"kind": "reinforce_pp"}, _policy(DUAL)),
    "verl:reinforce_pp_baseline": _preset({"kind": "reinforce_pp", "baseline": True}, _policy(DUAL)),
    "verl:opo": _preset({"kind": "opo"}, _policy(DUAL)),
    "verl:gpg": _preset({"kind": "gpg"}, _policy({"kind": "reinforce"})),
    "verl:pass_at_k": _preset({"kind": "pass_at_k"}, _policy(DUAL)),
    "verl:gspo": _preset(VERL_GRPO, _policy(CLIP, "sequence", ratio="sequence_token")),
    "verl:cispo": _preset(VERL_GRPO, _policy({"kind": "cispo", "low": 0.8, "high": 1.2})),
    "verl:gmpo": _preset(VERL_GRPO, _policy({"kind": "gmpo", "low": 0.2, "high": 0.2}, "sequence")),
    "verl:sapo": _preset(VERL_GRPO, _policy({"kind": "sapo"}, "sequence")),
    "verl:dppo_tv": _preset(VERL_GRPO, _policy({"kind": "dppo", "form": "reinforce", "cap": 3.0})),
    "trl:grpo": _preset(TRL_GRPO, _policy(CLIP, kl=TRL_KL)),
    "trl:grpo_sequence": _preset(TRL_GRPO, _policy(CLIP, "sequence", kl=TRL_KL)),
    "trl:dr_grpo": _preset(TRL_GRPO, _policy(CLIP, "constant", kl=TRL_KL)),
    "trl:gspo": _preset(TRL_GRPO, _policy(CLIP, "sequence", ratio="sequence")),
    "trl:cispo": _preset(TRL_GRPO, _policy({"kind": "cispo", "low": 0.0, "high": 5.0}, kl=TRL_KL)),
    "trl:sapo": _preset(TRL_GRPO, _policy({"kind": "sapo"}, "sequence", kl=TRL_KL)),
    "trl:rloo": _preset(
        {"kind": "rloo"}, _policy(CLIP, "sequence", ratio="product"), reward_kl={"kind": "k1", "weight": 0.05}
    ),
    "trl:gdpo": _preset({"kind": "gdpo"}, _policy(CLIP, kl=TRL_KL)),
    "openrlhf:reinforce_pp": _preset(
        {"kind": "reinforce_pp", "variance": "population"}, _policy(CLIP), reward_kl={"kind": "k1", "weight": 0.01}
    ),
    "openrlhf:grpo": _preset(
        {"kind": "grpo", "eps": 1e-9}, _policy(CLIP), reward_kl={"kind": "k1", "weight": 0.01, "to": "advantage"}
    ),
    "slime:grpo": _preset(VERL_GRPO, _policy(CLIP, "sequence")),
    "nemo:grpo": _preset(
        {"kind": "leave_one_out"},
        _policy(CLIP, kl={"kind": "k3", "weight": 0.01, "times": "score", "max_difference": 20.0, "max_value": 10.0}),
    ),
    "skyrl:grpo": _preset(VERL_GRPO, _policy(CLIP, kl=SKYRL_KL)),
    "skyrl:cispo": _preset(VERL_GRPO, _policy({"kind": "cispo", "low": 0.0, "high": 5.0}, kl=SKYRL_KL)),
    "skyrl:max_rl": _preset({"kind": "max_rl", "eps": 1e-6}, _policy(CLIP, kl=SKYRL_KL)),
    "skyrl:dppo": _preset(VERL_GRPO, _policy({"kind": "dppo"}, kl=SKYRL_KL)),
    "areal:grpo": _preset(
        {"kind": "reinforce_pp", "eps": 1e-5, "eps_beside": "std"},
        _policy(CLIP, correction={"kind": "masked_importance", "low": 0.0, "high": 5.0}),
        reward_kl={"kind": "k1", "weight": 0.1},
    ),
    "prime:rl": _preset({"kind": "mean_only"}, _policy({"kind": "ipo"})),
    "prime:dppo": _preset(
        {"kind": "mean_only"}, _policy({"kind": "dppo"}, kl={"kind": "k2", "weight": 2e-3, "to": "behavior"})
    ),
    "tinker:cispo": _preset({"kind": "mean_only"}, _policy({"kind": "cispo", "low": 0.0, "high": 4.0}, "token_sum")),
}

# Version and date of the source, per preset or per framework.
SOURCES = {
    "paper:reinforce": "Machine Learning 8, 1992",
    "paper:ppo": "arXiv 1707.06347, 2017-07",
    "paper:rloo": "arXiv 2402.14740, 2024-02",
    "paper:grpo": "arXiv 2402.03300, 2024-02",
    "paper:dr_grpo": "arXiv 2503.20783, 2025-03",
    "paper:dapo": "arXiv 2503.14476, 2025-03",
    "paper:gspo": "arXiv 2507.18071, 2025-07",
    "paper:cispo": "arXiv 2506.13585, 2025-06",
    "paper:gmpo": "arXiv 2507.20673, 2025-07",
    "paper:sapo": "arXiv 2511.20347, 2025-11",
    "paper:max_rl": "arXiv 2602.02710, 2026-02",
    "paper:decoupled_ppo": "arXiv 2110.00641, 2021-10",
    "paper:icepop": "arXiv 2510.18855, 2025-10",
    "paper:m2po": "arXiv 2510.01161, 2025-10",
    "paper:dpo": "arXiv 2305.18290, 2023-05",
    "verl": "v0.8.0 + 337 (1dda039b), 2026-08-22",
    "verl:dapo": "verl-recipe 48ea0a79, 2026-08-05",
    "trl": "v1.9.0 + 26 (f2cd5771), 2026-07-24; the KL of v1.16.0, 2026-10-15",
    "openrlhf": "v0.11.0 (3c3be623), 2026-08-13",
    "slime": "v0.3.1 + 38 (624b824a), 2026-08-21",
    "nemo": "v0.6 (7ea279ab), 2026-08-22",
    "skyrl": "v0.3 (a9564572), 2026-08-21",
    "areal": "v2.0.0 + 55 (cbff54d6), 2026-08-22",
    "prime:rl": "pull requests 3418, 2026-08-27, and 3586, 2026-09-18, commit unknown",
    "prime:dppo": "v0.8.1.dev67 (559b4477), 2026-08-21",
    "tinker": "tinker-cookbook 9dfcc3a2, 2026-08-19",
}


def preset(name: str, **parts: Any) -> ObjectiveConfig:
    """Return the objective of a preset, `parts` merged over it: a `kind` need not be repeated.

        objective = rl.preset("verl:dapo", loss={"surrogate": {"high": 0.3}})
        advantage, loss = rl.make_advantage(objective), rl.losses.make_loss(objective)

    Raises:
        UserError: no such preset, or a part is wrong.
    """
    if name not in PRESETS:
        hint = f"; perhaps you meant {nearest_preset(name)}" if nearest_preset(name) else ""
        raise UserError(f"preset: got {name!r}, want one of {', '.join(PRESETS)}{hint}")
    default = ObjectiveConfig()
    return with_options(default, with_preset({"preset": name, **parts}, dataclasses.asdict(default)))


def source(preset: str) -> str:
    """Return version and date of the preset's source."""
    return SOURCES.get(preset) or SOURCES[preset.partition(":")[0]]


def with_preset(given: Any, defaults: dict[str, Any]) -> Any:
    """Return the `objective` section `given`, merged over its preset, merged over `defaults`: a `kind` need not be repeated.

    A misspelled preset is read as the nearest one, so that other errors can be reported too.
    """
    given = ObjectiveConfig.written_out(given)
    if not isinstance(given, dict):
        return given
    preset = PRESETS.get(nearest_preset(given.get("preset")), {})
    own = {name: value for name, value in given.items() if name != "preset"}
    parts = merged(merged(defaults, preset, ObjectiveConfig), own, ObjectiveConfig)
    return parts | {"preset": given.get("preset", "")}


def nearest_preset(name: Any) -> str:
    """Return the preset most similar to `name`; "" if none is close."""
    return next(iter(difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)), "") if isinstance(name, str) else ""

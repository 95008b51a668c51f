"""Every part of a policy-gradient loss and every preset, by the oracle and by the package.

Gradients of the oracle are central differences. Its stopped gradients are fixed while the log-probabilities move, so a gradient
that flows where it must not, or does not where it must, shows.
"""

from dataclasses import replace
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import numpy as np
import oracle
import oracle_terms as terms
from cases import SEEDS, assess, objective_of, package_loss, random_case
from oracle import Kl, Preset

CASES = [random_case(seed) for seed in SEEDS]
NORM = oracle.PRESETS["verl:grpo"].advantage
STEP = 1e-6
"""Central differences in float64 err by about 1e-9 at it; no bound lies so near to a token of these cases."""


def surrogate(function, kind: str = "clip", ratio: str = "token", named: dict | None = None, **bounds):
    """The oracle's and the config's; `named`: what the config alone calls by name."""
    return Preset(NORM, partial(function, **bounds), "sequence"), {
        "surrogate": ({"dual": None} if kind == "clip" else {}) | {"kind": kind} | bounds | (named or {}),
        "ratio": ratio,
    }


SURROGATES = {
    "clip": surrogate(terms.token_clip),
    "clip higher": surrogate(terms.token_clip, low=0.1, high=0.4),
    "clip dual": surrogate(terms.token_clip, dual=2.0),
    "gspo": surrogate(terms.sequence_clip, ratio="sequence", low=0.4, high=0.5),
    "gspo token": surrogate(terms.sequence_token_clip, ratio="sequence_token", low=0.4, high=0.5),
    "product": surrogate(terms.product_clip, ratio="product", low=0.4, high=0.5),
    "cispo": surrogate(terms.cispo, "cispo", low=0.5, high=2.0),
    "gmpo": surrogate(terms.gmpo, "gmpo", low=0.5, high=0.6),
    "sapo": surrogate(terms.sapo, "sapo", positive=0.7, negative=1.3),
    "ipo": surrogate(terms.ipo, "ipo", eps=0.1),
    "reinforce": surrogate(terms.reinforce, "reinforce"),
}
for divergence in ("tv", "kl"):
    bounds = {"divergence": divergence, "low": 0.1, "high": 0.15}
    SURROGATES[f"dppo {divergence}"] = surrogate(terms.dppo_ratio, "dppo", **bounds)
    SURROGATES[f"dppo {divergence} reinforce"] = surrogate(
        terms.dppo_reinforce, "dppo", named={"form": "reinforce"}, cap=2.0, **bounds
    )
CORRECTIONS = (
    {
        f"truncated {level}": (
            partial(terms.truncated, level=level, cap=1.5, floor=0.6),
            {"kind": "truncated_importance", "level": level, "cap": 1.5, "floor": 0.6},
        )
        for level in ("token", "sequence", "geometric")
    }
    | {
        f"masked {level} {weight}": (
            partial(terms.masked, level=level, low=0.7, high=1.6, weight=weight),
            {"kind": "masked_importance", "level": level, "low": 0.7, "high": 1.6, "weight": weight},
        )
        for level in ("token", "sequence", "geometric")
        for weight in ("level", "token", "one")
    }
    | {"TRL's sequence_mask": (
        partial(terms.masked, level="sequence", low=0.0, high=3.0),
        {"kind": "masked_importance", "level": "sequence", "low": 0.0, "high": 3.0},
    )}
    | {"second moment": (partial(terms.second_moment, threshold=0.1), {"kind": "second_moment", "threshold": 0.1})}
)  # fmt: skip
KINDS = {"k1": terms.k1, "k2": terms.k2, "k3": terms.k3, "k3_plus": terms.k3_plus}
KLS = (
    {f"{kind} to {to}": (Kl(f, 0.3, to), {"kind": kind, "to": to}) for kind, f in KINDS.items() for to in ("reference", "behavior")}
    | {f"{kind} times {times}": (Kl(partial(factor, KINDS[kind]), 0.3), {"kind": kind, "times": times})
       for kind in ("k1", "k3") for times, factor in (("ratio", terms.times_ratio), ("score", terms.times_score))}
    | {"k3 bounded": (Kl(partial(terms.k3, most=1.0, largest=0.4), 0.3), {"kind": "k3", "max_difference": 1.0, "max_value": 0.4})}
)  # fmt: skip
AGGREGATIONS = ("token", "sequence", "constant", "sequence_sum", "token_sum", "prompt")


def with_loss(**loss):
    """verl's GRPO without the dual clip but for what is given."""
    return objective_of("verl:grpo", loss={"surrogate": {"dual": None}} | loss)


def parts():
    for name, (preset, loss) in SURROGATES.items():
        yield name, preset, with_loss(aggregation="sequence", **loss)
        # With one advantage a sequence, GSPO-token is GSPO, and GMPO's mean of advantages unseen.
        by_token = replace(preset, advantage=oracle.PRESETS["openrlhf:reinforce_pp"].advantage)
        yield (
            f"{name} by token",
            by_token,
            objective_of("openrlhf:reinforce_pp", loss={"aggregation": "sequence", **loss}),
        )
    yield "anchored on proximal", Preset(NORM, anchor="proximal"), with_loss(anchor="proximal")
    for name, (correction, config) in CORRECTIONS.items():
        yield name, Preset(NORM, correction=correction), with_loss(correction=config)
    for name, (kl, config) in KLS.items():
        yield name, Preset(NORM, kl=kl), with_loss(kl=config | {"weight": 0.3})
    for how in AGGREGATIONS:
        yield f"mean {how}", Preset(NORM, aggregation=how), with_loss(aggregation=how)
    yield "entropy", Preset(NORM, entropy=0.2), with_loss(entropy=0.2)
    correction, config = CORRECTIONS["truncated token"]
    # The weight is not on the KL nor on the entropy, and the KL's ratio is to the proximal policy.
    yield (
        "everything",
        Preset(NORM, correction=correction, kl=Kl(partial(terms.times_ratio, terms.k3), 0.3), entropy=0.2),
        with_loss(correction=config, kl={"kind": "k3", "times": "ratio", "weight": 0.3}, entropy=0.2),
    )
    for name, preset in oracle.PRESETS.items():
        yield name, preset, objective_of(name)


PARTS = {name: (preset, cfg) for name, preset, cfg in parts()}


def differences(preset: Preset, case, advantage, returns, name: str) -> np.ndarray:
    """d loss / d case.<name> by central differences, [B, C]; what is stopped stays at `case.now`."""
    out = np.zeros(case.mask.shape)
    for at in map(tuple, np.argwhere(case.mask)):
        ends = []
        for step in (STEP, -STEP):
            moved = getattr(case, name).copy()
            moved[at] += step
            ends.append(oracle.loss(preset, case._replace(**{name: moved}), advantage, returns, still=case.now))
        out[at] = (ends[0] - ends[1]) / (2 * STEP)
    return out


class PartResults(NamedTuple):
    """Losses of one part on the first four cases, and the gradients on the third."""

    advantages: list[np.ndarray]
    losses: list[float]
    gradients: dict[str, np.ndarray]


def leaves(preset: Preset) -> list[str]:
    return ["now"] + ["values"] * bool(preset.critic) + ["entropy"] * bool(preset.entropy)


@lru_cache
def by_oracle(name: str) -> PartResults:
    preset, _ = PARTS[name]
    found = [preset.advantage(case) for case in CASES[:4]]
    values = [oracle.loss(preset, case, *own) for case, own in zip(CASES, found, strict=False)]
    gradients = {leaf: differences(preset, CASES[2], *found[2], leaf) for leaf in leaves(preset)}
    return PartResults([advantage for advantage, _ in found], values, gradients)


def by_package(name: str) -> PartResults:
    preset, cfg = PARTS[name]
    advantages, values = [], []
    with jax.enable_x64(True):
        for seed, case in enumerate(CASES[:4]):
            found = assess(cfg, case)
            of, given = package_loss(cfg, case, found, packed=seed % 2 == 1)
            advantages.append(found.advantage)
            values.append(float(of(*given)))
            if seed == 2:
                flat = jax.grad(of, argnums=(0, 1, 2))(*given)
    grads = dict(zip(("now", "values", "entropy"), flat, strict=True))
    return PartResults(advantages, values, {leaf: np.asarray(grads[leaf]) for leaf in leaves(preset)})

"""Every preset in float64 NumPy, loop by loop, from published formulas and the frameworks' code. Imports nothing of the package.

Sections are those of the reading of twelve frameworks that docs/objectives.md retells: 2.1 GRPO, 2.2 aggregation, 2.3 PPO's clip,
2.6 RLOO, 2.7 REINFORCE++, 2.8 other estimators, 2.9 GSPO, 2.10 CISPO, 2.11 GMPO, 2.12 SAPO and DPPO, 2.13 GAE and values, 2.14 KL,
2.15 corrections, 2.17 golden vectors; T1-T27 are its traps. A sequence is a row of [B, C], prompt-major; a token counts where
`mask` is True. Sequences of a group follow one another.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import exp, log1p

import numpy as np
import oracle_advantages as advantages
import oracle_terms as terms
from oracle_advantages import Case


@dataclass(frozen=True)
class Kl:
    kind: Callable
    weight: float
    to: str = "reference"


@dataclass(frozen=True)
class Preset:
    advantage: Callable[[Case], tuple[np.ndarray, np.ndarray | None]]
    surrogate: Callable = terms.token_clip
    aggregation: str = "token"
    correction: Callable[[Case], np.ndarray] | None = None
    kl: Kl | None = None
    critic: tuple[float, float | None] | None = None
    """Weight of the mean of half the squared error; how far the value may go from the old one."""
    entropy: float = 0.0
    anchor: str = "auto"
    """Which log-probabilities the ratio is to; auto: the proximal ones where there is a correction."""

    @property
    def old(self) -> str:
        return self.anchor if self.anchor != "auto" else "behavior" if self.correction is None else "proximal"


def aggregate(case: Case, losses: np.ndarray, how: str) -> float:
    """2.2, with counts of the whole minibatch."""
    lengths = case.mask.sum(axis=1)
    rows = [b for b, n in enumerate(lengths) if n > 0]
    total = 0.0
    for b in rows:
        each = sum(losses[b, t] for t in np.flatnonzero(case.mask[b]))
        of_group = sum(lengths[a] for a in advantages.rows_of(case, case.prompt[b]))
        groups = len({case.prompt[b] for b in rows})
        total += {
            "token": each / sum(lengths),
            "sequence": each / lengths[b] / len(rows),
            "constant": each / case.length / len(rows),
            "sequence_sum": each / len(rows),
            "token_sum": each,
            "prompt": each / of_group / groups,
        }[how]
    return float(total)


def value_loss(v: float, old: float, target: float, clip: float | None) -> float:
    """2.13."""
    plain = (v - target) ** 2
    return plain / 2 if clip is None else max(plain, (terms.clipped(v, old - clip, old + clip) - target) ** 2) / 2


def token_losses(preset: Preset, case: Case, advantage, returns, still=None) -> np.ndarray:
    """[B, C]; `still`: what stopped gradients are computed from, `case.now` if not given."""
    still = case.now if still is None else still
    old = getattr(case, preset.old)
    weights = case.mask.astype(float) if preset.correction is None else preset.correction(case)
    out = np.zeros(case.mask.shape)
    for b, row in enumerate(case.mask):
        at = np.flatnonzero(row)
        if not len(at):
            continue
        now, held, before = ([float(x) for x in rows[b, at]] for rows in (case.now, still, old))
        out[b, at] = weights[b, at] * preset.surrogate(now, held, before, [float(a) for a in advantage[b, at]])
        for i, t in enumerate(at):
            if preset.kl:
                other = float(getattr(case, preset.kl.to)[b, t])
                out[b, t] += preset.kl.weight * preset.kl.kind(now[i], held[i], other, before[i])
            if preset.critic:
                weight, clip = preset.critic
                out[b, t] += weight * value_loss(case.values[b, t], case.old_values[b, t], returns[b, t], clip)
            out[b, t] -= preset.entropy * case.entropy[b, t]
    return out


def loss(preset: Preset, case: Case, advantage, returns, still=None) -> float:
    return aggregate(case, token_losses(preset, case, advantage, returns, still), preset.aggregation)


def dpo_loss(case: Case, beta: float = 0.1) -> float:
    """Rafailov et al. 2023, eq. 7: the mean over the groups that have a best and a worst."""
    out = []
    above = [
        float(sum((case.now - case.reference)[b, t] for t in np.flatnonzero(row))) for b, row in enumerate(case.mask)
    ]
    for p in np.flatnonzero(case.used):
        rows = advantages.rows_of(case, p)
        rs = [float(case.reward[b]) for b in rows]
        if advantages.deviation(rs, 0) > 0:
            best, worst = rows[rs.index(max(rs))], rows[rs.index(min(rs))]
            out.append(log1p(exp(-beta * (above[best] - above[worst]))))
    return sum(out) / len(out)


GROUP_NORM = partial(advantages.group, advantages.group_norm)
PAPER_NORM = GROUP_NORM(eps=0.0, less=0)
VERL_NORM = GROUP_NORM(eps=1e-6)
TRL_NORM = GROUP_NORM(eps=1e-4)
MEAN_ONLY, LEAVE_ONE_OUT = advantages.group(advantages.centered), advantages.group(advantages.leave_one_out_baseline)
DUAL = partial(terms.token_clip, dual=3.0)
SKYRL_KL = Kl(partial(terms.k3, most=20.0, largest=10.0), 0.001)

PRESETS: dict[str, Preset] = {
    "paper:reinforce": Preset(advantages.on_every_token(lambda case: case.reward), terms.reinforce, "sequence_sum"),
    "paper:ppo": Preset(partial(advantages.gae, lam=0.95, whitened=False), critic=(2.0, None)),
    "paper:rloo": Preset(LEAVE_ONE_OUT, terms.reinforce, "sequence_sum"),
    "paper:grpo": Preset(PAPER_NORM, aggregation="sequence", kl=Kl(terms.k3, 0.04)),
    "paper:dr_grpo": Preset(MEAN_ONLY, aggregation="constant"),
    "paper:dapo": Preset(PAPER_NORM, partial(terms.token_clip, high=0.28)),
    "paper:gspo": Preset(PAPER_NORM, partial(terms.sequence_clip, low=3e-4, high=4e-4), "sequence"),
    "paper:cispo": Preset(PAPER_NORM, terms.cispo),
    "paper:gmpo": Preset(PAPER_NORM, terms.gmpo, "sequence"),
    "paper:sapo": Preset(PAPER_NORM, terms.sapo, "sequence"),
    "paper:max_rl": Preset(advantages.group(advantages.over_mean, eps=0.0), terms.reinforce, "sequence_sum"),
    "paper:decoupled_ppo": Preset(VERL_NORM, correction=partial(terms.truncated, cap=5.0)),
    "paper:icepop": Preset(VERL_NORM, aggregation="sequence", correction=terms.masked),
    "paper:m2po": Preset(VERL_NORM, correction=terms.second_moment),
    "verl:ppo": Preset(partial(advantages.gae, lam=1.0), DUAL, critic=(1.0, 0.5)),
    "verl:grpo": Preset(VERL_NORM, DUAL),
    "verl:dr_grpo": Preset(MEAN_ONLY, DUAL, "constant"),
    "verl:dapo": Preset(VERL_NORM, partial(terms.token_clip, high=0.28, dual=10.0)),
    "verl:rloo": Preset(LEAVE_ONE_OUT, DUAL),
    "verl:reinforce_pp": Preset(partial(advantages.whitened_returns, scale=advantages.verl_scale), DUAL),
    "verl:reinforce_pp_baseline": Preset(advantages.whitened_baseline, DUAL),
    "verl:opo": Preset(advantages.on_every_token(advantages.opo), DUAL),
    "verl:gpg": Preset(advantages.on_every_token(advantages.gpg), terms.reinforce),
    "verl:pass_at_k": Preset(advantages.group(advantages.best_only), DUAL),
    "verl:gspo": Preset(VERL_NORM, terms.sequence_token_clip, "sequence"),
    "verl:cispo": Preset(VERL_NORM, partial(terms.cispo, low=0.8, high=1.2)),
    "verl:gmpo": Preset(VERL_NORM, partial(terms.gmpo, low=0.2, high=0.2), "sequence"),
    "verl:sapo": Preset(VERL_NORM, terms.sapo, "sequence"),
    "verl:dppo_tv": Preset(VERL_NORM, terms.dppo_reinforce),
    "trl:grpo": Preset(TRL_NORM),
    "trl:grpo_sequence": Preset(TRL_NORM, aggregation="sequence"),
    "trl:dr_grpo": Preset(TRL_NORM, aggregation="constant"),
    "trl:gspo": Preset(TRL_NORM, terms.sequence_clip, "sequence"),
    "trl:cispo": Preset(TRL_NORM, terms.cispo),
    "trl:sapo": Preset(TRL_NORM, terms.sapo, "sequence"),
    "trl:rloo": Preset(
        advantages.on_every_token(partial(advantages.rloo_with_kl, weight=0.05)), terms.product_clip, "sequence"
    ),
    "trl:gdpo": Preset(advantages.on_every_token(advantages.gdpo)),
    "openrlhf:reinforce_pp": Preset(
        partial(advantages.whitened_returns, scale=advantages.openrlhf_scale, kl_weight=0.01)
    ),
    "openrlhf:grpo": Preset(partial(advantages.openrlhf_group_norm, kl_weight=0.01)),
    "slime:grpo": Preset(VERL_NORM, aggregation="sequence"),
    "nemo:grpo": Preset(advantages.group(advantages.nemo_leave_one_out), kl=Kl(terms.nemo_k3, 0.01)),
    "skyrl:grpo": Preset(VERL_NORM, kl=SKYRL_KL),
    "skyrl:cispo": Preset(VERL_NORM, terms.cispo, kl=SKYRL_KL),
    "skyrl:max_rl": Preset(advantages.group(advantages.over_mean, eps=1e-6), kl=SKYRL_KL),
    "skyrl:dppo": Preset(VERL_NORM, terms.dppo_ratio, kl=SKYRL_KL),
    "areal:grpo": Preset(
        partial(advantages.whitened_returns, scale=advantages.areal_scale, kl_weight=0.1),
        correction=partial(terms.masked, low=0.0, high=5.0),
    ),
    "prime:rl": Preset(MEAN_ONLY, terms.ipo),
    "prime:dppo": Preset(MEAN_ONLY, terms.dppo_ratio, kl=Kl(terms.k2, 2e-3, to="behavior")),
    "tinker:cispo": Preset(MEAN_ONLY, partial(terms.cispo, high=4.0), "token_sum"),
}
"""Every preset but paper:dpo, which is `dpo_loss`."""

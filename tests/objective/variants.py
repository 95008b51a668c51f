"""Every variant of the advantage estimators, and what the oracle has for it."""

import itertools
from collections.abc import Callable
from functools import partial
from math import sqrt
from typing import get_args

import numpy as np
import oracle_advantages as oracle
from oracle_advantages import Case, group, on_every_token, over_batch, over_groups

from jaxrl_llm.objective.advantages import Published
from jaxrl_llm.objective.estimator import Estimator
from jaxrl_llm.objective.group_estimators import (
    BestWorst,
    Gdpo,
    Gpg,
    Grpo,
    LeaveOneOut,
    MaxRl,
    MeanOnly,
    Opo,
    PassAtK,
    Raw,
    Rloo,
)
from jaxrl_llm.objective.token_estimators import Gae, GrpoSteps, ReinforcePlusPlus
from jaxrl_llm.objective.tree_estimators import Spo, TreePo, TreeRl, TreeRpo

OVER = "group", "batch"
By = Callable[[Case], tuple[np.ndarray, np.ndarray | None]]


def grpo(cfg: Grpo) -> By:
    less = int(cfg.std == "sample")
    if (cfg.mean_over, cfg.std_over) == ("group", "group"):
        return group(oracle.group_norm, eps=cfg.eps, less=less)

    def over(case: Case) -> np.ndarray:
        def of_groups(formula):
            return over_groups(formula, case)

        away = of_groups(oracle.centered) if cfg.mean_over == "group" else None
        std = of_groups(lambda rs: [oracle.deviation(rs, less)] * len(rs)) if cfg.std_over == "group" else None
        return over_batch(case, case.reward, cfg.eps, less, away, std)

    return on_every_token(over)


def whitened_rloo(case: Case) -> np.ndarray:
    return over_batch(case, over_groups(oracle.leave_one_out_baseline, case), 1e-4)


def reinforce_pp(cfg: ReinforcePlusPlus) -> By:
    less = int(cfg.variance == "sample")

    def scale(squares: float, n: int) -> float:
        beside = cfg.eps_beside == "std"
        return sqrt(squares / (n - less)) + cfg.eps if beside else sqrt(squares / (n - less) + cfg.eps)

    if cfg.baseline:
        return partial(oracle.whitened_baseline, scale=scale)
    return partial(oracle.whitened_returns, scale=scale, gamma=cfg.gamma)


def steps(std: str, eps: float) -> By:
    return partial(oracle.grpo_steps, eps=eps, less=int(std == "sample"))


ORACLES: dict[Estimator, By] = (
    {
        cfg: grpo(cfg)
        for cfg in (
            Grpo(std=std, eps=eps, mean_over=mean_over, std_over=std_over)
            for std, eps, mean_over, std_over in itertools.product(("sample", "population"), (1e-4, 0.0), OVER, OVER)
        )
    }
    | {
        MeanOnly(): group(oracle.centered),
        Rloo(): group(oracle.leave_one_out_baseline),
        Rloo(whiten=True): on_every_token(whitened_rloo),
        LeaveOneOut(): group(oracle.nemo_leave_one_out),
        LeaveOneOut(eps=0): group(oracle.nemo_leave_one_out, eps=0.0),
        MaxRl(): group(oracle.over_mean, eps=0.0),
        MaxRl(eps=1e-6): group(oracle.over_mean, eps=1e-6),
        PassAtK(): group(oracle.best_only),
        PassAtK(eps=0): group(oracle.best_only, eps=0.0),
        PassAtK(scale=False): group(oracle.best_only, scale=False),
        Opo(): on_every_token(oracle.opo),
        Gpg(): on_every_token(oracle.gpg),
        Gdpo(): on_every_token(oracle.gdpo),
        Gdpo(eps=0): on_every_token(partial(oracle.gdpo, eps=0.0)),
        Raw(): on_every_token(lambda case: case.reward),
        BestWorst(): group(oracle.best_and_worst),
    }
    | {
        cfg: reinforce_pp(cfg)
        for cfg in (
            *(
                ReinforcePlusPlus(baseline=baseline, variance=variance, eps_beside=beside)
                for baseline, variance, beside in itertools.product(
                    (False, True), ("sample", "population"), ("variance", "std")
                )
            ),
            ReinforcePlusPlus(gamma=0.9),
        )
    }
    | {GrpoSteps(std=std, eps=eps): steps(std, eps) for std, eps in (("sample", 1e-4), ("population", 0.0))}
    # Without trees: every response is one node below the prompt.
    | {TreeRl(reweight=by): group(oracle.twice_leave_one_out) for by in (True, False)}
    | {Spo(): group(oracle.centered)}
    | {TreePo(whiten=False): group(oracle.centered), TreePo(): reinforce_pp(ReinforcePlusPlus(baseline=True))}
    | {TreeRpo(): group(oracle.group_norm, eps=1e-4, less=1)}
    | {TreeRpo(std="population", eps=0.0): group(oracle.group_norm, eps=0.0, less=0)}
    | {Gae(): partial(oracle.gae, lam=0.95), Gae(gamma=0.9, whiten=False): partial(oracle.gae, lam=0.95, gamma=0.9, whitened=False)}
)  # fmt: skip
VARIANTS = list(ORACLES)
assert {type(cfg) for cfg in VARIANTS} == set(get_args(Published))

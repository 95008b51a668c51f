"""What ends or interrupts a run by itself: pure values that look at each step's metrics. Knows nothing of arrays on devices."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isnan
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxrl_llm.errors import GradingError, MismatchError, NonFiniteError, UserError
from jaxrl_llm.update.config import GuardConfig

# Fraction of tokens whose draw had more candidates than `rollout.max_kept_tokens`: above it another truncation than asked for.
MOST_OVERFLOW = 0.1


class Guards(NamedTuple):
    """Counts so far, of steps but for `alarm`; belong into checkpoints."""

    nonfinite: int = 0
    """In a row, of which no update was finite."""
    ungraded: int = 0
    """In a row, of which no group could be graded."""
    overflow: int = 0
    """In a row, whose draws the support cut off."""
    idle: int = 0
    """Of RL, that learned nothing."""
    spoiled: int = 0
    """Of RL, with an update that was not finite."""
    seen: int = 0
    """Of RL."""
    alarm: int = 0
    """Stale updates in a row whose ratios were all exactly 1: `RatioAlarm.streak`."""
    zero_gradient: Int[np.ndarray, " n"] = np.zeros(0, np.int64)
    """Of each parameter, in the order of their sorted paths: steps in a row in which its gradient alone was exactly 0. A count that
    has reached `zero_gradient_steps` stays: the parameter has been named."""


class Verdict(NamedTuple):
    guards: Guards
    warnings: tuple[str, ...]
    error: UserError | None
    """Ends the run, with exit code 4."""


@dataclass(frozen=True)
class RatioAlarm:
    """Rings when the importance ratio has no spread although the policy moved: behavior log-probs were recomputed, not kept."""

    streak: int = 0
    """Consecutive suspicious updates so far; belongs into checkpoints."""

    def observe(self, ratio_min: float, ratio_max: float, stale: bool) -> tuple["RatioAlarm", bool]:
        """Return the next state and whether to ring: from the second consecutive stale update on whose ratios are all exactly 1.

        Args:
            ratio_min, ratio_max: extremes of pi(token) / behavior(token) over the tokens of the loss.
            stale: the policy moved since the batch was drawn (second and later updates on it, or an older batch).
                Updates that are not stale neither count nor reset.
        """
        if not stale:
            return self, False
        streak = self.streak + 1 if ratio_min == ratio_max == 1.0 else 0
        return RatioAlarm(streak), streak >= 2


def observe(
    guards: Guards, cfg: GuardConfig, metrics: Mapping[str, float], zero: Mapping[str, bool], first_failure: str = ""
) -> Verdict:
    """What one step of RL means.

    Args:
        metrics: of the step, an evaluation's among them. What is absent there was not measured.
        zero: of each parameter that is trained, by its path: its gradient was exactly 0 in every update of the step. Empty where
            no update counts: none was finite, or none had a token to learn from.
        first_failure: the first failure of a grader, in its own words.
    """
    update = observe_update(guards, cfg, metrics)
    streaks, warnings = _zero_gradients(guards.zero_gradient, cfg.zero_gradient_steps, zero)
    reason = _nothing_learned(metrics, zero)
    spoiled = metrics.get("nonfinite", 0.0) > 0
    overflows = metrics.get("sampling/support_overflow", 0.0) > MOST_OVERFLOW
    after = update.guards._replace(
        ungraded=guards.ungraded + 1 if metrics["groups/graded"] == 0 else 0,
        overflow=guards.overflow + 1 if overflows else 0,
        idle=guards.idle + bool(reason),
        spoiled=guards.spoiled + spoiled,
        seen=guards.seen + 1,
        zero_gradient=streaks,
    )
    if reason and _is_doubling(after.idle, cfg.idle_steps):
        warnings.append(f"{after.idle} of {after.seen} steps of RL so far learned nothing; this one: {reason}")
    if spoiled and _is_doubling(after.spoiled, cfg.idle_steps):
        warnings.append(
            f"{after.spoiled} of {after.seen} steps of RL so far had updates whose loss or gradient was not finite; of this one "
            f"{metrics['nonfinite']:.0%}: look at the size of the rewards, and at update.optimizer.lr"
        )
    if after.overflow == cfg.idle_steps:
        warnings.append(
            f"sampling/support_overflow: got {metrics['sampling/support_overflow']:.2f} of the tokens, want at most "
            f"{MOST_OVERFLOW}: more candidates qualify for a draw than are kept, so draws are from the likeliest alone; raise "
            "rollout.max_kept_tokens"
        )
    if metrics["alarm/ratio"]:
        warnings.append("ALARM: all ratios were exactly 1 on stale data, twice: old log-probs are not those captured")
    error = update.error or _mismatch(cfg, metrics)
    if after.ungraded >= cfg.max_ungraded:
        error = GradingError(
            f"no group of {after.ungraded} steps in a row could be graded (update.guards.max_ungraded), so nothing was learned; "
            f"the first failure: {first_failure or 'on another host, see its log'}"
        )
    return Verdict(after, tuple(warnings), error)


def observe_update(guards: Guards, cfg: GuardConfig, metrics: Mapping[str, float]) -> Verdict:
    """What a step's updates mean alone, in RL and before it: by `nonfinite`, the share of them that were not finite."""
    if "nonfinite" not in metrics:
        return Verdict(guards, (), None)
    nonfinite, error = guards.nonfinite + 1 if metrics["nonfinite"] == 1 else 0, None
    if nonfinite >= cfg.max_nonfinite:
        error = NonFiniteError(
            f"no update of {nonfinite} steps in a row was finite (update.guards.max_nonfinite); "
            "parameters are those from before them"
        )
    return Verdict(guards._replace(nonfinite=nonfinite), (), error)


def _mismatch(cfg: GuardConfig, metrics: Mapping[str, float]) -> MismatchError | None:
    """Of the step's own rollouts, where these are fresh, and of an evaluation's."""
    measured = [name for name in ("mismatch/kl", "eval/mismatch_kl") if name in metrics and not isnan(metrics[name])]
    worst = max(measured, key=metrics.__getitem__, default=None)
    if worst is None or cfg.max_mismatch_kl is None or not metrics[worst] > cfg.max_mismatch_kl:
        return None
    return MismatchError(
        f"{worst}: got {metrics[worst]:.3g} nats per token, want at most {cfg.max_mismatch_kl} "
        "(update.guards.max_mismatch_kl): sampler and trainer give the same tokens different probabilities under the same "
        "parameters. Look at rollout.engine.weights and cache (8 bits are further off), model.compute, the temperature and "
        "support that the scorer uses, and at a model whose training pass differs from its decoding"
    )


def _nothing_learned(metrics: Mapping[str, float], zero: Mapping[str, bool]) -> str:
    """Why a step learned nothing, and what to look at; "" where it did."""
    if metrics["updates"] == 0:
        if metrics["groups/graded"] == 0:
            return "no group could be graded, see rewards/<grader>/<failure>"
        if metrics["groups/kept"] == 0:
            return "the rewards of each group were equal (experience.filter), so the task is too hard, or too easy, for this policy"
        return "no token of the groups that were kept takes part in the loss"
    if not zero:
        return "no update was finite"
    if all(zero.values()):
        return (
            "every gradient was exactly 0: are the rewards of each group equal, the advantages or weights all 0, or all tokens "
            "beyond the clip?"
        )
    return ""


def _is_doubling(count: int, first: int) -> bool:
    """Whether `count` is first, 2 first, 4 first, ...: what is told at these is told soon, and never too often."""
    times, rest = divmod(count, first)
    return count > 0 and rest == 0 and times & (times - 1) == 0


def _zero_gradients(
    before: Int[np.ndarray, " n"], most: int, zero: Mapping[str, bool]
) -> tuple[Int[np.ndarray, " n"], list[str]]:
    """The next streaks, and what to say of those that have just become `most` steps long."""
    paths = sorted(zero)
    before = before if len(before) else np.zeros(len(paths), np.int64)
    if all(zero.values()):
        # Nothing is wrong with single parameters while nothing at all is learned.
        return before, []
    after = np.array([n if n >= most else n + 1 if zero[path] else 0 for path, n in zip(paths, before, strict=True)])
    dead = [path for path, old, new in zip(paths, before, after, strict=True) if old < most <= new]
    told = f"the gradient of {', '.join(dead)} was exactly 0 for {most} steps: nothing in the loss depends on it"
    return after, [told] if dead else []
